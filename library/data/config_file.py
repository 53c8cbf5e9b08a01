"""The dataset file: TOML or JSON -> datasets and subsets. Every message names the file, the table, the key and the value."""

from __future__ import annotations

import json
import logging
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from library.data import schema
from library.data.augment_rules import UNCACHED, contradiction
from library.data.config import DatasetConfig, SubsetConfig, look_up, make_dataset, make_subset
from library.data.folders import first_picture, why_no_pictures
from library.data.overridden import warn_of_overridden
from library.data.settings import DataSettings
from library.data.strict_json import load_json
from library.errors import DatasetError, nearest
from library.settings import expanded

logger = logging.getLogger(__name__)

Table = Mapping[str, Any]


def read_dataset_file(path: Path, settings: DataSettings, typed: Collection[str] = ()) -> tuple[DatasetConfig, ...]:
    """Returns the datasets of a file; what it does not say comes from the flags, and the others are named.

    Args:
        path: the file.
        settings: the flags.
        typed: names of those that stood on the command line.

    Raises:
        DatasetError: the file or something that it names is missing or broken, or a key or value is wrong.
    """
    reader = _FileReader(path, settings)
    datasets = reader.datasets()
    warn_of_overridden(path, reader.said, datasets, settings, typed)
    return datasets


class _FileReader:
    """Reads one dataset file.

    Attributes:
        said: key -> its values in the file -> the kind of table that each stands in.
    """

    def __init__(self, path: Path, settings: DataSettings) -> None:
        self.said: dict[str, dict[Any, str]] = {}
        self._path = expanded(path, "--dataset_config")
        self._settings = settings
        self._warned: set[str] = set()

    def datasets(self) -> tuple[DatasetConfig, ...]:
        document = _parse(self._path)
        for name, value in document.items():
            if name not in ("general", "datasets"):
                if name in schema.KEYS:
                    raise self._error("", f"{name} = {value!r} stands in no table; put it under [general]")
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
            datasets.append(make_dataset(tables, subsets, self._settings, f"{self._path}: {where}"))
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
                if key.flag is not None:
                    self.said.setdefault(name, {})[values[name]] = level
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
            self._find_files(values, where)
            subset = make_subset([values, *parents], self._settings)
            source = (subset.metadata_file or subset.image_dir).resolve()
            masks = subset.conditioning_data_dir
            if (source, masks) in seen:
                logger.warning(
                    "%s: %s: %s is already in this dataset; this subset is ignored.", self._path, where, source
                )
                continue
            seen.add((source, masks))
            if subset.num_repeats < 1:
                logger.warning(
                    "%s: %s: num_repeats is %d; this subset is ignored.", self._path, where, subset.num_repeats
                )
                continue
            bucketed = look_up("enable_bucket", "enable_bucket", parents, self._settings)
            given = [name for name in UNCACHED if getattr(subset, name)]
            problem = contradiction(given, self._settings.cache_latents, bucketed)
            if problem:
                raise self._error(where, f"{problem}.")
            yield subset

    def _find_files(self, values: dict[str, Any], where: str) -> None:
        """Puts paths in the place of the texts that name a subset's folders and its metadata file."""
        metadata_file = values.get("metadata_file")
        if metadata_file is not None:
            values["metadata_file"] = path = self._found("metadata_file", metadata_file, where)
            if not path.is_file():
                raise self._error(where, f"metadata_file = {metadata_file!r} is not a file")
            values.setdefault("image_dir", str(path.parent))
        if "image_dir" not in values:
            raise self._error(where, "image_dir, the folder of the pictures, is missing (or a metadata_file)")
        given = values["image_dir"]
        values["image_dir"] = self._folder("image_dir", given, where)
        if metadata_file is None and first_picture(values["image_dir"]) is None:
            problem = f"image_dir = {given!r} holds no pictures (sub-folders are not searched)"
            raise self._error(where, problem + why_no_pictures(values["image_dir"]))
        masks = values.pop("conditioning_data_dir", None)
        if masks is not None and not self._settings.masked_loss:
            self._warn_once(
                "conditioning_data_dir",
                f"{self._path}: conditioning_data_dir has no effect, because --masked_loss is not given.",
            )
        elif masks is not None:
            values["conditioning_data_dir"] = self._folder("conditioning_data_dir", masks, where)

    def _folder(self, name: str, given: str, where: str) -> Path:
        folder = self._found(name, given, where)
        if not folder.is_dir():
            raise self._error(where, f"{name} = {given!r} is not a folder")
        return folder

    def _found(self, name: str, given: str, where: str) -> Path:
        """Returns an existing path: from the current folder, else from the dataset file's folder."""
        path = expanded(Path(given), f"{self._path}: {where}: {name}")
        beside_file = self._path.parent / path
        if not path.is_absolute() and not path.exists() and beside_file.exists():
            path = beside_file
        if not path.exists():
            places = list(dict.fromkeys([Path.cwd(), self._path.resolve().parent]))
            looked = "" if path.is_absolute() else f" (looked in {' and '.join(map(str, places))})"
            raise self._error(where, f"{name} = {given!r} does not exist{looked}")
        return path


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
