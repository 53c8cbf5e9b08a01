"""What is known of a folder's picture files: size and content hash, as long as byte count and mtime stay the same."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library import files

logger = logging.getLogger(__name__)

_VERSION = 1


@dataclass(slots=True)
class PictureRow:
    """One file: its byte count and mtime when it was looked at, (width, height) in pixels, and SHA-256 if known."""

    num_bytes: int
    mtime_ns: int
    width_px: int
    height_px: int
    sha256: bytes | None = None

    def matches(self, stat: os.stat_result) -> bool:
        """Tells whether the file still looks the same."""
        return self.num_bytes == stat.st_size and self.mtime_ns == stat.st_mtime_ns


class PictureIndex:
    """The rows of one picture folder, kept in a JSON file in its cache folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, PictureRow] = {}
        self._changed = False

    @classmethod
    def load(cls, path: Path) -> PictureIndex:
        """Returns the index in ``path``; an empty one where there is none or it cannot be understood."""
        index = cls(path)
        try:
            document = json.loads(path.read_bytes())
            if document["version"] == _VERSION:
                index._rows = {name: _row(values) for name, values in document["pictures"].items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            logger.warning("%s cannot be understood; the pictures of this folder are looked at again.", path)
        return index

    def get(self, name: str, stat: os.stat_result) -> PictureRow | None:
        """Returns the row of a file that still looks the same."""
        row = self._rows.get(name)
        return row if row is not None and row.matches(stat) else None

    def hash_of(self, name: str) -> bytes | None:
        """Returns the content hash that :meth:`put` gave, or ``None``."""
        row = self._rows.get(name)
        return row.sha256 if row else None

    def put(self, name: str, row: PictureRow) -> None:
        """Adds or replaces a row."""
        self._rows[name] = row
        self._changed = True

    def keep_only(self, names: set[str]) -> None:
        """Forgets files that are no longer there."""
        gone = self._rows.keys() - names
        for name in gone:
            del self._rows[name]
        self._changed = self._changed or bool(gone)

    def save(self) -> None:
        """Writes the index if anything changed.

        Raises:
            OSError: the folder cannot be written to.
        """
        if not self._changed:
            return
        rows = {
            name: [row.num_bytes, row.mtime_ns, row.width_px, row.height_px, row.sha256.hex() if row.sha256 else None]
            for name, row in sorted(self._rows.items())
        }
        # One picture a line: people look into this file when something seems wrong.
        lines = ",\n".join(f"{json.dumps(name, ensure_ascii=False)}: {json.dumps(row)}" for name, row in rows.items())
        files.write_text(self.path, f'{{"version": {_VERSION}, "pictures": {{\n{lines}\n}}}}\n')
        self._changed = False


def _row(values: Any) -> PictureRow:
    num_bytes, mtime_ns, width, height, sha256 = values
    for number in (num_bytes, mtime_ns, width, height):
        if not isinstance(number, int):
            raise TypeError("not a number")
    return PictureRow(num_bytes, mtime_ns, width, height, bytes.fromhex(sha256) if sha256 else None)
