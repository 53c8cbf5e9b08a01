"""The floating point operations that a training step or a forward pass of Next-DiT cannot do without.

Counted are matrix products: Linears of all blocks, embedders and the final layer, and attention (every token attends to
every token). A multiply and an add are two operations. Not counted: modulation and time embedding (a few rows), norms,
rotations, activations, the optimizer, and anything computed a second time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from library.lumina.configs import NextDiTConfig
from library.lumina.next_dit import NextDiT

_PATCH_PX = 16


@dataclass(frozen=True)
class StepFlops:
    """Operations of one step over a batch."""

    forward: int
    """The frozen model and the LoRA beside it."""
    backward: int
    """Gradients of inputs, and of the LoRA's factors; frozen weights have none."""
    blocks_forward: int
    """The part of ``forward`` in blocks: what full gradient checkpointing computes again."""

    @property
    def step(self) -> int:
        """What a training step cannot do without."""
        return self.forward + self.backward


def image_tokens(width_px: int, height_px: int) -> int:
    """Returns N, the image tokens of a picture."""
    return (width_px // _PATCH_PX) * (height_px // _PATCH_PX)


def count(
    sizes: NextDiTConfig, num_image: int, captions: Sequence[int], ranks: dict[str, int] | None = None
) -> StepFlops:
    """Returns the operations of a step over ``len(captions)`` pictures of one size.

    Args:
        sizes: of the model.
        num_image: image tokens of a picture.
        captions: caption tokens of each picture; padding is not counted.
        ranks: the LoRA's rank beside each Linear, by module name; None or a name left out means no LoRA.
    """
    with torch.device("meta"):
        model = NextDiT(sizes)
    ranks = ranks or {}
    image, caption = num_image * len(captions), sum(captions)
    both = image + caption
    blocks = {"layers": both, "noise_refiner": image, "context_refiner": caption}
    tokens = blocks | {"x_embedder": image, "final_layer": image, "cap_embedder": caption, "t_embedder": 0}
    forward, backward, in_blocks = 0, 0, 0
    for name, linear in _linears(model):
        root = name.split(".")[0]
        size = linear.in_features + linear.out_features
        rows = 0 if "adaLN" in name else tokens[root]
        base = 2 * rows * linear.in_features * linear.out_features
        lora = 2 * rows * ranks.get(name, 0) * size
        forward += base + lora
        # An embedder's input needs no gradient; a LoRA has two gradients of factors and one of its input.
        backward += (0 if root.endswith("embedder") else base + lora) + lora
        in_blocks += base + lora if root in blocks else 0
    scores = 4 * sizes.num_heads * sizes.head_dim  # q k' and p v, a pair of tokens
    attention = scores * sum(
        sizes.num_layers * (num_image + length) ** 2
        + sizes.num_noise_refiners * num_image**2
        + sizes.num_context_refiners * length**2
        for length in captions
    )
    return StepFlops(forward + attention, backward + 2 * attention, in_blocks + attention)


def _linears(model: nn.Module) -> Iterable[tuple[str, nn.Linear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
