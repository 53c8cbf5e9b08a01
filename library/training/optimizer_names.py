"""Names of optimizers and schedulers, and what can be checked of them without importing anything heavy."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any, NamedTuple

from library.errors import SettingsError, nearest

if TYPE_CHECKING:
    from library.training.settings import OptimizerSettings


class OptimizerSource(NamedTuple):
    """Where a built-in optimizer comes from: its module, class, and the package to install."""

    module: str
    class_name: str
    package: str = ""


_BITSANDBYTES = {
    name.lower(): OptimizerSource("bitsandbytes.optim", name, "bitsandbytes")
    for name in (
        "AdamW8bit",
        "PagedAdamW",
        "PagedAdamW8bit",
        "PagedAdamW32bit",
        "Lion8bit",
        "PagedLion8bit",
    )
}

OPTIMIZERS: dict[str, OptimizerSource] = {
    "adamw": OptimizerSource("torch.optim", "AdamW"),
    **_BITSANDBYTES,
    "sgdnesterov": OptimizerSource("torch.optim", "SGD"),
    "sgdnesterov8bit": OptimizerSource("bitsandbytes.optim", "SGD8bit", "bitsandbytes"),
    "lion": OptimizerSource("lion_pytorch", "Lion", "lion-pytorch"),
}
"""Lower-case name -> source. Every other name is a class of torch.optim or a dotted path."""

DEFAULT_ARGUMENTS: dict[str, dict[str, Any]] = {
    "sgdnesterov": {"momentum": 0.9, "nesterov": True},
    "sgdnesterov8bit": {"momentum": 0.9, "nesterov": True},
}

NOT_YET = ("dadapt", "prodigy", "adafactor", "schedulefree")
"""Parts of the names of sd-scripts' optimizers that set their own learning rate, which this version does not drive."""

# torch.optim's classes, so that a misspelt name is refused before torch is imported; a test compares it with torch.
TORCH_OPTIMIZERS = (
    "ASGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "LBFGS",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
    "SparseAdam",
)
_UNUSABLE = {
    "LBFGS": "it evaluates the loss several times a step",
    "SparseAdam": "LoRA's gradients are dense",
    "Muon": "it refuses parameters that are not matrices and learning rates of LoRA's size; use AdamW",
}

SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "piecewise_constant",
)


def parse_literals(flag_name: str, arguments: tuple[str, ...]) -> dict[str, Any]:
    """Returns ``name=value`` arguments with values read as Python literals (numbers, tuples, True, quoted texts).

    Raises:
        SettingsError: an argument has no ``=`` or its value is no literal.
    """
    from library.training.settings import split_arguments

    result = {}
    for name, text in split_arguments(flag_name, arguments).items():
        try:
            result[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            raise SettingsError(
                f"{flag_name}: the value of {name}={text} is no Python literal; put texts in quotes, such as"
                f" {name}=\"'{text}'\""
            ) from error
    return result


def check_optimizer(name: str, arguments: tuple[str, ...]) -> None:
    """Checks an optimizer's name and its arguments' form.

    Raises:
        SettingsError: the name is neither built in, nor a class of torch.optim, nor a dotted path.
    """
    parse_literals("--optimizer_args", arguments)
    if name.lower() in OPTIMIZERS:
        return
    if name in _UNUSABLE:
        raise SettingsError(f"--optimizer_type: {name} cannot train a LoRA: {_UNUSABLE[name]}")
    if any(part in name.rpartition(".")[2].lower() for part in NOT_YET):
        raise SettingsError(
            f"--optimizer_type: {name} sets its own learning rate, which this version does not support; use AdamW or"
            " AdamW8bit"
        )
    if "." not in name and name not in TORCH_OPTIMIZERS:
        known = [source.class_name for source in OPTIMIZERS.values()] + list(TORCH_OPTIMIZERS)
        raise SettingsError(
            f"--optimizer_type: {name!r} is no optimizer{nearest(name, known)}; give a built-in name, a torch.optim class"
            " or a dotted path such as package.module.Class"
        )


def check_scheduler(settings: OptimizerSettings) -> None:
    """Checks the scheduler's name and the arguments that belong to it.

    Raises:
        SettingsError: unknown name, or an argument that the scheduler needs is missing or has no effect.
    """
    arguments = parse_literals("--lr_scheduler_args", settings.lr_scheduler_args)
    if settings.lr_scheduler_type.endswith("ReduceLROnPlateau"):
        raise SettingsError(
            "--lr_scheduler_type ReduceLROnPlateau goes by a validation loss, which this version does not have; use"
            " --lr_scheduler cosine"
        )
    if settings.lr_scheduler_type:
        return
    name = settings.lr_scheduler
    if name == "adafactor" or name == "reduce_lr_on_plateau":
        raise SettingsError(
            f"--lr_scheduler: {name} needs what this version does not give it (Adafactor, or a validation loss); use"
            " constant_with_warmup or cosine"
        )
    if name not in SCHEDULERS:
        raise SettingsError(
            f"--lr_scheduler: {name!r} is no scheduler{nearest(name, SCHEDULERS)}; known are {', '.join(SCHEDULERS)}"
        )
    if name == "constant" and settings.lr_warmup_steps:
        raise SettingsError(
            f"--lr_scheduler constant has no warm-up, so --lr_warmup_steps {settings.lr_warmup_steps} would have no"
            " effect; use constant_with_warmup"
        )
    has_min = settings.lr_scheduler_min_lr_ratio is not None or {"min_lr", "min_lr_rate"} & set(arguments)
    if name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") and not has_min:
        raise SettingsError(f"--lr_scheduler {name} needs a lowest rate; add --lr_scheduler_min_lr_ratio 0.1")
    if name == "piecewise_constant" and "step_rules" not in arguments:
        raise SettingsError(
            "--lr_scheduler piecewise_constant needs its steps; add --lr_scheduler_args \"step_rules='1:100,0.1'\""
        )
