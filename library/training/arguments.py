"""The command line and ``--config_file``: both become the frozen settings of a run here, and end here.

Nothing downstream sees an argparse Namespace. The flags come from the settings dataclasses; this module adds only
``--config_file`` and ``--output_config`` themselves, and the table of sd-scripts flags that are ignored or refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from library.command_line import build_parser, read_command_line
from library.data.settings import DataSettings
from library.errors import SettingsError
from library.lumina.settings import FlowSettings, ModelSettings
from library.memory.settings import AttentionSettings, MemorySettings, QuantisationSettings
from library.settings import FlagSpec, flag, from_given, specs_of
from library.training import optimizer_names
from library.training.config_file import read_config_file, write_config_file
from library.training.legacy_flags import IGNORED, REFUSED
from library.training.output_settings import HubSettings, OutputSettings, StateSettings
from library.training.precedence import SwitchedOff, switched_off
from library.training.run_checks import check_together
from library.training.settings import (
    LogSettings,
    NetworkSettings,
    OptimizerSettings,
    SampleSettings,
    ScheduleSettings,
    ValidationSettings,
)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ConfigFileSettings:
    """Flags kept in a file."""

    config_file: Path | None = flag(None, "TOML file with flags; those on the command line win")
    output_config: bool = flag(False, "write the given flags to --config_file and end")


GROUPS: dict[str, tuple[str, type]] = {
    "model": ("models", ModelSettings),
    "data": ("pictures and captions", DataSettings),
    "network": ("network", NetworkSettings),
    "flow": ("noise levels and loss", FlowSettings),
    "optimizer": ("optimizer", OptimizerSettings),
    "schedule": ("length and seed", ScheduleSettings),
    "memory": ("precision and memory", MemorySettings),
    "attention": ("attention", AttentionSettings),
    "quantisation": ("quantised base weights", QuantisationSettings),
    "output": ("saving", OutputSettings),
    "state": ("continuing a run", StateSettings),
    "samples": ("previews", SampleSettings),
    "validation": ("validation", ValidationSettings),
    "log": ("logging", LogSettings),
    "hub": ("upload", HubSettings),
}
"""Field of :class:`TrainConfig` -> (title in ``--help``, settings class)."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """All settings of a training run.

    Attributes:
        given: the values that the user gave, on the command line or in ``--config_file``, by flag.
        typed: the flags that stood on the command line.
        config_file: where the others are from.
        gui_keys: keys of graphical front ends in that file.
        switched_off: lines of that file whose place typed flags took; not in ``given``.
    """

    model: ModelSettings
    data: DataSettings
    network: NetworkSettings
    flow: FlowSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    memory: MemorySettings
    attention: AttentionSettings
    quantisation: QuantisationSettings
    output: OutputSettings
    state: StateSettings
    samples: SampleSettings
    validation: ValidationSettings
    log: LogSettings
    hub: HubSettings
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    typed: frozenset[str] = frozenset()
    config_file: Path | None = None
    gui_keys: tuple[str, ...] = ()
    switched_off: tuple[SwitchedOff, ...] = ()

    def __post_init__(self) -> None:
        if self.model.pretrained_model_name_or_path is None:
            raise SettingsError(
                "--pretrained_model_name_or_path is missing: there is no model to train; give the Lumina Image 2.0 file"
                " or folder"
            )
        if self.data.dataset_config is None and self.data.train_data_dir is None and self.data.in_json is None:
            raise SettingsError("there are no pictures to train on; give --dataset_config or --train_data_dir")
        if self.network.network_module is None:
            raise SettingsError("--network_module is missing; give --network_module networks.lora_lumina")
        if self.network.network_train_text_encoder_only and self.data.cache_text_encoder_outputs:
            raise SettingsError(
                "--cache_text_encoder_outputs freezes Gemma2, and --network_train_text_encoder_only trains nothing else;"
                " leave one of them out"
            )
        if self.samples.sample_weights == "ema" and self.optimizer.ema_decay is None:
            raise SettingsError("--sample_weights ema: there is no moving average to draw with; add --ema_decay=0.999")
        optimizer = self.optimizer
        in_use = [optimizer.learning_rate if rate is None else rate for rate in self.own_rates.values()]
        if not any(in_use):
            raise SettingsError(
                "--learning_rate, --unet_lr and --text_encoder_lr leave every trained part at 0; nothing would be"
                " learned; raise one of them"
            )
        optimizer_names.check_rates(optimizer, in_use, self.network.arguments())
        check_together(self)

    @property
    def trains_dit(self) -> bool:
        """Whether the Next-DiT gets a LoRA."""
        return not self.network.network_train_text_encoder_only

    @property
    def own_rates(self) -> dict[str, float | None]:
        """The trained parts' own learning rates; None where ``--learning_rate`` is a part's rate."""
        optimizer = self.optimizer
        rates = {"Next-DiT": optimizer.unet_lr, "Gemma2": (*optimizer.text_encoder_lr, None)[0]}
        trained = {"Next-DiT": self.trains_dit, "Gemma2": self.trains_text_encoder}
        return {part: rate for part, rate in rates.items() if trained[part]}

    @property
    def draws_averaged(self) -> bool:
        """Whether previews are drawn with the moving average of the trained weights."""
        return self.optimizer.ema_decay is not None and self.samples.sample_weights != "raw"

    @property
    def trains_text_encoder(self) -> bool:
        """Whether Gemma2 gets a LoRA; cached text features freeze it."""
        return not (self.network.network_train_unet_only or self.data.cache_text_encoder_outputs)


def all_specs() -> dict[str, FlagSpec]:
    """Returns every flag that the command line knows, by name."""
    classes = [ConfigFileSettings, *(cls for _, cls in GROUPS.values())]
    specs = [spec for cls in classes for spec in specs_of(cls)]
    return {spec.name: spec for spec in (*specs, *IGNORED, *REFUSED)}


def parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    groups = [("flags in a file", ConfigFileSettings), *GROUPS.values()]
    return build_parser(
        "Trains a LoRA for Lumina Image 2.0.",
        [(title, specs_of(settings_class)) for title, settings_class in groups],
        hidden=(*IGNORED, *REFUSED),
        epilog="On/off flags may be turned off with =false. Flags of sd-scripts that have no meaning here are accepted and"
        " named in one warning; see docs/lumina_train_network.md.",
    )


def parse_arguments(argv: Sequence[str] | None = None) -> TrainConfig | None:
    """Returns the settings of the run from the command line and ``--config_file``.

    Returns None after ``--output_config`` has written its file.

    Raises:
        SettingsError: a flag is unknown, has a wrong value, or contradicts another.
    """
    specs = all_specs()
    typed = read_command_line(parser(), specs, argv)
    config_file = typed.pop("config_file", None)
    output_config = typed.pop("output_config", False)
    if output_config:
        write_config_file(config_file, without_secrets(typed))
        return None
    from_file: dict[str, Any] = {}
    gui_keys: tuple[str, ...] = ()
    if config_file is not None:
        from_file, gui_keys = read_config_file(config_file, specs)
    replaced = tuple(switched_off(typed, from_file))
    given = {**from_file, **typed}
    for line in replaced:
        del given[line.name]
    _check_refused(given)
    groups: dict[str, Any] = {field: from_given(settings_class, given) for field, (_, settings_class) in GROUPS.items()}
    return TrainConfig(
        **groups,
        given=given,
        typed=frozenset(typed),
        config_file=config_file,
        gui_keys=gui_keys,
        switched_off=replaced,
    )


def _check_refused(given: Mapping[str, Any]) -> None:
    # A number that may be left out is written as 0 by front ends: that asks for nothing either.
    refused = [spec for spec in REFUSED if given.get(spec.name, spec.default) not in (spec.default, 0)]
    if refused:
        raise SettingsError("\n".join(f"--{spec.name}: {spec.help}; leave it out" for spec in refused))


def without_secrets(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the given flags that may be written to files and shown."""
    specs = all_specs()
    return {name: value for name, value in given.items() if not specs[name].secret}
