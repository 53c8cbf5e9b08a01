"""What a user can do where the device's memory is too small for a run: the flags that the run does not use yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from library.errors import SettingsError
from library.training.network_building import NetworkBuilder

if TYPE_CHECKING:
    from library.training.arguments import TrainConfig

_NUM_BLOCKS = 26  # of the released model: beyond it nothing is left to stream

_REMEDIES: tuple[tuple[Callable[[TrainConfig], bool], str], ...] = (
    (lambda c: c.memory.vram_gb is not None, "a smaller --vram_gb than the card has leaves more room"),
    (lambda c: c.memory.mixed_precision == "no", "--mixed_precision bf16 halves weights and activations"),
    (
        lambda c: not (c.data.cache_latents and (c.data.cache_text_encoder_outputs or c.trains_text_encoder)),
        "--cache_latents and --cache_text_encoder_outputs keep the other models away",
    ),
    (lambda c: not c.memory.gradient_checkpointing, "--gradient_checkpointing keeps far fewer activations"),
    (
        lambda c: c.memory.gradient_checkpointing and c.memory.gradient_checkpointing_level != "full",
        "--gradient_checkpointing_level full keeps fewer activations",
    ),
    (
        lambda c: c.quantisation.transformer is None and NetworkBuilder(c).has_companion,
        "--fp8_base halves the frozen weights",
    ),
    (lambda c: not c.memory.blocks_to_swap, "--blocks_to_swap keeps frozen weights in host memory"),
    (
        lambda c: 0 < (c.memory.blocks_to_swap or 0) < _NUM_BLOCKS,
        "a higher --blocks_to_swap keeps more weights in host memory",
    ),
    (
        lambda c: c.memory.gradient_checkpointing and not c.memory.cpu_offload_checkpointing,
        "--cpu_offload_checkpointing keeps activations in host memory",
    ),
    (lambda c: True, "a smaller batch size or resolution needs less"),
)
"""(When it would help, what to do), what costs least first."""


def raise_where_memory_was_short(error: BaseException, config: TrainConfig) -> None:
    """Turns the device's out-of-memory error into advice; returns for every other error.

    Raises:
        SettingsError: the device's memory was too small.
    """
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        remedies = "; ".join(text for helps, text in _REMEDIES if helps(config))
        raise SettingsError(f"the device's memory is too small for this run: {remedies} (docs/memory.md)") from error
