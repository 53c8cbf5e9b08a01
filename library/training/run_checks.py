"""Flags that contradict each other, and flags that do nothing beside the others: over the whole list, group by group.

A contradiction ends the run before a file is opened. A flag without effect is named in one warning, because front ends
write flags that nobody chose. What the dataset file may say otherwise is not judged here.
"""

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
)
"""(When flags contradict each other, what to say; ``c`` in braces is the :class:`TrainConfig`)."""

_PERIODIC_EPOCHS = "no file is saved after an epoch with --save_state; add it and --save_every_n_epochs"
_PERIODIC_STEPS = "no file is saved after a step with --save_state; add it and --save_every_n_steps"
_METADATA = (
    "metadata_title",
    "metadata_author",
    "metadata_description",
    "metadata_license",
    "metadata_tags",
    "metadata_usage_hint",
    "metadata_thumbnail",
    "metadata_merged_from",
    "metadata_trigger_phrase",
    "metadata_preprocessor",
    "metadata_is_negative_embedding",
    "training_comment",
    "no_metadata",
)


def _in_file(c: TrainConfig) -> bool:
    """Whether a dataset file may say otherwise."""
    return c.data.dataset_config is not None


NEEDS: tuple[tuple[tuple[str, ...], str, Test], ...] = (
    (
        ("system_prompt_on_empty_caption",),
        "there is no --system_prompt",
        lambda c: bool(c.model.system_prompt),
    ),
    (
        ("bucket_no_upscale", "bucket_reso_steps"),
        "there are no buckets without --enable_bucket",
        lambda c: c.data.enable_bucket or _in_file(c),
    ),
    (
        ("min_bucket_reso", "max_bucket_reso"),
        "they limit the buckets of --enable_bucket without --bucket_no_upscale",
        lambda c: (c.data.enable_bucket and not c.data.bucket_no_upscale) or _in_file(c),
    ),
    (
        ("keep_tokens",),
        "no tag is shuffled or dropped",
        lambda c: (
            c.data.shuffle_caption or c.data.caption_tag_dropout_rate > 0 or c.data.token_warmup_step > 0 or _in_file(c)
        ),
    ),
    (
        ("token_warmup_min",),
        "there is no warm-up without --token_warmup_step",
        lambda c: c.data.token_warmup_step > 0 or _in_file(c),
    ),
    (
        ("caption_variants",),
        "captions do not vary; it bounds --shuffle_caption, --enable_wildcard and --caption_tag_dropout_rate",
        lambda c: (
            c.data.shuffle_caption or c.data.enable_wildcard or c.data.caption_tag_dropout_rate > 0 or _in_file(c)
        ),
    ),
    (
        ("prior_loss_weight",),
        "there are no regularisation pictures; add --reg_data_dir",
        lambda c: c.data.reg_data_dir is not None or _in_file(c),
    ),
    (
        ("conditioning_data_dir",),
        "masks act with --masked_loss",
        lambda c: c.data.masked_loss or _in_file(c),
    ),
    (
        ("validation_seed",),
        "no picture is held out; add --validation_split",
        lambda c: c.data.validation_split > 0 or _in_file(c),
    ),
    (
        ("discrete_flow_shift",),
        "this --timestep_sampling has no shift of its own, and no previews are drawn",
        lambda c: c.flow.timestep_sampling in ("shift", "sigma") or c.samples.draws,
    ),
    (
        ("network_weights",),
        "--resume brings the weights of its state",
        lambda c: c.state.resume in (None, "", "latest") or c.network.dim_from_weights,
    ),
    (
        ("save_every_n_epochs",),
        "--save_n_epoch_ratio goes before it",
        lambda c: c.output.save_n_epoch_ratio is None,
    ),
    (
        ("save_last_n_epochs_state",),
        _PERIODIC_EPOCHS,
        lambda c: c.state.save_state and bool(c.output.save_every_n_epochs or c.output.save_n_epoch_ratio),
    ),
    (
        ("save_last_n_steps_state",),
        _PERIODIC_STEPS,
        lambda c: c.state.save_state and bool(c.output.save_every_n_steps),
    ),
    (
        _METADATA,
        "files of --save_model_as ckpt and pt hold no metadata",
        lambda c: c.output.save_model_as == "safetensors",
    ),
    (("training_comment",), "--no_metadata leaves it out", lambda c: not c.output.no_metadata),
    (("initial_epoch",), "--initial_step goes before it", lambda c: c.state.initial_step is None),
    (
        ("sample_every_n_steps",),
        "0 or less draws nothing",
        lambda c: c.samples.sample_every_n_steps is not None,
    ),
    (
        ("sample_every_n_epochs",),
        "0 or less draws nothing",
        lambda c: c.samples.sample_every_n_epochs is not None,
    ),
    (
        ("sample_batch_size", "sample_weights"),
        "no previews are drawn",
        lambda c: c.samples.draws,
    ),
    (
        ("sample_weights",),
        "there is no moving average without --ema_decay",
        lambda c: c.optimizer.ema_decay is not None or not c.samples.draws,
    ),
    (
        ("huggingface_repo_type", "huggingface_path_in_repo", "huggingface_repo_visibility", "async_upload"),
        "nothing is uploaded without --huggingface_repo_id",
        lambda c: bool(c.hub.huggingface_repo_id),
    ),
    (
        ("huggingface_token",),
        "nothing is uploaded without --huggingface_repo_id, nor fetched without --resume_from_huggingface",
        lambda c: bool(c.hub.huggingface_repo_id) or c.hub.resume_from_huggingface,
    ),
)
"""Flags that act only under a condition: (flags, why they would have no effect, the condition)."""


def check_together(config: TrainConfig) -> None:
    """Checks what no group of settings can see alone.

    Raises:
        SettingsError: flags contradict each other; the message names all such places.
    """
    problems = [message.format(c=config) for contradicts, message in CONTRADICTIONS if contradicts(config)]
    if problems:
        raise SettingsError("\n".join(problems))
