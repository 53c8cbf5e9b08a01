"""Flags of different groups that contradict each other: the run ends before a file is opened."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from library.errors import SettingsError

if TYPE_CHECKING:
    from library.training.arguments import TrainConfig

Test = Callable[["TrainConfig"], bool]

CONTRADICTIONS: tuple[tuple[Test, str], ...] = (
    (
        lambda c: (
            c.data.masked_loss and not (c.data.dataset_config or c.data.conditioning_data_dir or c.data.alpha_mask)
        ),
        "--masked_loss has no masks to weigh the loss with; add --conditioning_data_dir or --alpha_mask, or name"
        " conditioning_data_dir in a --dataset_config",
    ),
    (
        lambda c: c.hub.resume_from_huggingface and not c.state.resume,
        "--resume_from_huggingface says where --resume is looked for, and --resume is missing; add --resume"
        " owner/name/folder",
    ),
    (
        lambda c: c.hub.resume_from_huggingface and c.state.resume == "latest",
        "--resume latest looks into --output_dir, and --resume_from_huggingface onto the hub; name the state as"
        " owner/name/folder, or leave --resume_from_huggingface out",
    ),
    (
        lambda c: c.hub.save_state_to_huggingface and not c.hub.huggingface_repo_id,
        "--save_state_to_huggingface has nowhere to upload to; add --huggingface_repo_id owner/name",
    ),
    (
        lambda c: c.hub.save_state_to_huggingface and not (c.state.save_state or c.state.save_state_on_train_end),
        "--save_state_to_huggingface uploads training states, and none is written; add --save_state or"
        " --save_state_on_train_end",
    ),
    (
        lambda c: (
            c.state.initial_step is None
            and c.schedule.max_train_epochs is not None
            and (c.state.initial_epoch or 0) > c.schedule.max_train_epochs
        ),
        "--initial_epoch {c.state.initial_epoch} lies behind --max_train_epochs {c.schedule.max_train_epochs}, so nothing is"
        " left to train; raise --max_train_epochs",
    ),
    (
        lambda c: c.schedule.max_train_epochs is None and (c.state.initial_step or 0) >= c.schedule.max_train_steps,
        "--initial_step {c.state.initial_step} reaches --max_train_steps {c.schedule.max_train_steps}, so nothing is left to"
        " train; raise --max_train_steps",
    ),
    (
        lambda c: c.data.dataset_config is None and c.data.validation_split == 1,
        "--validation_split 1 holds every picture out, so nothing is left to train on; give a share below 1",
    ),
    (
        lambda c: c.attention.mode == "sage",
        "{c.attention.given_as}: SageAttention has no gradients, so attention would not be trained; leave it out here and"
        " draw with it",
    ),
    (
        lambda c: c.quantisation.fp8_fast and c.memory.mixed_precision != "bf16",
        "--fp8_fast multiplies in fp8 and gives bf16, and --mixed_precision is {c.memory.mixed_precision}; add"
        " --mixed_precision bf16, or leave --fp8_fast out",
    ),
)
"""(When flags contradict each other, what to say; ``c`` in braces is the :class:`TrainConfig`)."""


def check_together(config: TrainConfig) -> None:
    """Checks what no group of settings can see alone.

    Raises:
        SettingsError: flags contradict each other; the message names all such places.
    """
    problems = [message.format(c=config) for contradicts, message in CONTRADICTIONS if contradicts(config)]
    if problems:
        raise SettingsError("\n".join(problems))
