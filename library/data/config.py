"""What is trained on, as typed datasets and subsets; nothing heavy is imported and no picture is opened.

They come from the dataset file (``config_file.py``) or from flags. A value is looked up in the subset, then its dataset,
then ``[general]``, then on the command line; the first table that holds it wins, so ``false`` in the file goes before a
flag.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.data import schema
from library.data.folders import first_picture, named_subfolders, repeats_and_words, why_no_pictures
from library.data.settings import DataSettings
from library.errors import DatasetError, some
from library.settings import expanded

logger = logging.getLogger(__name__)

Table = Mapping[str, Any]

_MOST_REPEATS_IN_A_NAME = 1000  # beyond it the number is rather a year or a size, as in 2024_holidays


@dataclass(frozen=True)
class SubsetConfig:
    """One folder or metadata file of pictures and how they and their captions are treated.

    ``schema.py`` says what the values may be. With ``metadata_file``, ``image_dir`` is what its keys are relative to.
    ``conditioning_data_dir`` is only set where masks are used.
    """

    image_dir: Path
    metadata_file: Path | None = None
    conditioning_data_dir: Path | None = None
    is_reg: bool | None = None
    class_tokens: str | None = None
    num_repeats: int = 1
    caption_extension: str = ".caption"
    caption_separator: str = ","
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    join_caption_lines: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: int | float = 0
    color_aug: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    alpha_mask: bool = False
    custom_attributes: Mapping[str, bool] | None = None
    validation_split: float = 0.0
    validation_seed: int | None = None
    cache_info: bool = False
    resize_interpolation: str | None = None

    @property
    def preserves_output(self) -> bool:
        """Whether these pictures are trained to leave the base model's prediction as it is (difference output
        preservation): their target is the prediction without the network."""
        return bool((self.custom_attributes or {}).get("diff_output_preservation"))


@dataclass(frozen=True)
class DatasetConfig:
    """Subsets that are trained at one resolution and batch size; sizes in pixels, (width, height)."""

    resolution: tuple[int, int]
    subsets: tuple[SubsetConfig, ...] = ()
    batch_size: int = 1
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False


def load_dataset_config(settings: DataSettings, typed: Collection[str] = ()) -> tuple[DatasetConfig, ...]:
    """Returns the datasets of ``--dataset_config``, or the one that the flags describe.

    A relative folder or metadata file is looked for from the current folder, as in sd-scripts, and where that does not
    exist, from the dataset file's folder. Flags that the file leaves no effect are named.

    Args:
        settings: the flags.
        typed: names of those that stood on the command line.

    Raises:
        DatasetError: the file or a folder is missing, broken or empty, or a key or value of the file is wrong.
    """
    if settings.dataset_config is None:
        return (_dataset_of_flags(settings),)
    from library.data.config_file import read_dataset_file  # it imports this module

    instead = [f"--{name}" for name in _INSTEAD_OF_A_FILE if getattr(settings, name) is not None]
    if instead:
        verb = "have" if len(instead) > 1 else "has"
        logger.warning("%s %s no effect, because --dataset_config is given.", ", ".join(instead), verb)
    return read_dataset_file(settings.dataset_config, settings, typed)


_INSTEAD_OF_A_FILE = ("train_data_dir", "reg_data_dir", "in_json", "conditioning_data_dir")


def _dataset_of_flags(settings: DataSettings) -> DatasetConfig:
    """Returns one dataset of ``--train_data_dir`` or ``--in_json``, and ``--reg_data_dir``."""
    if settings.in_json is not None:
        subsets = [_subset_of_in_json(settings)]
    elif settings.train_data_dir is not None:
        subsets = _subsets_of_folder(
            "train_data_dir", expanded(Path(settings.train_data_dir), "--train_data_dir"), settings
        )
    else:
        raise DatasetError(
            "There is nothing to train on: give --dataset_config (a file), --train_data_dir (a folder) or --in_json (a"
            " metadata file)."
        )
    if settings.reg_data_dir is not None:
        subsets += _subsets_of_folder("reg_data_dir", expanded(Path(settings.reg_data_dir), "--reg_data_dir"), settings)
    given = settings.train_data_dir if settings.in_json is None else settings.in_json
    origin = f"{'--train_data_dir' if settings.in_json is None else '--in_json'}: {given}"
    return make_dataset([], tuple(subsets), settings, origin)


def _subset_of_in_json(settings: DataSettings) -> SubsetConfig:
    metadata_file = expanded(Path(settings.in_json or ""), "--in_json")
    if not metadata_file.is_file():
        raise DatasetError(f"--in_json: {metadata_file} does not exist or is not a file.")
    folder = metadata_file.parent
    if settings.train_data_dir is not None:
        folder = expanded(Path(settings.train_data_dir), "--train_data_dir")
        if not folder.is_dir():
            raise DatasetError(f"--train_data_dir: {folder} is not a folder; give the folder that holds the pictures.")
    given = {"image_dir": folder, "metadata_file": metadata_file, "conditioning_data_dir": _masks_of(folder, settings)}
    return make_subset([given], settings)


def _subsets_of_folder(flag: str, folder: Path, settings: DataSettings) -> list[SubsetConfig]:
    """Returns a subset per ``N_name`` sub-folder, or one of the pictures of ``folder`` itself."""
    is_reg = flag == "reg_data_dir"
    origin = f"--{flag}: {folder}"
    if not folder.is_dir():
        raise DatasetError(f"{origin} is not a folder; give the folder that holds the pictures.")
    named, others = named_subfolders(folder)
    loose = first_picture(folder)
    if others:
        logger.warning(
            "%s: sub-folders without a repeat count in front (N_name) are not used: %s", folder, some(others)
        )
    found: list[dict[str, Any]] = []
    for sub_folder, repeats, class_tokens in named:
        if repeats < 1 or first_picture(sub_folder) is None:
            why = "its repeat count is 0" if repeats < 1 else f"it holds no pictures{why_no_pictures(sub_folder)}"
            logger.warning("%s is not used: %s.", sub_folder, why)
            continue
        found.append({"image_dir": sub_folder, "num_repeats": repeats, "class_tokens": class_tokens or None})
    if found and loose:
        logger.warning("%s: pictures beside the sub-folders are not used, for example %s.", folder, loose.name)
    if not found and loose:
        found.append({"image_dir": folder})
        _warn_of_own_name(flag, folder, settings)
    if not found:
        what = "no picture could be shown for regularisation" if is_reg else "there is nothing to train on"
        raise DatasetError(
            f"{origin} holds no pictures, and no sub-folder named N_name (N = repeats) with pictures in it, so {what}"
            f"{why_no_pictures(folder)}."
        )
    for given in found:
        given["is_reg"] = is_reg
        if not is_reg:
            given["conditioning_data_dir"] = _masks_of(given["image_dir"], settings)
    return [make_subset([given], settings) for given in found]


def _warn_of_own_name(flag: str, folder: Path, settings: DataSettings) -> None:
    """Warns where the folder that a flag names looks like one of the sub-folders that it should hold."""
    whole = folder.resolve()
    repeats, words = repeats_and_words(whole)
    if not repeats or not words or repeats > _MOST_REPEATS_IN_A_NAME:
        return
    logger.warning(
        "--%s: %s is taken as a plain folder: its pictures are shown %d times an epoch, and those without a caption file"
        " have none. --%s %s takes %d repeats and the words %r from its name, and every other sub-folder N_words too",
        flag,
        folder,
        settings.dataset_repeats,
        flag,
        folder.parent if folder.name == whole.name else whole.parent,
        repeats,
        words,
    )


def _masks_of(image_dir: Path, settings: DataSettings) -> Path | None:
    """Returns ``--conditioning_data_dir``, or its sub-folder with the picture folder's name where there is one."""
    if settings.conditioning_data_dir is None or not settings.masked_loss:
        return None
    folder = expanded(Path(settings.conditioning_data_dir), "--conditioning_data_dir")
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise DatasetError(f"--conditioning_data_dir: {folder} {what}; give the folder that holds the masks.")
    return folder / image_dir.name if (folder / image_dir.name).is_dir() else folder


def look_up(name: str, flag: str | None, tables: Sequence[Table], settings: DataSettings) -> Any:
    """Returns the value from the first table that has it, else from the command line; ``None``: nowhere."""
    for table in tables:
        if table.get(name) is not None:
            return table[name]
    return getattr(settings, flag) if flag else None


def make_subset(tables: Sequence[Table], settings: DataSettings) -> SubsetConfig:
    """Returns a subset whose values come from the first table that holds them, else from flags."""
    values = {key.name: look_up(key.name, key.flag, tables, settings) for key in schema.SUBSET_KEYS}
    return SubsetConfig(**values)


def make_dataset(
    tables: Sequence[Table], subsets: tuple[SubsetConfig, ...], settings: DataSettings, where: str
) -> DatasetConfig:
    """Returns a dataset, its values looked up as a subset's.

    Raises:
        DatasetError: there is nothing but regularisation pictures, no resolution, or it contradicts the bucket sides.
    """
    if all(subset.is_reg for subset in subsets):
        raise DatasetError(
            f"{where}: there are only regularisation pictures (is_reg), which accompany others; add a subset to train on."
        )
    values = {key.name: look_up(key.name, key.flag, tables, settings) for key in schema.DATASET_KEYS}
    if values["resolution"] is None:
        raise DatasetError(f"{where}: no training size is set; give resolution in the dataset file, or --resolution.")
    config = DatasetConfig(subsets=subsets, **values)
    _check_sizes(config, where)
    return config


def _check_sizes(config: DatasetConfig, where: str) -> None:
    """Raises ``DatasetError`` where resolution and bucket limits contradict each other."""
    width, height = config.resolution
    step, shorter, longer = config.bucket_reso_steps, min(width, height), max(width, height)
    if not config.enable_bucket:
        if width % schema.PIXEL_MULTIPLE or height % schema.PIXEL_MULTIPLE:
            raise DatasetError(
                f"{where}: resolution {width},{height} cannot be trained on without buckets, because the model needs "
                f"sides that are multiples of {schema.PIXEL_MULTIPLE}; choose such sides or set enable_bucket."
            )
        return
    if shorter < step:
        raise DatasetError(
            f"{where}: resolution {width},{height} is smaller than bucket_reso_steps {step}, so there is no bucket; "
            "make the resolution larger or the steps smaller."
        )
    if config.bucket_no_upscale:
        return
    low, high = config.min_bucket_reso // step * step, -(-config.max_bucket_reso // step) * step
    for name, given, used in (
        ("min_bucket_reso", config.min_bucket_reso, low),
        ("max_bucket_reso", config.max_bucket_reso, high),
    ):
        if given != used:
            logger.warning("%s: %s %d becomes %d, a multiple of bucket_reso_steps %d.", where, name, given, used, step)
    if shorter < low or longer > high:
        name, limit, remedy = (
            ("min_bucket_reso", low, "at most") if shorter < low else ("max_bucket_reso", high, "at least")
        )
        side = shorter if shorter < low else longer
        raise DatasetError(
            f"{where}: resolution {width},{height} lies outside the bucket sides, because {name} is {limit}; "
            f"set {name} to {remedy} {side}."
        )
