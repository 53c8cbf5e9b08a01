"""Where encoded pictures and captions are kept: in memory, or on disk as one file an entry.

Entries are named by a digest over everything they were made from, so an entry is valid if and only if it is there: a
change of any ingredient asks for another name, and what has not changed is found again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from library import files
from library.errors import DatasetError

Digest = bytes

_DIGEST_BYTES = 20
_SUFFIX = ".safetensors"


def digest_of(*ingredients: object) -> Digest:
    """Returns the name of an entry: the first 20 bytes of SHA-256 over the ingredients as JSON."""
    return hashlib.sha256(_encode(ingredients).encode()).digest()[:_DIGEST_BYTES]


_encode = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode


class Store(Protocol):
    """A keeper of tensors by digest."""

    def refresh(self) -> None:
        """Looks again which entries there are."""

    def __contains__(self, digest: Digest) -> bool: ...

    def put(self, digest: Digest, tensor: torch.Tensor, folder: Path | None) -> None:
        """Keeps a tensor in the store's dtype; ``folder`` says in which cache folder, for stores on disk."""

    def get(self, digest: Digest) -> torch.Tensor:
        """Returns a kept tensor."""

    def export(self, digests: Iterable[Digest]) -> list[tuple[Digest, torch.Tensor]]:
        """Returns entries that other processes need to be sent; none where they can read them themselves."""


class MemoryStore:
    """Entries of this run alone."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self._dtype = dtype
        self._tensors: dict[Digest, torch.Tensor] = {}

    def refresh(self) -> None:
        """Does nothing: only this process adds entries."""

    def __contains__(self, digest: Digest) -> bool:
        return digest in self._tensors

    def put(self, digest: Digest, tensor: torch.Tensor, folder: Path | None) -> None:
        # A clone, so that a slice of a batch does not keep the whole batch alive.
        self._tensors[digest] = tensor.detach().to("cpu", self._dtype, copy=True).contiguous()

    def get(self, digest: Digest) -> torch.Tensor:
        return self._tensors[digest]

    def export(self, digests: Iterable[Digest]) -> list[tuple[Digest, torch.Tensor]]:
        return [(digest, self._tensors[digest]) for digest in digests]


class _Places:
    """Which entries there are and in which folder: sorted bytes, a third of what a dict of 100,000 digests would take."""

    def __init__(self) -> None:
        self._digests = b""
        self._folders = array("H")
        self._starts = array("I", bytes(4 * (_PREFIXES + 1)))  # of the digests with the same first two bytes

    def fill(self, pairs: list[tuple[Digest, int]]) -> None:
        """Takes these entries; of equal ones that with the lowest folder."""
        pairs.sort()
        pairs = [pair for number, pair in enumerate(pairs) if not number or pairs[number - 1][0] != pair[0]]
        self._digests = b"".join(digest for digest, _ in pairs)
        self._folders = array("H", [folder for _, folder in pairs])
        counts = array("I", bytes(4 * (_PREFIXES + 1)))
        for digest, _ in pairs:
            counts[_prefix(digest) + 1] += 1
        self._starts = array("I", itertools.accumulate(counts))

    def folder(self, digest: Digest) -> int | None:
        """Returns the number of an entry's folder, or ``None`` where there is no such entry."""
        prefix = _prefix(digest)
        for number in range(self._starts[prefix], self._starts[prefix + 1]):
            if self._digests[_DIGEST_BYTES * number : _DIGEST_BYTES * (number + 1)] == digest:
                return self._folders[number]
        return None


_PREFIXES = 2**16


def _prefix(digest: Digest) -> int:
    return digest[0] << 8 | digest[1]


class DiskStore:
    """Entries as safetensors files in the folder ``kind`` of one or more cache folders."""

    def __init__(self, kind: str, folders: Sequence[Path], dtype: torch.dtype = torch.bfloat16) -> None:
        self._kind = kind
        self._dtype = dtype
        self._folders = list(dict.fromkeys(folders))
        self._known = _Places()
        self._new: dict[Digest, int] = {}
        self._writable: set[Path] = set()

    def refresh(self) -> None:
        pairs: list[tuple[Digest, int]] = []
        for number, folder in enumerate(self._folders):
            try:
                with os.scandir(folder / self._kind) as entries:
                    digests = (_digest_in(entry.name) for entry in entries)
                    pairs += [(digest, number) for digest in digests if digest is not None]
            except (FileNotFoundError, NotADirectoryError):
                continue
        self._known.fill(pairs)
        self._new = {}

    def __contains__(self, digest: Digest) -> bool:
        return self._folder_of(digest) is not None

    def _folder_of(self, digest: Digest) -> int | None:
        number = self._new.get(digest)
        return self._known.folder(digest) if number is None else number

    def put(self, digest: Digest, tensor: torch.Tensor, folder: Path | None) -> None:
        """Writes an entry.

        Raises:
            DatasetError: the folder cannot be written to.
        """
        number = self._folders.index(folder) if folder is not None else 0
        path = self._path(digest, number)
        try:
            tensors = {self._kind: tensor.detach().to("cpu", self._dtype)}
            files.write_safetensors(path, tensors, {"digest": digest.hex()})
        except OSError as error:
            raise not_writable(self._folders[number], error) from error
        self._new[digest] = number

    def get(self, digest: Digest) -> torch.Tensor:
        """Reads an entry.

        Raises:
            DatasetError: the file is gone, torn, or not what its name says; such a file is removed.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        number = self._folder_of(digest)
        if number is None:
            raise KeyError(digest)
        path = self._path(digest, number)
        try:
            # Read as a whole instead of mapped: Windows cannot replace or remove a mapped file.
            content = path.read_bytes()
            tensor = load(content)[self._kind]
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            if header["__metadata__"]["digest"] != digest.hex():
                raise ValueError("it is another entry")
        except OSError as error:
            raise DatasetError(
                f"The cache file {path} cannot be read ({error.strerror}); start again to make it anew."
            ) from error
        except (SafetensorError, ValueError, KeyError) as error:
            removed = _remove(path)
            raise DatasetError(
                f"The cache file {path} is damaged ({error}). {removed}; start again and it will be made anew."
            ) from error
        return tensor

    def export(self, digests: Iterable[Digest]) -> list[tuple[Digest, torch.Tensor]]:
        return []

    def check_writable(self, folder: Path | None) -> None:
        """Raises ``DatasetError`` where a cache folder (``None``: the first) cannot be made or written to."""
        folder = folder or self._folders[0]
        if folder in self._writable:
            return
        probe = folder / self._kind / "write-test"
        try:
            files.write_bytes(probe, b"")
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise not_writable(folder, error) from error
        self._writable.add(folder)

    def _path(self, digest: Digest, number: int) -> Path:
        return self._folders[number] / self._kind / f"{digest.hex()}{_SUFFIX}"


def not_writable(folder: Path, error: OSError) -> DatasetError:
    """Returns the error for a cache folder that cannot be written to."""
    return DatasetError(
        f"The cache folder {folder} cannot be written to ({error.strerror or error}), so nothing can be cached on "
        "disk; give another folder with --cache_dir, or cache in memory (flags without _to_disk)."
    )


def _digest_in(name: str) -> Digest | None:
    stem, dot, _ = name.partition(_SUFFIX)
    if not dot or len(stem) != 2 * _DIGEST_BYTES:
        return None
    try:
        return bytes.fromhex(stem)
    except ValueError:
        return None


def _remove(path: Path) -> str:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return "Delete it"
    return "It has been deleted"
