"""Settings of precision, memory and attention: what makes the model fit and run fast. Nothing heavy is imported here."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Any, Literal

from library.errors import SettingsError
from library.settings import flag, require

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


Quantisation = Literal["fp8", "fp8_fast", "nf4"]
CheckpointingLevel = Literal["full", "selective"]


def _parse_vram(value: Any) -> float | str:
    if value == "auto":
        return "auto"
    try:
        size = float(value)
    except (TypeError, ValueError):
        size = math.nan
    if isinstance(value, bool) or not 0 < size < 10_000:
        raise ValueError("the card's memory in GiB, such as 12, or auto is expected")
    return size


@dataclass(frozen=True)
class MemorySettings:
    """Precision of the frozen models and of the LoRA, and what is recomputed instead of kept."""

    mixed_precision: Literal["no", "fp16", "bf16"] = flag(
        "no",
        "precision of the frozen models and of the computation: bf16; fp16, for cards without bf16 (RTX 20, T4, V100), where"
        " the large products and attention are in fp16 and all else in float32; no for float32",
    )
    full_bf16: bool = flag(
        False, "keep the LoRA and its gradients in bf16 too (float32 otherwise, which trains better)"
    )
    no_half_vae: bool = flag(False, "run the autoencoder in float32")
    torch_compile: bool = flag(
        False, "compile the blocks: faster steps and less memory, after a minute or more for each picture size"
    )
    dynamo_backend: str = flag("inductor", "compiler of --torch_compile, as torch names it")
    vae_tiling: bool = flag(
        False,
        "encode and decode pictures of more than 1280 x 1280 pixels in overlapping tiles: bounded memory, but latents"
        " that differ a little",
    )
    gradient_checkpointing: bool = flag(
        False, "keep only each block's input and compute the rest again in backward: far less memory, slower"
    )
    gradient_checkpointing_level: CheckpointingLevel = flag(
        "full",
        "full keeps each block's input alone; selective keeps attention's results and narrow products too: faster, and more"
        " memory",
    )
    blocks_to_swap: int | None = flag(
        None,
        "keep the frozen weights of this many transformer blocks in host memory and copy them to the GPU ahead of use; up to"
        " all of them (26 in the released model); room for two stays on the GPU. Gemma2's layers too, unless it is trained",
    )
    cpu_offload_checkpointing: bool = flag(
        False,
        "keep what blocks save for the backward pass in host memory: each block's input with --gradient_checkpointing,"
        " everything large without",
    )
    vram_gb: float | str | None = flag(
        None,
        "choose the memory flags: the fastest with which the run fits a GPU of this many GiB, or what is free now (auto);"
        " flags that are given stay, and weights are quantised only where nothing else fits",
        parse=_parse_vram,
    )

    def __post_init__(self) -> None:
        if self.full_bf16 and self.mixed_precision != "bf16":
            raise SettingsError("--full_bf16 needs --mixed_precision bf16; add it, or leave --full_bf16 out")
        check_blocks_to_swap(self.blocks_to_swap)

    @property
    def in_halves(self) -> bool:
        """Whether large products are computed in fp16, beside a residual stream in float32."""
        return self.mixed_precision == "fp16"


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
