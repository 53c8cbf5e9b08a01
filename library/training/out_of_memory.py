"""What a user can do where memory is too small for a run: the flags that the run does not use yet, and that it may use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from library.errors import SettingsError
from library.training.network_building import NetworkBuilder

if TYPE_CHECKING:
    import torch

    from library.training.arguments import TrainConfig

_NUM_BLOCKS = 26  # of the released model: beyond it nothing is left to stream

_REMEDIES: tuple[tuple[Callable[[TrainConfig], bool], str], ...] = (
    (lambda c: c.memory.mixed_precision == "no", "--mixed_precision bf16 (fp16 on cards without it) halves weights"),
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
        # Other network modules would take codes for weights.
        lambda c: c.quantisation.transformer is None and NetworkBuilder(c).has_companion,
        "--fp8_base halves the frozen weights",
    ),
)
"""(When it would help, what to do), what costs least first."""
_WITH_HOST_MEMORY: tuple[tuple[Callable[[TrainConfig], bool], str], ...] = (
    (lambda c: c.memory.vram_gb is not None, "a smaller --vram_gb than the card has leaves more room"),
    (lambda c: not c.memory.blocks_to_swap, "--blocks_to_swap keeps frozen weights in host memory"),
    (
        lambda c: 0 < (c.memory.blocks_to_swap or 0) < _NUM_BLOCKS,
        "a higher --blocks_to_swap keeps more weights in host memory",
    ),
    (
        lambda c: c.memory.gradient_checkpointing and not c.memory.cpu_offload_checkpointing,
        "--cpu_offload_checkpointing keeps activations in host memory",
    ),
)
"""The same, for devices that have memory beside the host's."""
_ALWAYS = "a smaller batch size or resolution needs less"


def raise_where_memory_was_short(error: BaseException, config: TrainConfig, device: torch.device) -> None:
    """Turns an error about too little memory into advice; returns for every other error.

    Raises:
        SettingsError: memory was too small.
    """
    from library.shortage import is_out_of_memory

    if is_out_of_memory(error):
        raise SettingsError(
            f"the memory of the device {device.type} is too small for this run: {'; '.join(_remedies(config, device))}"
            " (docs/memory.md)"
        ) from error


def raise_where_a_caption_was_too_long(
    error: BaseException, captions: Sequence[str], config: TrainConfig, device: torch.device
) -> None:
    """The same for captions that are encoded ahead of training, of which one alone did not fit.

    Raises:
        SettingsError: memory was too small.
    """
    from library.shortage import is_out_of_memory

    if not is_out_of_memory(error):
        return
    longest = max(captions, key=len)
    remedies = [f"a --gemma2_max_token_length below {config.model.gemma2_max_token_length} cuts long ones off"]
    if config.memory.mixed_precision == "no":
        remedies.insert(0, "--mixed_precision bf16 (fp16 on cards without it) halves Gemma2's weights")
    if config.quantisation.transformer is None and NetworkBuilder(config).has_companion:
        remedies.append("--fp8_base halves Gemma2's weights")
    if device.type == "cuda" and not config.memory.blocks_to_swap:
        remedies.append("--blocks_to_swap keeps them in host memory")
    raise SettingsError(
        f"the memory of the device {device.type} is too small for Gemma2 with a caption of {len(longest)} characters"
        f" ({longest[:_SHOWN]!r}{'...' if len(longest) > _SHOWN else ''}): {'; '.join(remedies)} (docs/memory.md)"
    ) from error


_SHOWN = 40  # characters of a caption, to find it by


def _remedies(config: TrainConfig, device: torch.device) -> list[str]:
    found = [text for helps, text in _REMEDIES if helps(config)]
    if device.type == "cuda":
        found += [text for helps, text in _WITH_HOST_MEMORY if helps(config)]
    return [*found, _ALWAYS]
