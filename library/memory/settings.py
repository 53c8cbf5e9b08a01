"""Settings of precision and memory: what makes the model fit. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from library.errors import SettingsError
from library.settings import flag


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
    vae_tiling: bool = flag(
        False,
        "encode and decode pictures of more than 1280 x 1280 pixels in overlapping tiles: bounded memory, but latents"
        " that differ a little",
    )
    gradient_checkpointing: bool = flag(
        False, "keep only each block's input and compute the rest again in backward: far less memory, slower"
    )

    def __post_init__(self) -> None:
        if self.mixed_precision == "fp16":
            raise SettingsError(
                "--mixed_precision fp16: this model's activations leave fp16's range and give black pictures and NaN"
                " losses; use bf16, or no (float32) on cards without bf16"
            )
        if self.full_bf16 and self.mixed_precision != "bf16":
            raise SettingsError("--full_bf16 needs --mixed_precision bf16; add it, or leave --full_bf16 out")
