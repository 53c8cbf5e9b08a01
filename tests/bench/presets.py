"""Models of named sizes with random weights, for benchmarks: no checkpoint is needed.

``tiny`` answers in milliseconds, ``medium`` (283.6 M parameters) is what a CPU can train on, ``full`` is Lumina Image 2.0.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fast_random import NormalNumbers

from library.lumina.configs import NextDiTConfig
from library.lumina.filling import BlockFinish, fill
from library.lumina.next_dit import BLOCKS, LARGE_MATRICES, AttentionFn, NextDiT, plain_attention

_FULL = NextDiTConfig()
PRESETS: dict[str, NextDiTConfig] = {
    "tiny": dataclasses.replace(
        _FULL, dim=144, num_layers=4, num_heads=6, num_kv_heads=2, head_dim=24, ffn_dim=576, time_dim=128, cap_dim=96
    ),
    "medium": dataclasses.replace(
        _FULL, dim=1152, num_layers=8, num_heads=12, num_kv_heads=4, ffn_dim=4608, cap_dim=64
    ),
    "full": _FULL,
}


def config(name: str) -> NextDiTConfig:
    """Returns the sizes of a preset.

    Raises:
        SystemExit: there is no such preset.
    """
    if name not in PRESETS:
        sys.exit(f"--preset: {name!r} is none of {', '.join(PRESETS)}")
    return PRESETS[name]


def random_next_dit(
    sizes: NextDiTConfig,
    dtype: torch.dtype,
    attention: AttentionFn = plain_attention,
    device: torch.device | str = "cpu",
    finish: BlockFinish | None = None,
) -> NextDiT:
    """Returns a frozen model with random weights that keep activations near 1; the same on every device.

    Args:
        sizes: of the model.
        dtype: of its weights.
        attention: see ``library.lumina.next_dit.AttentionFn``.
        device: where to.
        finish: quantises and places each block, as while a model is read.
    """
    with torch.device("meta"):
        model = NextDiT(sizes, attention)
    numbers = NormalNumbers(device="cuda" if torch.cuda.is_available() else "cpu")  # the faster of both
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            values = numbers.take(parameter.numel(), 1 / math.sqrt(parameter.shape[1]), dtype).view(parameter.shape)
        else:
            values = torch.zeros(parameter.shape) if name.endswith("bias") else torch.ones(parameter.shape)
        tensors[name] = values.to(dtype)
    fill(model.eval(), tensors.items(), BLOCKS, LARGE_MATRICES, change=None, finish=finish)
    return model if finish is not None else model.to(device)
