"""What a saved LoRA says about itself: sd-scripts' ``ss_*`` entries and the ModelSpec entries.

Two entries differ from sd-scripts on purpose: ``modelspec.prediction_type`` is left out, because ModelSpec has no word
for flow matching and "epsilon" is wrong, and ``modelspec.resolution`` is the resolution that was trained, also when it
stands in the dataset file. Recorded besides: the system prompt, the longest caption, the text encoder's and autoencoder's
names and hashes, the files of ``--base_weights``, and whether the base was quantised (``ss_fp8_fast``, ``ss_nf4_base``).
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import mimetypes
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.data import summary
from library.data.dataset import TrainingData
from library.file_hashes import remembered
from library.files import sha256_of_file
from library.keyed_random import key
from library.training.arguments import TrainConfig

VERSION = "0.1.0"
PROGRAM = "lumina-lora-trainer"
_LARGEST_METADATA = 10_000_000  # characters; a file's header may have 100 MB, and readers load all of it
logger = logging.getLogger(__name__)
_KEPT_WITHOUT_METADATA = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)

# ss_ entry -> value that a run of this program always has: switches of other models and of parts that are not built.
_CONSTANT_ENTRIES: dict[str, Any] = {
    "full_fp16": False,
    "debiased_estimation": False,
    "sd_scripts_commit_hash": "(unknown)",
}
# Flags that have no effect here: written as given, because programs that read metadata expect the entries.
_IGNORED_FLAGS: dict[str, Any] = {
    "v2": False,
    "clip_skip": None,
    "max_token_length": None,
    "lowram": False,
    "noise_offset": None,
    "multires_noise_iterations": None,
    "multires_noise_discount": 0.3,
    "adaptive_noise_scale": None,
    "zero_terminal_snr": False,
    "noise_offset_random_strength": False,
    "min_snr_gamma": None,
}
_FROM_SETTINGS: dict[str, tuple[str, ...]] = {
    "optimizer": ("learning_rate", "unet_lr", "lr_warmup_steps", "lr_scheduler", "max_grad_norm"),
    "schedule": ("gradient_accumulation_steps",),
    "network": ("network_module", "network_dropout", "scale_weight_norms"),
    "memory": ("gradient_checkpointing", "mixed_precision"),
    "quantisation": ("fp8_base", "fp8_base_unet", "fp8_fast", "nf4_base"),
    "output": ("output_name", "training_comment"),
    "data": (
        "cache_latents",
        "caption_dropout_rate",
        "caption_dropout_every_n_epochs",
        "caption_tag_dropout_rate",
        "face_crop_aug_range",
        "prior_loss_weight",
        "resize_interpolation",
        "validation_seed",
        "validation_split",
    ),
    "validation": ("max_validation_steps", "validate_every_n_epochs", "validate_every_n_steps"),
    "model": ("gemma2_max_token_length",),
    "flow": (
        "timestep_sampling",
        "discrete_flow_shift",
        "sigmoid_scale",
        "model_prediction_type",
        "weighting_scheme",
        "logit_mean",
        "logit_std",
        "mode_scale",
        "loss_type",
        "huber_schedule",
        "huber_c",
        "huber_scale",
        "ip_noise_gamma",
        "ip_noise_gamma_random_strength",
    ),
}


class FileHashes:
    """SHA-256 of the models' files and sd-scripts' short hash of the base model, computed while the run goes on."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        """Starts hashing in the background.

        Args:
            files: model -> file: ``sd_model`` for the base model, and others.
        """
        self._files = dict(files)
        self._result: dict[str, str] = {}
        self._errors: list[str] = []
        self._thread = threading.Thread(target=self._run, name="hashes of the models", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for model, path in self._files.items():
            try:
                self._result |= self._of(model, path)
            except OSError as error:
                self._errors.append(f"{path}: {error}")

    @staticmethod
    def _of(model: str, path: Path) -> dict[str, str]:
        # The same file may hold several models; what was hashed once is remembered.
        whole = remembered("sha256", [path], lambda: sha256_of_file(path))
        if model != "sd_model":
            return {f"{model}_hash": whole}
        with path.open("rb") as file:
            file.seek(0x100000)
            short = hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
        return {"sd_model_hash": short, "new_sd_model_hash": whole}

    def result(self) -> dict[str, str]:
        """Returns ``sd_model_hash``, ``new_sd_model_hash`` and the other models' hashes, waiting until they are there.

        A file that could not be read is left out, with a warning: a LoRA without these entries is better than none.
        """
        self._thread.join()
        for error in self._errors:
            logger.warning("A model's hash is left out of the metadata: %s", error)
        self._errors.clear()
        return self._result


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run only once it has been set up."""

    seed: int
    network_dim: int | str
    network_alpha: float | str
    num_steps: int
    num_epochs: int
    num_batches_per_epoch: int
    optimizer: str
    dataset: Mapping[str, Any]  # ss_ entries about pictures and captions, without the prefix
    resolution_px: tuple[int, int]
    of_model: Mapping[str, str | None]  # ss_ entries that the model's family adds
    started_at: float = field(default_factory=time.time)


class RunMetadata:
    """The metadata of every file that a run saves."""

    def __init__(self, config: TrainConfig, facts: RunFacts, hashes: FileHashes | None) -> None:
        """Collects what stays the same during the run.

        Args:
            config: settings.
            facts: what the set-up found.
            hashes: of the models' files; None leaves them out.
        """
        self._config = config
        self._facts = facts
        self._hashes = hashes
        self._thumbnail = thumbnail_url(config.output.metadata_thumbnail)
        self._base = {name: _text(value) for name, value in self._base_entries().items()}
        if sum(map(len, self._base.values())) > _LARGEST_METADATA:
            logger.warning(
                "The counts of tags are left out of the metadata, because they would make its header too large"
            )
            self._base.pop("tag_frequency", None)
            self._base.pop("datasets", None)

    def _base_entries(self) -> dict[str, Any]:
        config, facts = self._config, self._facts
        entries: dict[str, Any] = {
            "session_id": key("session", facts.seed, str(facts.started_at)) % 2**32,
            "training_started_at": facts.started_at,
            "base_model_version": "lumina2",
            "network_dim": facts.network_dim,
            "network_alpha": facts.network_alpha,
            "max_train_steps": facts.num_steps,
            "num_epochs": facts.num_epochs,
            "num_batches_per_epoch": facts.num_batches_per_epoch,
            "optimizer": facts.optimizer,
            "seed": facts.seed,
            "text_encoder_lr": list(config.optimizer.text_encoder_lr) or None,
            **_CONSTANT_ENTRIES,
            **{name: config.given.get(name, default) for name, default in _IGNORED_FLAGS.items()},
            **facts.dataset,
            **facts.of_model,
        }
        for group, names in _FROM_SETTINGS.items():
            entries.update({name: getattr(getattr(config, group), name) for name in names})
        arguments = dict(config.network.arguments())
        if arguments:
            if config.network.network_dropout is not None:
                arguments["dropout"] = str(config.network.network_dropout)
            entries["network_args"] = json.dumps(arguments)
        return entries

    def at(self, step: int, epoch: int) -> dict[str, str]:
        """Returns the entries of a file saved at ``step`` after ``epoch`` finished epochs."""
        entries = {
            **self._base,
            "training_finished_at": str(time.time()),
            "steps": str(step),
            "epoch": str(epoch),
            **(self._hashes.result() if self._hashes is not None else {}),
        }
        prefixed = {f"ss_{name}": value for name, value in entries.items()}
        if self._config.output.no_metadata:
            prefixed = {name: value for name, value in prefixed.items() if name in _KEPT_WITHOUT_METADATA}
        return {**prefixed, **self._modelspec()}

    def _modelspec(self) -> dict[str, str]:
        output = self._config.output
        width, height = self._facts.resolution_px
        entries: dict[str, str | None] = {
            "sai_model_spec": "1.0.1",
            "architecture": "lumina-2/lora",
            "implementation": "https://github.com/Alpha-VLLM/Lumina-Image-2.0",
            "implementation_version": f"{PROGRAM}/{VERSION}",
            "title": output.metadata_title or output.output_name or f"LoRA@{self._facts.started_at}",
            "resolution": f"{width}x{height}",
            "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "author": output.metadata_author,
            "description": output.metadata_description,
            "license": output.metadata_license,
            "tags": output.metadata_tags,
            "usage_hint": output.metadata_usage_hint,
            "thumbnail": self._thumbnail,
            "merged_from": output.metadata_merged_from,
            "trigger_phrase": output.metadata_trigger_phrase,
            "preprocessor": output.metadata_preprocessor,
            "is_negative_embedding": output.metadata_is_negative_embedding,
        }
        low, high = self._config.flow.timestep_range
        if (low, high) != (0, 1000):
            entries["timestep_range"] = f"{low},{high}"
        return {f"modelspec.{name}": value for name, value in entries.items() if value is not None}


def _text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)
    # File names may hold bytes that are no Unicode; a file's header may not.
    return text.encode("utf-8", "replace").decode("utf-8")


def thumbnail_url(thumbnail: str | None) -> str | None:
    """Returns a thumbnail as a ``data:`` URL; a picture file is read and encoded."""
    if thumbnail is None or thumbnail.startswith("data:"):
        return thumbnail
    path = Path(thumbnail)
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def dataset_entries(data: TrainingData, num_processes: int, from_file: bool) -> dict[str, Any]:
    """Returns the entries about pictures and captions, without the ``ss_`` prefix.

    Args:
        data: the pictures that are trained on.
        num_processes: of the run.
        from_file: whether a dataset file described them; if not, its single dataset's entries stand flat.
    """
    datasets = summary.dataset_summaries(data)
    entries: dict[str, Any] = {
        "num_train_images": sum(one["num_train_images"] for one in datasets),
        "num_reg_images": sum(one["num_reg_images"] for one in datasets),
        "num_validation_images": len(data.validation_items),
        # With one dataset it is that dataset's: counting takes a second for 100,000 captions.
        "tag_frequency": datasets[0]["tag_frequency"] if len(datasets) == 1 else summary.tag_frequency(data.items),
        "dataset_dirs": summary.dataset_dirs(data),
    }
    if from_file:
        return {**entries, "datasets": datasets}
    (one,) = datasets
    first = one["subsets"][0]
    in_subset = ("color_aug", "flip_aug", "random_crop", "shuffle_caption", "keep_tokens")
    in_dataset = ("enable_bucket", "bucket_no_upscale", "min_bucket_reso", "max_bucket_reso", "bucket_info")
    return {
        **entries,
        "batch_size_per_device": one["batch_size_per_device"],
        "total_batch_size": one["batch_size_per_device"] * num_processes,
        "resolution": tuple(one["resolution"]),
        "reg_dataset_dirs": summary.dataset_dirs(data, is_reg=True),
        **{name: first[name] for name in in_subset},
        **{name: one[name] for name in in_dataset},
    }
