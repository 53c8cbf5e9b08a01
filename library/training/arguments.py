"""The command line and ``--config_file``: both become the frozen settings of a run here, and end here.

Nothing downstream sees an argparse Namespace. The flags come from the settings dataclasses; this module adds only
``--config_file`` and ``--output_config`` themselves, and the table of sd-scripts flags that are ignored or refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from library.command_line import build_parser, read_command_line
from library.data.settings import DataSettings
from library.errors import SettingsError
from library.lumina.settings import FlowSettings, ModelSettings
from library.memory.settings import MemorySettings
from library.settings import FlagSpec, flag, from_given, specs_of
from library.training import optimizer_names
from library.training.config_file import read_config_file, write_config_file
from library.training.legacy_flags import IGNORED, REFUSED
from library.training.output_settings import HubSettings, OutputSettings, StateSettings
from library.training.run_checks import NEEDS, check_together
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
    """All settings of a training run."""

    model: ModelSettings
    data: DataSettings
    network: NetworkSettings
    flow: FlowSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    memory: MemorySettings
    output: OutputSettings
    state: StateSettings
    samples: SampleSettings
    validation: ValidationSettings
    log: LogSettings
    hub: HubSettings
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config_file: Path | None = None
    gui_keys: tuple[str, ...] = ()

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
        rates = {"Next-DiT": optimizer.unet_lr, "Gemma2": (*optimizer.text_encoder_lr, None)[0]}
        trained = {"Next-DiT": self.trains_dit, "Gemma2": self.trains_text_encoder}
        in_use = [optimizer.learning_rate if rates[part] is None else rates[part] for part in rates if trained[part]]
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
    given = read_command_line(parser(), specs, argv)
    config_file = given.pop("config_file", None)
    output_config = given.pop("output_config", False)
    if output_config:
        write_config_file(config_file, without_secrets(given))
        return None
    gui_keys: tuple[str, ...] = ()
    if config_file is not None:
        from_file, gui_keys = read_config_file(config_file, specs)
        given = {**from_file, **given}
    _check_refused(given)
    groups: dict[str, Any] = {field: from_given(settings_class, given) for field, (_, settings_class) in GROUPS.items()}
    return TrainConfig(**groups, given=given, config_file=config_file, gui_keys=gui_keys)


def _check_refused(given: Mapping[str, Any]) -> None:
    # A number that may be left out is written as 0 by front ends: that asks for nothing either.
    refused = [spec for spec in REFUSED if given.get(spec.name, spec.default) not in (spec.default, 0)]
    if refused:
        raise SettingsError("\n".join(f"--{spec.name}: {spec.help}; leave it out" for spec in refused))


def warn_of_ignored(given: Mapping[str, Any]) -> None:
    """Names the given flags that have no effect, with the reasons, in one warning."""
    set_flags = [spec for spec in IGNORED if given.get(spec.name, spec.default) != spec.default]
    if set_flags:
        by_reason: dict[str, list[str]] = {}
        for spec in set_flags:
            by_reason.setdefault(spec.help, []).append(f"--{spec.name}")
        parts = [f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()]
        logger.warning("These flags have no effect here: %s", "; ".join(parts))


_WITH_MIN_LR = ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay")
_SCHEDULE_FLAGS = (
    "lr_scheduler_type",
    "lr_scheduler_args",
    "lr_warmup_steps",
    "lr_decay_steps",
    "lr_scheduler_num_cycles",
    "lr_scheduler_power",
    "lr_scheduler_timescale",
    "lr_scheduler_min_lr_ratio",
)

_NEEDS: tuple[tuple[tuple[str, ...], str, Callable[[TrainConfig], bool]], ...] = (
    (("text_encoder_lr",), "Gemma2 is not trained", lambda c: c.trains_text_encoder),
    (("unet_lr",), "the Next-DiT is not trained", lambda c: c.trains_dit),
    (
        ("huber_c", "huber_schedule", "huber_scale"),
        "--loss_type is neither huber nor smooth_l1",
        lambda c: c.flow.loss_type in ("huber", "smooth_l1"),
    ),
    (
        ("huber_scale",),
        "--huber_schedule snr has a scale of its own",
        lambda c: c.flow.huber_schedule != "snr" or c.flow.loss_type not in ("huber", "smooth_l1"),
    ),
    (
        ("normalize_masked_loss",),
        "no picture has a mask; add --masked_loss or --alpha_mask",
        lambda c: c.data.masked_loss or c.data.alpha_mask or c.data.dataset_config is not None,
    ),
    (
        ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"),
        "no picture is held out; add --validation_split",
        lambda c: c.data.validation_split > 0 or c.data.dataset_config is not None,
    ),
    (
        ("sigmoid_scale",),
        "this --timestep_sampling draws no sigmoid",
        lambda c: c.flow.timestep_sampling in ("sigmoid", "shift", "flux_shift"),
    ),
    (
        ("logit_mean", "logit_std"),
        "--weighting_scheme is not logit_normal",
        lambda c: c.flow.weighting_scheme == "logit_normal",
    ),
    (("mode_scale",), "--weighting_scheme is not mode", lambda c: c.flow.weighting_scheme == "mode"),
    (
        ("save_last_n_epochs",),
        "no file is saved after an epoch without --save_every_n_epochs",
        lambda c: bool(c.output.save_every_n_epochs or c.output.save_n_epoch_ratio),
    ),
    (
        ("save_last_n_steps",),
        "no file is saved after a step without --save_every_n_steps",
        lambda c: bool(c.output.save_every_n_steps),
    ),
    (
        ("save_last_n_epochs_state",),
        "no training state is saved after an epoch without --save_state and --save_every_n_epochs",
        lambda c: c.state.save_state and bool(c.output.save_every_n_epochs or c.output.save_n_epoch_ratio),
    ),
    (
        ("save_last_n_steps_state",),
        "no training state is saved after a step without --save_state and --save_every_n_steps",
        lambda c: c.state.save_state and bool(c.output.save_every_n_steps),
    ),
    (("initial_epoch",), "--initial_step goes before it", lambda c: c.state.initial_step is None),
    (
        ("huggingface_path_in_repo", "huggingface_repo_visibility", "async_upload", "save_state_to_huggingface"),
        "nothing is uploaded without --huggingface_repo_id",
        lambda c: c.hub.huggingface_repo_id is not None,
    ),
    (
        ("save_state_to_huggingface",),
        "no training state is saved; add --save_state",
        lambda c: c.state.save_state or c.state.save_state_on_train_end,
    ),
    (
        ("sample_every_n_steps",),
        "--sample_every_n_epochs goes before it",
        lambda c: not c.samples.sample_every_n_epochs,
    ),
    *(
        ((name,), "a number below 1 draws nothing", lambda c, name=name: c.given.get(name, 1) > 0)
        for name in ("sample_every_n_steps", "sample_every_n_epochs")
    ),
    (
        ("sample_batch_size", "sample_weights"),
        "no previews are drawn; add --sample_prompts",
        lambda c: c.samples.sample_prompts is not None,
    ),
    (
        ("caption_variants",),
        "captions are neither shuffled nor chosen, and no tags are dropped",
        lambda c: (
            c.data.dataset_config is not None
            or c.data.shuffle_caption
            or c.data.enable_wildcard
            or c.data.caption_tag_dropout_rate > 0
        ),
    ),
    (
        ("system_prompt_on_empty_caption",),
        "there is no --system_prompt",
        lambda c: bool(c.model.system_prompt),
    ),
    (
        ("token_warmup_min",),
        "there is no --token_warmup_step",
        lambda c: c.data.dataset_config is not None or c.data.token_warmup_step > 0,
    ),
    (("vae_batch_size",), "latents are not cached", lambda c: c.data.cache_latents),
    (("text_encoder_batch_size",), "captions are not cached", lambda c: c.data.cache_text_encoder_outputs),
    (
        ("cache_dir",),
        "nothing is cached to disk",
        lambda c: (
            c.data.cache_latents_to_disk
            or c.data.cache_text_encoder_outputs_to_disk
            or c.data.cache_info
            or c.data.dataset_config is not None  # which may hold cache_info
        ),
    ),
    (
        ("conditioning_data_dir",),
        "mask pictures are used with --masked_loss alone",
        lambda c: c.data.masked_loss or c.data.dataset_config is not None,
    ),
    (
        ("prior_loss_weight",),
        "there are no regularisation pictures; --reg_data_dir gives some",
        lambda c: c.data.reg_data_dir is not None or c.data.dataset_config is not None,
    ),
    (
        ("validation_seed",),
        "no picture is held out without --validation_split",
        lambda c: bool(c.data.validation_split) or c.data.dataset_config is not None,
    ),
    (
        ("sample_prompts",),
        "nothing says when to draw; add --sample_every_n_epochs, --sample_every_n_steps or --sample_at_first",
        lambda c: bool(c.samples.sample_every_n_epochs or c.samples.sample_every_n_steps or c.samples.sample_at_first),
    ),
    (
        ("lr_warmup_steps", "lr_scheduler_num_cycles", "lr_scheduler_power", "lr_scheduler_min_lr_ratio"),
        "--lr_scheduler_type takes its arguments from --lr_scheduler_args",
        lambda c: not c.optimizer.lr_scheduler_type,
    ),
    (
        ("lr_scheduler", *_SCHEDULE_FLAGS),
        "a schedule-free optimizer follows no schedule; AdamWScheduleFree and SGDScheduleFree warm up by --optimizer_args"
        " warmup_steps=100",
        lambda c: not optimizer_names.is_schedule_free(c.optimizer.resolved_optimizer),
    ),
    (
        _SCHEDULE_FLAGS,
        "Adafactor with relative_step sets its own learning rate",
        lambda c: not optimizer_names.sets_its_own_rate(c.optimizer),
    ),
    (
        ("lr_warmup_steps",),
        "this --lr_scheduler has no warm-up",
        lambda c: bool(c.optimizer.lr_scheduler_type) or c.optimizer.lr_scheduler not in optimizer_names.WITHOUT_WARMUP,
    ),
    (
        ("lr_scheduler_num_cycles",),
        "this --lr_scheduler has no cycles",
        lambda c: bool(c.optimizer.lr_scheduler_type) or c.optimizer.lr_scheduler in optimizer_names.WITH_CYCLES,
    ),
    (
        ("lr_scheduler_power",),
        "--lr_scheduler is not polynomial",
        lambda c: bool(c.optimizer.lr_scheduler_type) or c.optimizer.lr_scheduler == "polynomial",
    ),
    (
        ("lr_scheduler_timescale",),
        "--lr_scheduler is not inverse_sqrt",
        lambda c: c.optimizer.lr_scheduler == "inverse_sqrt",
    ),
    (
        ("lr_decay_steps",),
        "--lr_scheduler is not warmup_stable_decay",
        lambda c: c.optimizer.lr_scheduler == "warmup_stable_decay",
    ),
    (
        ("lr_scheduler_min_lr_ratio",),
        "this --lr_scheduler goes down to its own end",
        lambda c: bool(c.optimizer.lr_scheduler_type) or c.optimizer.lr_scheduler in _WITH_MIN_LR,
    ),
    (
        ("wandb_run_name", "wandb_api_key"),
        "--log_with does not name wandb",
        lambda c: c.log.log_with in ("wandb", "all"),
    ),
    (
        ("log_prefix", "log_tracker_name", "log_tracker_config", "log_config"),
        "there is no tracker; add --logging_dir or --log_with",
        lambda c: c.log.logging_dir is not None or c.log.log_with is not None,
    ),
    (("lr_scheduler",), "--lr_scheduler_type goes before it", lambda c: not c.optimizer.lr_scheduler_type),
    (("no_half_vae",), "--mixed_precision no computes in float32 anyway", lambda c: c.memory.mixed_precision != "no"),
    (("max_train_steps",), "--max_train_epochs goes before it", lambda c: c.schedule.max_train_epochs is None),
    (
        ("network_dim", "network_alpha"),
        "--dim_from_weights takes them from the file",
        lambda c: not c.network.dim_from_weights,
    ),
)
"""Flags that act only under a condition: (flags, why they would have no effect, the condition)."""


def warn_of_unused(config: TrainConfig) -> None:
    """Names the given flags that have no effect beside the others, each with its reason, in one warning.

    A value equal to the default asks for nothing and is not named. Of several reasons the first is given.
    """
    specs = all_specs()
    parts = []
    named: set[str] = set()
    for names, reason, acts in (*_NEEDS, *NEEDS):
        given = [
            name
            for name in names
            if name not in named and config.given.get(name, specs[name].default) != specs[name].default
        ]
        if given and not acts(config):
            named |= set(given)
            parts.append(f"{', '.join(f'--{name}' for name in given)} ({reason})")
    if parts:
        logger.warning("These flags have no effect in this run: %s", "; ".join(parts))


def without_secrets(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the given flags that may be written to files and shown."""
    specs = all_specs()
    return {name: value for name, value in given.items() if not specs[name].secret}
