"""Settings of precision and memory: what makes the model fit. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from library.errors import SettingsError
from library.settings import flag, require


@dataclass(frozen=True)
class MemorySettings:
    """Precision of the frozen models and of the LoRA, and what is recomputed instead of kept."""

    mixed_precision: Literal["no", "fp16", "bf16"] = flag(
        "no", "precision of the frozen models and of the computation: bf16, or no for float32"
    )
    full_bf16: bool = flag(
        False, "keep the LoRA and its gradients in bf16 too (float32 otherwise, which trains better)"
    )
    no_half_vae: bool = flag(False, "run the autoencoder in float32")
    gradient_checkpointing: bool = flag(
        False, "keep only each block's input and compute the rest again in backward: far less memory, slower"
    )
    blocks_to_swap: int | None = flag(
        None,
        "keep the frozen weights of this many transformer blocks in host memory and copy them to the GPU ahead of use; up to"
        " all of them (26 in the released model); room for two stays on the GPU",
    )
    cpu_offload_checkpointing: bool = flag(
        False,
        "keep what blocks save for the backward pass in host memory: each block's input with --gradient_checkpointing,"
        " everything large without",
    )

    def __post_init__(self) -> None:
        if self.mixed_precision == "fp16":
            raise SettingsError(
                "--mixed_precision fp16: this model's activations leave fp16's range and give black pictures and NaN"
                " losses; use bf16, or no (float32) on cards without bf16"
            )
        if self.full_bf16 and self.mixed_precision != "bf16":
            raise SettingsError("--full_bf16 needs --mixed_precision bf16; add it, or leave --full_bf16 out")
        check_blocks_to_swap(self.blocks_to_swap)


def check_blocks_to_swap(blocks_to_swap: int | None, num_blocks: int | None = None) -> None:
    """Checks ``--blocks_to_swap``, against a model where its number of blocks is known.

    Raises:
        SettingsError: it is negative, or the model has fewer blocks.
    """
    if blocks_to_swap is None:
        return
    require(blocks_to_swap >= 0, f"--blocks_to_swap: {blocks_to_swap} is no number of blocks; give 0 or more")
    require(
        num_blocks is None or blocks_to_swap <= num_blocks,
        f"--blocks_to_swap: {blocks_to_swap} is more than the {num_blocks} blocks of this model; give {num_blocks} to keep"
        " all their weights in host memory, or fewer",
    )
