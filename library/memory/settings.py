"""Settings of precision and memory: what makes the model fit. Nothing heavy is imported here."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

from library.errors import SettingsError
from library.settings import flag

Quantisation = Literal["fp8", "fp8_fast", "nf4"]


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

    def __post_init__(self) -> None:
        if self.mixed_precision == "fp16":
            raise SettingsError(
                "--mixed_precision fp16: this model's activations leave fp16's range and give black pictures and NaN"
                " losses; use bf16, or no (float32) on cards without bf16"
            )
        if self.full_bf16 and self.mixed_precision != "bf16":
            raise SettingsError("--full_bf16 needs --mixed_precision bf16; add it, or leave --full_bf16 out")


@dataclass(frozen=True)
class QuantisationSettings:
    """Frozen weights in fewer bits than --mixed_precision says: the large matrices of the blocks."""

    fp8_base: bool = flag(
        False,
        "keep the large matrices of Next-DiT's and Gemma2's layers in 8 bits, with a scale for each output channel",
    )
    fp8_base_unet: bool = flag(False, "the Next-DiT's alone; Gemma2 stays as it is, also beside --fp8_base")
    fp8_fast: bool = flag(
        False, "multiply Next-DiT's fp8 matrices in fp8 too: faster, less exact; GPUs from RTX 40, L4 and H100 on"
    )
    nf4_base: bool = flag(False, "keep the large matrices of the Next-DiT in 4 bits (NF4, by bitsandbytes)")

    def __post_init__(self) -> None:
        if self.nf4_base and (self.fp8_base or self.fp8_base_unet):
            raise SettingsError(
                "--nf4_base and --fp8_base or --fp8_base_unet quantise the same weights; leave one of them out"
            )
        if self.fp8_fast and not (self.fp8_base or self.fp8_base_unet):
            raise SettingsError(
                "--fp8_fast multiplies fp8 weights, and there are none; add --fp8_base or --fp8_base_unet"
            )
        if self.nf4_base and importlib.util.find_spec("bitsandbytes") is None:
            raise SettingsError(
                "--nf4_base: the package bitsandbytes is not installed; run pip install bitsandbytes, or use --fp8_base"
            )

    @property
    def transformer(self) -> Quantisation | None:
        """How the Next-DiT's large matrices are quantised."""
        if self.nf4_base:
            return "nf4"
        if self.fp8_base or self.fp8_base_unet:
            return "fp8_fast" if self.fp8_fast else "fp8"
        return None

    @property
    def text_encoder(self) -> Quantisation | None:
        """How Gemma2's large matrices are quantised; as in sd-scripts, --fp8_base_unet leaves them alone."""
        return "fp8" if self.fp8_base and not self.fp8_base_unet else None
