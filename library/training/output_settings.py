"""Settings of what a run leaves behind: LoRA files and what they say of themselves, training states, uploads.

Nothing heavy is imported here: these dataclasses are read to answer ``--help``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from library.errors import SettingsError
from library.settings import flag, require, require_positive

_LONGEST_NAME_BYTES = 200  # file systems take 255, and steps, dates and endings come behind it
_LARGEST_THUMBNAIL_BYTES = 4 * 2**20


_ENDINGS = (".safetensors", ".ckpt", ".pt")


def without_ending(name: str) -> str:
    """Returns a file's name without the endings of LoRA files, which are added to it."""
    while name.lower().endswith(_ENDINGS):
        name = name[: name.rindex(".")]
    return name


@dataclass(frozen=True)
class OutputSettings:
    """What is saved when, and what the file says about itself."""

    output_dir: Path | None = flag(None, "folder for the LoRA files, made if missing")
    output_name: str | None = flag(None, "file name without extension")
    save_model_as: Literal["ckpt", "pt", "safetensors"] = flag(
        "safetensors", "file format; ckpt and pt hold no metadata"
    )
    save_precision: Literal["float", "fp16", "bf16"] | None = flag(
        None, "precision of the saved file; that of the trained LoRA (float32) when left out"
    )
    save_every_n_epochs: int | None = flag(None, "save after every N epochs")
    save_every_n_steps: int | None = flag(None, "save after every N steps")
    save_n_epoch_ratio: int | None = flag(None, "save about N times in the run, instead of --save_every_n_epochs")
    save_last_n_epochs: int | None = flag(None, "keep the files of the last N epochs only")
    save_last_n_steps: int | None = flag(None, "keep the files of the last N steps only")
    no_metadata: bool = flag(False, "write only what programs need to load the file")
    training_comment: str | None = flag(None, "comment stored in the file")
    metadata_title: str | None = flag(None, "title stored in the file; --output_name when left out")
    metadata_author: str | None = flag(None, "author stored in the file")
    metadata_description: str | None = flag(None, "description stored in the file")
    metadata_license: str | None = flag(None, "license stored in the file")
    metadata_tags: str | None = flag(None, "tags stored in the file, comma-separated")
    metadata_usage_hint: str | None = flag(None, "usage hint stored in the file")
    metadata_thumbnail: str | None = flag(None, "thumbnail stored in the file: a picture file or a data: URL")
    metadata_merged_from: str | None = flag(None, "source models stored in the file")
    metadata_trigger_phrase: str | None = flag(None, "trigger phrase stored in the file")
    metadata_preprocessor: str | None = flag(None, "preprocessor stored in the file")
    metadata_is_negative_embedding: str | None = flag(None, "whether it is a negative embedding, stored in the file")

    def __post_init__(self) -> None:
        require(self.output_dir is not None, "--output_dir is missing: the LoRA has nowhere to go; give a folder")
        if self.output_dir is not None and self.output_dir.exists() and not self.output_dir.is_dir():
            raise SettingsError(f"--output_dir: {self.output_dir} is a file; give a folder")
        require_positive(
            self,
            "save_every_n_epochs",
            "save_every_n_steps",
            "save_n_epoch_ratio",
            "save_last_n_epochs",
            "save_last_n_steps",
        )
        if self.output_name is not None:
            object.__setattr__(self, "output_name", without_ending(self.output_name))
        name = self.output_name or ""
        require(
            len(name.encode("utf-8", "replace")) <= _LONGEST_NAME_BYTES and name.isprintable(),
            f"--output_name: {name[:50]!r} ... is too long, or holds characters that no file name should hold",
        )
        require(
            self.output_name is None or bool(name.strip(" .")),
            f"--output_name: {name!r} is no name for a file; give one such as my_lora",
        )
        thumbnail = self.metadata_thumbnail
        require(
            thumbnail is None or thumbnail.startswith("data:") or Path(thumbnail).is_file(),
            f"--metadata_thumbnail: {thumbnail} is no file; give a picture file or a data: URL",
        )
        is_file = thumbnail is not None and not thumbnail.startswith("data:")
        require(
            not is_file or Path(str(thumbnail)).stat().st_size <= _LARGEST_THUMBNAIL_BYTES,
            f"--metadata_thumbnail: {thumbnail} is larger than {_LARGEST_THUMBNAIL_BYTES >> 20} MiB; give a smaller picture",
        )
        require(
            self.output_name is None or not set(self.output_name) & set('/\\:*?"<>|'),
            f"--output_name: {self.output_name!r} holds a character that no file name may hold; put folders"
            " into --output_dir",
        )

    def epochs_between_files(self, num_epochs: int) -> int | None:
        """Returns after how many epochs a file is saved in a run of this many; None: after none but the last."""
        ratio = self.save_n_epoch_ratio
        return max(1, num_epochs // ratio) if ratio else self.save_every_n_epochs


@dataclass(frozen=True)
class StateSettings:
    """Training states: what a run needs to be continued exactly."""

    save_state: bool = flag(False, "write a training state with every saved file, so that the run can be continued")
    save_state_on_train_end: bool = flag(False, "write a training state at the end of the run")
    save_last_n_epochs_state: int | None = flag(
        None, "keep the states of the last N epochs only; --save_last_n_epochs when left out"
    )
    save_last_n_steps_state: int | None = flag(
        None, "keep the states of the last N steps only; --save_last_n_steps when left out"
    )
    resume: str | None = flag(None, "training state to continue: its folder, or latest for the newest in --output_dir")
    initial_epoch: int | None = flag(None, "start in this epoch, counted from 1, instead of where the state ended")
    initial_step: int | None = flag(None, "start after this many optimizer steps, instead of where the state ended")
    skip_until_initial_step: bool = flag(
        False, "accepted: a run that starts later always continues with the pictures that come then"
    )

    def __post_init__(self) -> None:
        require_positive(self, "save_last_n_epochs_state", "save_last_n_steps_state", "initial_epoch")
        require(self.initial_step is None or self.initial_step >= 0, f"--initial_step: {self.initial_step} is below 0")

    def first_step(self, steps_per_epoch: int) -> int | None:
        """Returns the step that the flags ask to start after; ``--initial_step`` goes before ``--initial_epoch``."""
        if self.initial_step is None and self.initial_epoch is not None:
            return (self.initial_epoch - 1) * steps_per_epoch
        return self.initial_step


@dataclass(frozen=True)
class HubSettings:
    """Uploading to the Hugging Face hub."""

    huggingface_repo_id: str | None = flag(None, "upload every saved file to this repository, as owner/name")
    huggingface_repo_type: str | None = flag(None, "its type; model when left out")
    huggingface_path_in_repo: str | None = flag(None, "folder in the repository; its top when left out")
    huggingface_token: str | None = flag(None, "access token; that of `hf auth login` when left out", secret=True)
    huggingface_repo_visibility: str | None = flag(
        None, "public or private, for a repository that is created; private when left out"
    )
    save_state_to_huggingface: bool = flag(False, "upload training states too")
    resume_from_huggingface: bool = flag(
        False, "--resume names a state on the hub: owner/name/folder, then :revision and :type where needed"
    )
    async_upload: bool = flag(False, "go on training while files are uploaded")

    def __post_init__(self) -> None:
        repo_id = self.huggingface_repo_id
        require(
            repo_id is None or re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id, re.ASCII) is not None,
            f"--huggingface_repo_id: {repo_id!r} is not of the form owner/name, so nothing could be uploaded; write it so",
        )
        require(
            self.huggingface_repo_type in (None, "model", "dataset", "space"),
            f"--huggingface_repo_type: {self.huggingface_repo_type!r} is none of model, dataset, space",
        )
        require(
            ".." not in (self.huggingface_path_in_repo or "").split("/"),
            f"--huggingface_path_in_repo: {self.huggingface_path_in_repo!r} leads out of the repository; leave .. out",
        )
