"""Settings of a run: how long, which optimizer, which network, what is saved, drawn and logged.

Nothing heavy is imported here: these dataclasses are read to answer ``--help``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from library.errors import SettingsError
from library.settings import flag, require, require_positive
from library.training import optimizer_names

_LARGEST_DIM = 16384  # above the width of every layer of either model
_LONGEST_WAIT_MIN = 525_600  # a year


def _parse_steps_or_ratio(value: Any) -> int | float:
    """Returns a number of steps (int), or a share of all steps (float below 1) from ``100``, ``0.1`` or ``10%``."""
    text = str(value).strip()
    if text.endswith("%"):
        ratio = float(text[:-1]) / 100
        if not 0 <= ratio <= 1:
            raise ValueError("a percentage from 0% to 100% is expected")
        return ratio
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is expected")
    if number < 0 or (number >= 1 and not number.is_integer()):
        raise ValueError(
            "a whole number of steps, a share below 1 such as 0.1, or a percentage such as 10% is expected"
        )
    return int(number) if number.is_integer() else number


@dataclass(frozen=True)
class ScheduleSettings:
    """How long the run is and what its randomness starts from."""

    max_train_steps: int = flag(1600, "optimizer steps")
    max_train_epochs: int | None = flag(None, "passes over the pictures; overrides --max_train_steps")
    gradient_accumulation_steps: int = flag(1, "batches whose gradients are added up for one optimizer step")
    seed: int | None = flag(None, "start of every random draw; drawn and logged when left out")
    ddp_timeout: int | None = flag(None, "minutes that one process waits for the others")

    def __post_init__(self) -> None:
        require_positive(self, "max_train_steps", "max_train_epochs", "gradient_accumulation_steps", "ddp_timeout")
        require(
            self.ddp_timeout is None or self.ddp_timeout <= _LONGEST_WAIT_MIN,
            f"--ddp_timeout: {self.ddp_timeout} minutes are more than a year; give {_LONGEST_WAIT_MIN} or less",
        )
        require(self.seed is None or 0 <= self.seed < 2**32, f"--seed: {self.seed} is outside 0 to 2^32-1")


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer, learning rates and their schedule."""

    optimizer_type: str = flag(
        "", "AdamW (default), AdamW8bit, another built-in name, a torch.optim class, a dotted path"
    )
    optimizer_args: tuple[str, ...] = flag((), 'further arguments as name=value, such as "weight_decay=0.01"')
    use_8bit_adam: bool = flag(False, "old spelling of --optimizer_type AdamW8bit")
    use_lion_optimizer: bool = flag(False, "old spelling of --optimizer_type Lion")
    learning_rate: float = flag(2e-6, "learning rate")
    unet_lr: float | None = flag(None, "learning rate of the Next-DiT LoRA, instead of --learning_rate")
    text_encoder_lr: tuple[float, ...] = flag((), "learning rate of the Gemma2 LoRA, instead of --learning_rate")
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this norm; 0 turns that off")
    ema_decay: float | None = flag(
        None, "also keep a moving average of the LoRA with this decay, such as 0.999, saved beside it as ...-ema"
    )
    lr_scheduler: str = flag("constant", f"one of {', '.join(optimizer_names.SCHEDULERS)}")
    lr_scheduler_type: str = flag("", "scheduler class instead: a torch.optim.lr_scheduler name or a dotted path")
    lr_scheduler_args: tuple[str, ...] = flag((), "further scheduler arguments as name=value")
    lr_warmup_steps: int | float = flag(
        0, "warm-up: steps, a share below 1, or a percentage of all steps", parse=_parse_steps_or_ratio
    )
    lr_decay_steps: int | float = flag(
        0, "decay (warmup_stable_decay): steps, a share, or a percentage", parse=_parse_steps_or_ratio
    )
    lr_scheduler_num_cycles: int = flag(
        1, "restarts of cosine_with_restarts; falls from top to bottom of cosine_with_min_lr and warmup_stable_decay"
    )
    lr_scheduler_power: float = flag(1.0, "power of polynomial")
    lr_scheduler_timescale: int | None = flag(None, "time scale of inverse_sqrt; the warm-up steps when left out")
    lr_scheduler_min_lr_ratio: float | None = flag(None, "lowest rate as a share (cosine_with_min_lr and others)")

    def __post_init__(self) -> None:
        legacy = [name for name in ("use_8bit_adam", "use_lion_optimizer") if getattr(self, name)]
        require(
            not legacy or not self.optimizer_type,
            f"--{legacy[0] if legacy else ''} and --optimizer_type both name an optimizer; keep --optimizer_type",
        )
        require(len(legacy) < 2, "--use_8bit_adam and --use_lion_optimizer exclude each other; keep one")
        optimizer_names.check_optimizer(self)
        optimizer_names.check_scheduler(self)
        for name in ("learning_rate", "unet_lr", "max_grad_norm"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"--{name}: {value} is below 0")
        require(all(rate >= 0 for rate in self.text_encoder_lr), "--text_encoder_lr: a rate is below 0")
        lowest = self.lr_scheduler_min_lr_ratio
        require(lowest is None or 0 <= lowest <= 1, f"--lr_scheduler_min_lr_ratio: {lowest} is outside 0 to 1")
        require(
            self.lr_scheduler_power >= 0,
            f"--lr_scheduler_power: {self.lr_scheduler_power} is below 0, with which the rate would rise without end; give"
            " 1 or more",
        )
        require_positive(self, "lr_scheduler_num_cycles", "lr_scheduler_timescale")
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1, f"--ema_decay: {self.ema_decay} is not between 0 and 1"
        )

    @property
    def resolved_optimizer(self) -> str:
        """The optimizer's name with the old spellings resolved."""
        if self.use_8bit_adam:
            return "AdamW8bit"
        return "Lion" if self.use_lion_optimizer else self.optimizer_type or "AdamW"


@dataclass(frozen=True)
class NetworkSettings:
    """Which network is trained, and on which parts."""

    network_module: str | None = flag(None, "Python module of the network: networks.lora_lumina, or lycoris.kohya")
    network_dim: int | None = flag(None, "rank of the LoRA; 4 when left out")
    network_alpha: float = flag(1.0, "LoRA strength is alpha / rank; 0 means alpha = rank")
    network_dropout: float | None = flag(None, "share of rank activations dropped in training")
    network_args: tuple[str, ...] = flag((), 'further network arguments as name=value, such as "attn_dim=16"')
    network_weights: Path | None = flag(None, "LoRA file to start from")
    dim_from_weights: bool = flag(False, "take ranks and alphas from --network_weights")
    network_train_unet_only: bool = flag(False, "train no Gemma2 LoRA")
    network_train_text_encoder_only: bool = flag(False, "train the Gemma2 LoRA only")
    base_weights: tuple[Path, ...] = flag((), "LoRA files that are merged into the base model before training")
    base_weights_multiplier: tuple[float, ...] = flag((), "strength of each of --base_weights; 1 where left out")
    scale_weight_norms: float | None = flag(None, "largest norm of a module's LoRA weight; larger ones are scaled down")

    def __post_init__(self) -> None:
        require(
            not (self.network_train_unet_only and self.network_train_text_encoder_only),
            "--network_train_unet_only and --network_train_text_encoder_only leave nothing to train; keep one",
        )
        require_positive(self, "network_dim", "scale_weight_norms")
        require(
            self.network_dim is None or self.network_dim <= _LARGEST_DIM,
            f"--network_dim: {self.network_dim} is far more than the widths of the model's layers; give {_LARGEST_DIM} or"
            " less, mostly 8 to 128",
        )
        require(self.network_alpha >= 0, f"--network_alpha: {self.network_alpha} is below 0")
        require(
            self.network_dropout is None or 0 <= self.network_dropout < 1,
            f"--network_dropout: {self.network_dropout} is outside 0 to 1",
        )
        require(
            not self.dim_from_weights or self.network_weights is not None,
            "--dim_from_weights takes the ranks from --network_weights, which is missing; add it",
        )
        require(
            self.network_weights is None or self.network_weights.is_file(),
            f"--network_weights: {self.network_weights} is no file; give a LoRA file",
        )
        for file in self.base_weights:
            require(file.is_file(), f"--base_weights: {file} is no file; give LoRA files")
        require(
            len(self.base_weights_multiplier) <= len(self.base_weights),
            f"--base_weights_multiplier: {len(self.base_weights_multiplier)} values for {len(self.base_weights)} files of"
            " --base_weights; leave some out",
        )
        self.arguments()

    def arguments(self) -> dict[str, str]:
        """Returns ``--network_args`` as a dictionary of texts."""
        return split_arguments("--network_args", self.network_args)


def split_arguments(flag_name: str, arguments: tuple[str, ...]) -> dict[str, str]:
    """Returns ``name=value`` arguments as a dictionary.

    Raises:
        SettingsError: one has no ``=``, or a name comes twice.
    """
    result: dict[str, str] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or not name.strip():
            raise SettingsError(f"{flag_name}: {argument!r} is not of the form name=value")
        if name.strip() in result:
            raise SettingsError(f"{flag_name}: {name.strip()} is given twice; keep one")
        result[name.strip()] = value.strip()
    return result


@dataclass(frozen=True)
class SampleSettings:
    """Pictures drawn while training."""

    sample_prompts: Path | None = flag(None, "prompts to draw while training: .txt, .toml or .json file")
    sample_every_n_steps: int | None = flag(None, "draw after every N steps; 0 or less: never")
    sample_every_n_epochs: int | None = flag(
        None, "draw after every N epochs; overrides --sample_every_n_steps; 0 or less: never"
    )
    sample_at_first: bool = flag(False, "draw before training too")
    sample_batch_size: int | None = flag(None, "prompts of one size drawn at a time; --train_batch_size when left out")
    sample_weights: Literal["raw", "ema"] | None = flag(
        None, "draw with the LoRA as it is, or with its moving average; ema where --ema_decay is given"
    )

    def __post_init__(self) -> None:
        for name in ("sample_every_n_steps", "sample_every_n_epochs"):
            if (getattr(self, name) or 0) <= 0:
                object.__setattr__(self, name, None)  # as in sd-scripts, 0 or less turns it off
        for name in ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first"):
            require(
                self.sample_prompts is not None or not getattr(self, name),
                f"--{name} draws the prompts of --sample_prompts, which is missing; add a prompt file",
            )
        require(
            self.sample_prompts is None or self.sample_prompts.is_file(),
            f"--sample_prompts: {self.sample_prompts} is no file; give a .txt, .toml or .json file",
        )
        require_positive(self, "sample_batch_size")

    @property
    def draws(self) -> bool:
        """Whether anything says when to draw."""
        return bool(self.sample_every_n_steps or self.sample_every_n_epochs or self.sample_at_first)


@dataclass(frozen=True)
class ValidationSettings:
    """When the loss on pictures that are held out (``--validation_split``) is measured."""

    validate_every_n_steps: int | None = flag(None, "measure the validation loss after every N steps")
    validate_every_n_epochs: int | None = flag(
        None, "measure it after every N epochs; 1 when neither flag is given and pictures are held out"
    )
    max_validation_steps: int | None = flag(None, "measure on this many batches at most, always the same ones")

    def __post_init__(self) -> None:
        require_positive(self, "validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps")


@dataclass(frozen=True)
class LogSettings:
    """Where the run reports."""

    logging_dir: Path | None = flag(None, "folder for TensorBoard logs; turns TensorBoard on")
    log_with: Literal["tensorboard", "wandb", "all"] | None = flag(None, "tensorboard, wandb, or all")
    log_prefix: str | None = flag(None, "begin of the name of the run's log folder")
    log_tracker_name: str | None = flag(None, "project name in the tracker; network_train when left out")
    log_tracker_config: Path | None = flag(None, "TOML file with further arguments of the tracker's start")
    wandb_run_name: str | None = flag(None, "name of the run in wandb")
    wandb_api_key: str | None = flag(None, "key for wandb's login", secret=True)
    log_config: bool = flag(False, "store the settings of the run in the tracker")
    console_log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] | None = flag(
        None, "least level shown; INFO when left out"
    )
    console_log_file: Path | None = flag(None, "write the log to this file instead of the screen")
    console_log_simple: bool = flag(False, "plain log lines without time")

    def __post_init__(self) -> None:
        require(
            self.log_with not in ("tensorboard", "all") or self.logging_dir is not None,
            f"--log_with {self.log_with} needs a folder for TensorBoard's files; add --logging_dir",
        )
        require(
            self.log_tracker_config is None or self.log_tracker_config.is_file(),
            f"--log_tracker_config: {self.log_tracker_config} is no file",
        )
