"""Flags that do nothing beside the others of a run, and flags that do nothing here at all: each kind named in one warning.

Front ends write flags that nobody chose, so this is no reason to end a run. Where the dataset file says otherwise, it is
judged there (``library/data/overridden.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from library.training import optimizer_names
from library.training.legacy_flags import IGNORED

if TYPE_CHECKING:
    from library.settings import FlagSpec
    from library.training.arguments import TrainConfig

logger = logging.getLogger(__name__)

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


CONDITIONS: tuple[tuple[tuple[str, ...], str, Callable[[TrainConfig], bool]], ...] = (
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
        ("sample_every_n_steps",),
        "--sample_every_n_epochs goes before it",
        lambda c: not (c.samples.sample_every_n_epochs and c.samples.sample_every_n_steps),
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
        lambda c: c.samples.draws or any(c.given.get(f"sample_every_n_{unit}", 1) <= 0 for unit in ("steps", "epochs")),
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
    (("dynamo_backend",), "nothing is compiled without --torch_compile", lambda c: c.memory.torch_compile),
    (
        ("gradient_checkpointing_level",),
        "nothing is computed again without --gradient_checkpointing",
        lambda c: c.memory.gradient_checkpointing or c.memory.vram_gb is not None,
    ),
    (("lr_scheduler",), "--lr_scheduler_type goes before it", lambda c: not c.optimizer.lr_scheduler_type),
    (
        ("no_half_vae",),
        "without --mixed_precision bf16 the autoencoder computes in float32 anyway",
        lambda c: c.memory.mixed_precision == "bf16",
    ),
    (("max_train_steps",), "--max_train_epochs goes before it", lambda c: c.schedule.max_train_epochs is None),
    (
        ("network_dim", "network_alpha"),
        "--dim_from_weights takes them from the file",
        lambda c: not c.network.dim_from_weights,
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
        _METADATA,
        "files of --save_model_as ckpt and pt hold no metadata",
        lambda c: c.output.save_model_as == "safetensors",
    ),
    (("training_comment",), "--no_metadata leaves it out", lambda c: not c.output.no_metadata),
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


def warn_of_ignored(given: Mapping[str, Any]) -> None:
    """Names the given flags that have no effect, with the reasons, in one warning."""
    set_flags = [spec for spec in IGNORED if given.get(spec.name, spec.default) != spec.default]
    if set_flags:
        by_reason: dict[str, list[str]] = {}
        for spec in set_flags:
            by_reason.setdefault(spec.help, []).append(f"--{spec.name}")
        parts = [f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()]
        logger.warning("These flags have no effect here: %s", "; ".join(parts))


def warn_of_unused(config: TrainConfig, specs: Mapping[str, FlagSpec]) -> None:
    """Names the given flags that have no effect beside the others, each with its reason, in one warning.

    A value equal to the default asks for nothing and is not named. Of several reasons the first is given.

    Args:
        config: the run's settings.
        specs: every flag by name.
    """
    parts = []
    named: set[str] = set()
    for names, reason, acts in CONDITIONS:
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
