"""Named model sizes for benchmarks, with random weights."""

from __future__ import annotations

import torch
from torch import nn

from library.lumina.next_dit import NextDiT, NextDiTConfig
from library.memory.attention import sdpa_attention

PRESETS = {
    "tiny": NextDiTConfig(
        dim=96,
        num_layers=2,
        num_noise_refiners=1,
        num_context_refiners=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=24,
        ffn_dim=384,
        time_dim=64,
        cap_dim=64,
    ),
    "medium": NextDiTConfig(dim=1152, num_layers=8, num_heads=12, num_kv_heads=4, ffn_dim=4608),
    "full": NextDiTConfig(),
}
"""``medium`` has the full model's proportions at half its width (286.2 M parameters), ``full`` is Lumina Image 2.0."""


def config(name: str) -> NextDiTConfig:
    """Returns the sizes of a preset."""
    return PRESETS[name]


def build(sizes: NextDiTConfig, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> NextDiT:
    """Returns a frozen model with random weights: zeros or equal numbers would let a processor clock higher."""
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = NextDiT(sizes, sdpa_attention)
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    finally:
        torch.set_default_dtype(default)
    return model.requires_grad_(False).eval()
