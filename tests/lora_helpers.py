"""Small models and files that the tests of the LoRA network share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from library.lumina.next_dit import NextDiT, NextDiTConfig

GOLDEN = Path(__file__).parent / "golden"


def small_next_dit(dtype: torch.dtype = torch.float32) -> NextDiT:
    """Returns the small Next-DiT of the recorded numbers, frozen."""
    weights = load_file(GOLDEN / "next_dit_weights.safetensors")
    model = NextDiT(NextDiTConfig.from_shapes({name: tuple(tensor.shape) for name, tensor in weights.items()}))
    model.load_state_dict(weights)
    return model.to(dtype).requires_grad_(False)


def full_next_dit_on_meta() -> NextDiT:
    """Returns the 2.6 B model without memory."""
    shapes = json.loads((GOLDEN / "next_dit_2b_keys.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        return NextDiT(NextDiTConfig.from_shapes({name: tuple(shape) for name, shape in shapes.items()}))


def gemma2(num_layers: int = 2, **sizes: int) -> nn.Module:
    """Returns a Gemma2 with ``num_layers`` layers and an Identity norm, tiny unless sizes are given."""
    from transformers import Gemma2Config, Gemma2Model

    values = {
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
    } | sizes
    model = Gemma2Model(Gemma2Config(num_hidden_layers=num_layers, **values))
    model.norm = nn.Identity()
    return model.requires_grad_(False)


def cases() -> dict[str, Tensor]:
    """Returns the recorded inputs and outputs."""
    return load_file(GOLDEN / "next_dit_cases.safetensors")


def velocity(model: NextDiT, recorded: dict[str, Tensor], case: str = "ragged") -> Tensor:
    """Returns the model's output on a recorded input."""
    mask = recorded[f"{case}.cap_mask"].bool()
    return model(
        recorded[f"{case}.latents"],
        recorded[f"{case}.model_time"],
        recorded[f"{case}.cap_feats"],
        None if bool(mask.all()) else mask,
    )


def fill(network: Any, seed: int = 0, size: float = 0.05) -> None:
    """Gives every parameter of a network a random value, so that its part of the output is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def metadata_of(file: Path) -> dict[str, str]:
    """Returns the metadata of a safetensors file."""
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata() or {})


def largest_relative_difference(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference over the largest expected value."""
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).abs().max() / expected.abs().max())
