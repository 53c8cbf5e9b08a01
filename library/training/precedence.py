"""The command line before ``--config_file``, also where two flags answer one question.

A line of the file that stands for the typed flag itself is simply replaced. But a run's length, for example, has two
flags, and ``--max_train_epochs`` goes before ``--max_train_steps``: without more, the file's epochs would beat the steps
that were typed. So a typed flag switches off what the file says under the other name. Where both are typed, or both stand
in the file, nothing is switched off, and the order is sd-scripts'.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from library.settings import as_given, shown

logger = logging.getLogger(__name__)

RIVALS: tuple[tuple[str, ...], ...] = (
    ("max_train_steps", "max_train_epochs"),
    ("sample_every_n_steps", "sample_every_n_epochs"),
    ("save_every_n_epochs", "save_n_epoch_ratio"),
    ("initial_step", "initial_epoch"),
    ("dataset_config", "train_data_dir"),
    ("dataset_config", "in_json"),
    ("optimizer_type", "use_8bit_adam", "use_lion_optimizer"),
    ("lr_scheduler", "lr_scheduler_type"),
    ("network_dim", "dim_from_weights"),
    ("network_train_unet_only", "network_train_text_encoder_only"),
    ("attn_mode", "use_flash_attn", "use_sage_attn", "sdpa", "xformers", "mem_eff_attn"),
    ("nf4_base", "fp8_base"),
    ("nf4_base", "fp8_base_unet"),
    ("nf4_base", "fp8_fast"),
)
"""Flags that answer one question: a typed one switches the file's others off.

Flags that act side by side are no rivals: ``--save_every_n_steps`` and ``--save_every_n_epochs`` both save, and likewise
``--validate_every_n_*``.
"""
ONE_WAY: tuple[tuple[str, str], ...] = (("dim_from_weights", "network_alpha"),)
"""(typed, of the file): the typed one answers the file's question too, while the other way round it does not."""
TURNED_ON_BY: dict[str, str] = {
    "cache_latents": "cache_latents_to_disk",
    "cache_text_encoder_outputs": "cache_text_encoder_outputs_to_disk",
}
"""On/off flag -> the flag of the file that would turn it on in spite of a typed ``=false``."""


class SwitchedOff(NamedTuple):
    """A line of the file that has no effect because of what was typed."""

    typed: str
    typed_value: Any
    name: str
    value: Any


def switched_off(typed: Mapping[str, Any], from_file: Mapping[str, Any]) -> list[SwitchedOff]:
    """Returns the flags of the file whose place a typed flag takes, each once."""
    found: dict[str, SwitchedOff] = {}
    for winner, loser in _pairs(typed):
        if winner in typed and loser in from_file and loser not in typed and loser not in found:
            found[loser] = SwitchedOff(winner, typed[winner], loser, from_file[loser])
    # A value that asks for nothing needs no mention, and changes nothing.
    return [one for one in found.values() if _asks(one.value)]


def _pairs(typed: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (flag that wins where it is typed, flag of the file)."""
    pairs = [(one, other) for names in RIVALS for one in names for other in names if one != other]
    for winner, loser in (*pairs, *ONE_WAY):
        if _asks(typed.get(winner)):
            yield winner, loser
    for winner, loser in TURNED_ON_BY.items():
        if typed.get(winner) is False:
            yield winner, loser


def _asks(value: Any) -> bool:
    """Whether a value asks for something: ``false``, 0 or less and an empty text only turn the flag itself off."""
    return value > 0 if isinstance(value, (int, float)) else bool(value)


def say_what_is_switched_off(lines: tuple[SwitchedOff, ...], path: Path | None) -> None:
    """Names the lines of the file that typed flags took the place of, in one line of the log."""
    if lines:
        parts = [f"{as_given(one.typed, one.typed_value)} replaces {one.name} = {shown(one.value)}" for one in lines]
        logger.info("The command line goes before %s: %s", path, ", ".join(parts))
