"""Settings of precision, memory and attention: what makes the model fit and run fast. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from library.errors import SettingsError
from library.settings import flag

AttentionMode = Literal["auto", "sdpa", "cudnn", "flash", "varlen", "flex", "sage"]
# Flags of sd-scripts that say the same as --attn_mode.
_MODES_OF_FLAGS: dict[str, AttentionMode] = {
    "use_flash_attn": "flash",
    "use_sage_attn": "sage",
    "sdpa": "sdpa",
    "xformers": "sdpa",
    "mem_eff_attn": "sdpa",
}


@dataclass(frozen=True)
class AttentionSettings:
    """How attention is computed; both programs have these flags."""

    attn_mode: AttentionMode = flag(
        "auto",
        "how attention is computed: auto takes the fastest exact way that runs here; sdpa, cudnn, varlen and flex are"
        " torch's own, flash needs the package flash-attn, sage needs sageattention and cannot train",
    )
    use_flash_attn: bool = flag(False, "the same as --attn_mode flash")
    use_sage_attn: bool = flag(False, "the same as --attn_mode sage")
    sdpa: bool = flag(False, "the same as --attn_mode sdpa")
    xformers: bool = flag(False, "the same as --attn_mode sdpa, which has xformers' memory-efficient kernel inside")
    mem_eff_attn: bool = flag(False, "the same as --attn_mode sdpa, which has a memory-efficient kernel inside")

    def __post_init__(self) -> None:
        named = self._named()
        if len({mode for _, mode in named}) > 1:
            raise SettingsError(
                f"{' and '.join(given for given, _ in named)} ask for different attention kernels, and all blocks use one;"
                " leave all but one out"
            )

    def _named(self) -> list[tuple[str, AttentionMode]]:
        """Returns what was asked for: (the flag as given, the mode that it means)."""
        named = [(f"--{name}", mode) for name, mode in _MODES_OF_FLAGS.items() if getattr(self, name)]
        return [(f"--attn_mode {self.attn_mode}", self.attn_mode), *named] if self.attn_mode != "auto" else named

    @property
    def mode(self) -> AttentionMode:
        """The mode that ``--attn_mode`` or a flag that means one asks for."""
        return self._named()[0][1] if self._named() else "auto"

    @property
    def given_as(self) -> str:
        """The flag that asks for it, for messages."""
        return self._named()[0][0] if self._named() else "--attn_mode auto"


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
