"""Dataset file or folder -> typed datasets and subsets; nothing heavy is imported and no picture is opened.

A value is looked up in the subset, then its dataset, then ``[general]``, then on the command line; the first table that
holds it wins, so ``false`` in the file goes before a flag.
"""

from __future__ import annotations

import json
import logging
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.data import schema
from library.data.folders import first_picture, named_subfolders
from library.data.settings import DataSettings
from library.data.strict_json import load_json
from library.errors import DatasetError, nearest, some
from library.settings import expanded

logger = logging.getLogger(__name__)

Table = Mapping[str, Any]


@dataclass(frozen=True)
class SubsetConfig:
    """One folder of pictures and how its captions are treated; see ``schema.py`` for the values."""

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


def load_dataset_config(settings: DataSettings) -> tuple[DatasetConfig, ...]:
    """Returns the datasets of ``--dataset_config``, or the one that ``--train_data_dir`` describes.

    A relative ``image_dir`` is looked for from the current folder, as in sd-scripts, and where that does not exist,
    from the dataset file's folder.

    Raises:
        DatasetError: the file or a folder is missing, broken or empty, or a key or value of the file is wrong.
    """
    if settings.dataset_config is not None:
        if settings.train_data_dir is not None:
            logger.warning("--train_data_dir has no effect, because --dataset_config is given.")
        return _FileReader(settings.dataset_config, settings).datasets()
    if settings.train_data_dir is None:
        raise DatasetError(
            "There is nothing to train on: give --dataset_config (a file) or --train_data_dir (a folder)."
        )
    return (_dataset_of_folder(expanded(Path(settings.train_data_dir), "--train_data_dir"), settings),)


def _dataset_of_folder(folder: Path, settings: DataSettings) -> DatasetConfig:
    """Returns one dataset with a subset per ``N_name`` sub-folder, or with the pictures of ``folder`` itself."""
    origin = f"--train_data_dir: {folder}"
    if not folder.is_dir():
        raise DatasetError(f"{origin} is not a folder; give the folder that holds the pictures.")
    named, others = named_subfolders(folder)
    loose = first_picture(folder)
    if others:
        logger.warning(
            "%s: sub-folders without a repeat count in front (N_name) are not used: %s", folder, some(others)
        )
    subsets = []
    for sub_folder, repeats, class_tokens in named:
        if repeats < 1 or first_picture(sub_folder) is None:
            why = "its repeat count is 0" if repeats < 1 else "it holds no pictures"
            logger.warning("%s is not used: %s.", sub_folder, why)
            continue
        given: dict[str, Any] = {"image_dir": sub_folder, "num_repeats": repeats, "class_tokens": class_tokens or None}
        subsets.append(_subset([given], settings))
    if subsets and loose:
        logger.warning("%s: pictures beside the sub-folders are not used, for example %s.", folder, loose.name)
    if not subsets and loose:
        subsets = [_subset([{"image_dir": folder}], settings)]
    if not subsets:
        raise DatasetError(
            f"{origin} holds no pictures, and no sub-folder named N_name (N = repeats) with pictures in it, so "
            "there is nothing to train on."
        )
    return _dataset([], tuple(subsets), settings, origin)


def _lookup(name: str, flag: str | None, tables: Sequence[Table], settings: DataSettings) -> Any:
    """Returns the value from the first table that has it, else from the command line; ``None``: nowhere."""
    for table in tables:
        if table.get(name) is not None:
            return table[name]
    return getattr(settings, flag) if flag else None


def _subset(tables: Sequence[Table], settings: DataSettings) -> SubsetConfig:
    values = {key.name: _lookup(key.name, key.flag, tables, settings) for key in schema.SUBSET_KEYS}
    return SubsetConfig(**values)


def _dataset(
    tables: Sequence[Table], subsets: tuple[SubsetConfig, ...], settings: DataSettings, where: str
) -> DatasetConfig:
    values = {key.name: _lookup(key.name, key.flag, tables, settings) for key in schema.DATASET_KEYS}
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


class _FileReader:
    """Reads one dataset file; every message names the file, the table, the key and the value."""

    def __init__(self, path: Path, settings: DataSettings) -> None:
        self._path = expanded(path, "--dataset_config")
        self._settings = settings
        self._warned: set[str] = set()

    def datasets(self) -> tuple[DatasetConfig, ...]:
        document = _parse(self._path)
        for name, value in document.items():
            if name not in ("general", "datasets"):
                raise self._error("", f"unknown table {name} = {value!r}{nearest(name, ('general', 'datasets'))}")
        general = document.get("general", {})
        if not isinstance(general, dict):
            raise self._error("general", "expected a table: write [general]")
        general = self._read_table(general, "general", schema.GENERAL)
        datasets = []
        for where, table in self._tables(document, "", "datasets"):
            subset_tables = list(self._tables(table, where, "subsets"))
            own = {name: value for name, value in table.items() if name != "subsets"}
            tables = [self._read_table(own, where, schema.DATASET), general]
            subsets = tuple(self._subsets(subset_tables, tables))
            if not subsets:
                raise self._error(where, "no subset is left to train on")
            datasets.append(_dataset(tables, subsets, self._settings, f"{self._path}: {where}"))
        return tuple(datasets)

    def _error(self, where: str, problem: str) -> DatasetError:
        return DatasetError(": ".join(part for part in ("--dataset_config", str(self._path), where, problem) if part))

    def _tables(self, parent: Table, where: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields (table path, table) for ``[[datasets]]`` or ``[[datasets.subsets]]``."""
        heading = "[[datasets.subsets]]" if name == "subsets" else "[[datasets]]"
        tables = parent.get(name)
        if not tables:
            raise self._error(where, f"there is no {heading}, so there is nothing to train on")
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise self._error(where, f"{name} is not a list of tables: write {heading} with double brackets")
        for index, table in enumerate(tables):
            yield f"{where}.{name}[{index}]".lstrip("."), table

    def _read_table(self, table: Table, where: str, level: str) -> dict[str, Any]:
        """Returns the checked values of one table; ``null`` (JSON) counts as not given."""
        values = {}
        for name, value in table.items():
            key = schema.KEYS.get(name)
            if key is None:
                known = [other.name for other in schema.KEYS.values() if level in other.levels]
                raise self._error(where, f"unknown key {name} = {value!r}{nearest(name, known)}")
            if level not in key.levels:
                raise self._error(
                    where, f"{name} = {value!r} has no place here; it belongs into {' or '.join(key.levels)}"
                )
            if value is None:
                continue
            if key is schema.WITHOUT_EFFECT:
                self._warn_once(name, f"{self._path}: {name} has no effect.")
            else:
                try:
                    values[name] = key.read(value)
                except ValueError as error:
                    raise self._error(where, f"{name} = {value!r} is not valid: {error}") from error
        return values

    def _warn_once(self, subject: str, message: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            logger.warning("%s", message)

    def _subsets(
        self, subset_tables: list[tuple[str, dict[str, Any]]], parents: Sequence[Table]
    ) -> Iterator[SubsetConfig]:
        seen = set()
        for where, table in subset_tables:
            values = self._read_table(table, where, schema.SUBSET)
            if "image_dir" not in values:
                raise self._error(where, "image_dir, the folder of the pictures, is missing")
            values["image_dir"] = self._folder(values["image_dir"], where)
            subset = _subset([values, *parents], self._settings)
            folder = subset.image_dir.resolve()
            if folder in seen:
                logger.warning(
                    "%s: %s: %s is already in this dataset; this subset is ignored.", self._path, where, folder
                )
                continue
            seen.add(folder)
            if subset.num_repeats < 1:
                logger.warning(
                    "%s: %s: num_repeats is %d; this subset is ignored.", self._path, where, subset.num_repeats
                )
                continue
            yield subset

    def _folder(self, given: str, where: str) -> Path:
        folder = expanded(Path(given), f"{self._path}: {where}: image_dir")
        beside_file = self._path.parent / folder
        if not folder.is_absolute() and not folder.exists() and beside_file.exists():
            folder = beside_file
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            places = list(dict.fromkeys([Path.cwd(), self._path.resolve().parent]))
            looked = "" if folder.is_absolute() else f" (looked in {' and '.join(map(str, places))})"
            raise self._error(where, f"image_dir = {given!r} {what}{looked}")
        if first_picture(folder) is None:
            raise self._error(where, f"image_dir = {given!r} holds no pictures (sub-folders are not searched)")
        return folder


def _parse(path: Path) -> dict[str, Any]:
    """Returns the content of a TOML or JSON file.

    Raises:
        DatasetError: it is missing, neither .toml nor .json, no UTF-8, or broken (with the line).
    """
    origin = f"--dataset_config: {path}"
    if not path.is_file():
        raise DatasetError(f"{origin} does not exist or is not a file.")
    kind = path.suffix.lower()
    if kind not in (".toml", ".json"):
        raise DatasetError(f"{origin} ends in neither .toml nor .json, so it is unclear how to read it.")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{origin} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise DatasetError(f"{origin} cannot be read: {error.strerror}.") from error
    try:
        document = tomllib.loads(content) if kind == ".toml" else load_json(content, origin)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{origin}: line {error.lineno}: {error.msg}.") from error
    except tomllib.TOMLDecodeError as error:
        raise DatasetError(f"{origin}: {error}.{_backslash_hint(content, str(error))}") from error
    if not isinstance(document, dict):
        raise DatasetError(f'{origin} holds no table; expected {{"general": ..., "datasets": [...]}}.')
    return document


def _backslash_hint(content: str, message: str) -> str:
    """Returns what to do where the broken line holds a backslash, as a Windows path in double quotes does."""
    found = re.search(r"at line (\d+)", message)
    lines = content.splitlines()
    if found and int(found[1]) <= len(lines) and "\\" in lines[int(found[1]) - 1]:
        return " Write Windows paths with forward slashes or in single quotes."
    return ""
