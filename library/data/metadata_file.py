"""Metadata files (.json, .jsonl) -> the pictures that they name, with captions. No picture is opened.

``.json`` holds ``{key: {"caption", "tags", "image_size"}}``, ``.jsonl`` one object a line with ``image_path`` instead of the
key. A key is a path, absolute or relative to the subset's ``image_dir``, with or without the picture's extension.
``image_size`` and ``train_resolution`` are not used: the files themselves say how large they are.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.data.captions import LINES_REMEDY, kept_lines, leaves_lines_out, lines_of
from library.data.config import SubsetConfig
from library.data.folders import is_picture
from library.data.strict_json import load_json
from library.errors import DatasetError, some

logger = logging.getLogger(__name__)

_FIELDS = frozenset({"caption", "tags", "image_size", "train_resolution", "image_path"})


@dataclass
class _Findings:
    """What is worth telling once."""

    missing: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)


def read_metadata(subset: SubsetConfig) -> list[tuple[str, str | None]]:
    """Returns (name, caption) of the pictures that a subset's metadata file names and that are there, by name.

    A name is a path below ``image_dir``, or an absolute one. A caption is ``None`` where there is neither caption nor tags.
    Entries without a file, twice named pictures and fields that nobody knows are counted in warnings.

    Raises:
        DatasetError: the file is broken, or an entry has the wrong form.
    """
    path = subset.metadata_file
    if path is None:
        raise ValueError("the subset has no metadata file")
    findings = _Findings()
    folders = _Folders(subset.image_dir)
    captions: dict[str, str | None] = {}
    for key, entry, where in _entries(path):
        for name in entry.keys() - _FIELDS:
            findings.unknown[name] = findings.unknown.get(name, 0) + 1
        names = folders.find(key)
        if not names:
            findings.missing.append(key)
        elif names[0] in captions:
            findings.again.append(key)
        else:
            if len(names) > 1:
                findings.unclear.append(f"{key} ({', '.join(os.path.split(name)[1] for name in names)})")
            captions[names[0]], is_cut = _caption(subset, entry, where)
            if is_cut:
                findings.cut.append(key)
    _report(path, findings)
    return sorted(captions.items())


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yields (key, entry, place for messages)."""
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"The metadata file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8."
        ) from error
    except OSError as error:
        raise DatasetError(f"The metadata file {path} cannot be read: {error.strerror}.") from error
    if path.suffix.lower() == ".jsonl":
        yield from _lines(path, content)
        return
    if path.suffix.lower() != ".json":
        raise DatasetError(
            f"The metadata file {path} ends in neither .json nor .jsonl, so it is unclear how to read it."
        )
    document = _parse(path, content, 0)
    if not isinstance(document, dict):
        raise DatasetError(f'The metadata file {path} holds no table; expected {{"picture": {{"caption": ...}}}}.')
    for key, entry in document.items():
        where = f"The metadata file {path}: {key!r}"
        if not isinstance(entry, dict):
            raise DatasetError(f'{where}: expected a table such as {{"caption": ..., "tags": ...}}, not {entry!r}.')
        yield key, entry, where


def _lines(path: Path, content: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        entry = _parse(path, line, number)
        where = f"The metadata file {path}: line {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("image_path"), str):
            raise DatasetError(f'{where}: expected an object with a text "image_path".')
        yield entry["image_path"], entry, where


def _parse(path: Path, text: str, line: int) -> Any:
    try:
        return load_json(text, f"The metadata file {path}")
    except json.JSONDecodeError as error:
        raise DatasetError(f"The metadata file {path}: line {line or error.lineno}: {error.msg}.") from error


def _caption(subset: SubsetConfig, entry: dict[str, Any], where: str) -> tuple[str | None, bool]:
    """Returns the caption, each line that is used with the tags behind it, and whether lines are left out."""
    caption, tags = entry.get("caption"), entry.get("tags")
    separator = subset.caption_separator
    if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags):
        tags = separator.join(tags)
    for name, value in (("caption", caption), ("tags", tags)):
        if value is not None and not isinstance(value, str):
            raise DatasetError(f"{where}: {name} = {value!r} is not valid: expected a text.")
    lines = lines_of(caption or "")
    kept, tags = kept_lines(subset, lines), separator.join(lines_of(tags or ""))
    if tags:
        kept = [line + separator + tags for line in kept] or [tags]
    return "\n".join(kept) or None, leaves_lines_out(subset, lines)


class _Folders:
    """The pictures in the folders that keys lead to; each folder is listed once."""

    def __init__(self, image_dir: Path) -> None:
        self._root = os.path.abspath(image_dir)  # noqa: PTH100 - texts, because a file may name 100,000 pictures
        self._names: dict[str, set[str]] = {}
        self._stems: dict[str, dict[str, list[str]]] = {}

    def find(self, key: str) -> list[str]:
        """Returns the names of the pictures that a key may mean, the one to use first.

        Looked for below ``image_dir``; then from the current folder, from which sd-scripts' tools write paths.
        """
        if "\0" in key or not key:
            return []
        for path in (key, key.replace("\\", "/")) if "\\" in key else (key,):
            for base in (self._root, os.getcwd()):  # noqa: PTH109
                found = self._in(os.path.normpath(os.path.join(base, os.path.expanduser(path))))  # noqa: PTH111, PTH118
                if found:
                    return found
        return []

    def _in(self, path: str) -> list[str]:
        folder, name = os.path.split(path)
        if folder not in self._names:
            self._names[folder] = set(_pictures_in(folder))
        names = self._names[folder]
        if name in names:
            return [self._short(folder, name)]
        if folder not in self._stems:
            stems = self._stems[folder] = {}
            for each in sorted(names):
                stems.setdefault(os.path.splitext(each)[0], []).append(each)  # noqa: PTH122
        return [self._short(folder, each) for each in self._stems[folder].get(name, ())]

    def _short(self, folder: str, name: str) -> str:
        if folder == self._root:
            return name
        path = os.path.join(folder, name)  # noqa: PTH118
        root = os.path.join(self._root, "")  # noqa: PTH118
        return path[len(root) :] if path.startswith(root) else path


def _pictures_in(folder: str) -> Iterable[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if is_picture(entry.name) and entry.is_file()]
    except OSError:
        return []


def _report(path: Path, findings: _Findings) -> None:
    for names, what in (
        (findings.missing, "has %d entries without a picture file, which are left out"),
        (findings.again, "names %d pictures again; the first entry of each counts"),
        (findings.unclear, "has %d keys that fit several pictures, of which the first is used"),
        (findings.cut, f"has %d captions of more than one line, of which only the first is read ({LINES_REMEDY})"),
    ):
        if names:
            logger.warning(f"%s {what}: %s", path, len(names), some(names))
    if findings.unknown:
        unknown = [f"{name} ({count})" for name, count in sorted(findings.unknown.items())]
        logger.warning("%s has fields that are not used: %s", path, some(unknown))
