"""What is known of a folder's picture files: size and content hash, as long as byte count and mtime stay the same."""

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Iterable, KeysView
from pathlib import Path
from typing import NamedTuple

from library import files
from library.data.buckets import Size

logger = logging.getLogger(__name__)

_VERSION = 1
_HASH_BYTES = 32
_NO_HASH = bytes(_HASH_BYTES)


class FileState(NamedTuple):
    """What tells whether a file is still the same without reading it."""

    num_bytes: int
    mtime_ns: int


class PictureIndex:
    """The rows of one picture folder, kept in a JSON file in its cache folder.

    A row is (byte count, mtime, width, height, SHA-256 or unknown). Rows are kept in flat arrays: as objects, those of
    100,000 pictures would take more memory than everything else that is known of them.
    """

    def __init__(self, path: Path | None) -> None:
        """Makes an empty index; without a path it is not kept."""
        self.path = path
        self._rows: dict[str, int] = {}
        self._states = array("q")
        self._sides = array("I")
        self._hashes = bytearray()
        self._changed = False

    @classmethod
    def load(cls, path: Path) -> PictureIndex:
        """Returns the index in ``path``; an empty one where there is none or it cannot be understood."""
        index = cls(path)
        try:
            document = json.loads(path.read_bytes())
            if document["version"] == _VERSION:
                for name, (num_bytes, mtime_ns, width, height, sha256) in document["pictures"].items():
                    content = bytes.fromhex(sha256) if sha256 else _NO_HASH
                    index._add(name, FileState(num_bytes, mtime_ns), (width, height), content)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            logger.warning("%s cannot be understood; the pictures of this folder are looked at again.", path)
            index = cls(path)
        return index

    def size_of(self, name: str, state: FileState) -> Size | None:
        """Returns (width, height) of a file that still looks the same."""
        row = self._rows.get(name)
        if row is None or (self._states[2 * row], self._states[2 * row + 1]) != state:
            return None
        return self._sides[2 * row], self._sides[2 * row + 1]

    def known_size(self, name: str) -> Size | None:
        """Returns (width, height) of a file that has a row."""
        row = self._rows.get(name)
        return None if row is None else (self._sides[2 * row], self._sides[2 * row + 1])

    def hash_of(self, name: str) -> bytes | None:
        """Returns the content hash of a file, or ``None`` where it is not known."""
        row = self._rows.get(name)
        if row is None:
            return None
        content = bytes(self._hashes[_HASH_BYTES * row : _HASH_BYTES * (row + 1)])
        return content if content != _NO_HASH else None

    def put(self, name: str, state: FileState, size: Size, sha256: bytes | None = None) -> None:
        """Adds or replaces a row."""
        self._changed = True
        row = self._rows.get(name)
        if row is None:
            self._add(name, state, size, sha256 or _NO_HASH)
            return
        self._states[2 * row : 2 * row + 2] = array("q", state)
        self._sides[2 * row : 2 * row + 2] = array("I", size)
        self._hashes[_HASH_BYTES * row : _HASH_BYTES * (row + 1)] = sha256 or _NO_HASH

    def names(self) -> KeysView[str]:
        """Returns the names of all rows."""
        return self._rows.keys()

    def _add(self, name: str, state: FileState, size: Size, content: bytes) -> None:
        if len(content) != _HASH_BYTES:
            raise ValueError("not a SHA-256")
        self._states.extend(state)
        self._sides.extend(size)
        self._hashes += content
        self._rows[name] = len(self._rows)

    def keep_only(self, names: Iterable[str]) -> None:
        """Forgets other files; the texts given here are those that are kept as names."""
        kept = {name: self._rows[name] for name in names if name in self._rows}
        if len(kept) < len(self._rows):
            states, sides, hashes = self._states, self._sides, self._hashes
            self._states, self._sides, self._hashes = array("q"), array("I"), bytearray()
            for number, (name, row) in enumerate(kept.items()):
                self._states += states[2 * row : 2 * row + 2]
                self._sides += sides[2 * row : 2 * row + 2]
                self._hashes += hashes[_HASH_BYTES * row : _HASH_BYTES * (row + 1)]
                kept[name] = number
            self._changed = True
        self._rows = kept

    def save(self) -> None:
        """Writes the index if anything changed.

        Raises:
            OSError: the folder cannot be written to.
        """
        if not self._changed or self.path is None:
            return
        # One picture a line: people look into this file when something seems wrong.
        lines = ",\n".join(self._line(name) for name in sorted(self._rows))
        files.write_text(self.path, f'{{"version": {_VERSION}, "pictures": {{\n{lines}\n}}}}\n')
        self._changed = False

    def _line(self, name: str) -> str:
        row = self._rows[name]
        content = self.hash_of(name)
        values = [*self._states[2 * row : 2 * row + 2], *self._sides[2 * row : 2 * row + 2]]
        # ASCII, so that file names that are no valid Unicode survive too.
        return f"{json.dumps(name)}: {json.dumps([*values, content.hex() if content else None])}"
