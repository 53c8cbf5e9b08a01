"""Reads tensors out of model files: mapped where they can be used as they are, else converted part by part.

What has to be converted is not mapped first: its pages would count as the program's memory beside the converted copy (up
to 5 GiB for a file of a model in another precision), although each is looked at once. Reading parts into one small
buffer takes the same time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import ModelFileError
from library.lumina.checkpoint_files import TensorEntry

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

_PART_BYTES = 4 * 2**20
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


@dataclass(frozen=True)
class TensorSource:
    """Where one of our tensors comes from: entries joined along axis 0, each with its fp8 scale; none means ones."""

    shape: Shape
    entries: tuple[TensorEntry, ...]
    scales: tuple[TensorEntry | None, ...]

    @property
    def is_whole(self) -> bool:
        """Whether the file has the tensor as one entry that needs no scale."""
        return len(self.entries) == 1 and self.scales == (None,)


class OpenFiles:
    """Files that stay open while a model is read."""

    def __init__(self) -> None:
        self._files: dict[Path, Any] = {}
        self._buffer = bytearray(_PART_BYTES)

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def parts(self, entry: TensorEntry) -> Iterator[memoryview]:
        """Yields the entry's bytes in parts, each of which is there until the next one is asked for."""
        if entry.file not in self._files:
            self._files[entry.file] = entry.file.open("rb")
        file = self._files[entry.file]
        for start in range(entry.start, entry.end, _PART_BYTES):
            part = memoryview(self._buffer)[: min(_PART_BYTES, entry.end - start)]
            file.seek(start)
            if file.readinto(part) != len(part):
                raise ModelFileError(f"{entry.file} became shorter while it was read. Start again when it is complete.")
            yield part


class TensorReader:
    """Reads tensors, mapped or copied."""

    def __init__(self, mmap: bool) -> None:
        """Opens nothing yet; ``mmap`` says whether files may be mapped."""
        self._mmap = mmap
        self._files = OpenFiles()
        self._mapped: dict[Path, Any] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.__exit__()
        self._mapped.clear()

    def source(self, source: TensorSource, dtype: torch.dtype | None) -> torch.Tensor:
        """Returns a tensor in ``dtype``; None: in that of the file, which has it whole."""
        import torch

        if not source.entries:
            return torch.ones(source.shape, dtype=dtype)
        if self._mmap and source.is_whole and dtype in (None, self._dtype(source.entries[0])):
            return self._mapped_entry(source.entries[0]).reshape(source.shape)
        result = torch.empty(source.shape, dtype=dtype or self._dtype(source.entries[0]))
        sizes = [math.prod(entry.shape) for entry in source.entries]
        for part, entry, scale in zip(result.view(-1).split(sizes), source.entries, source.scales, strict=True):
            if scale is None:
                self._read_into(part, entry)
            else:
                part.copy_(self._scaled(entry, scale))
        return result

    def _scaled(self, entry: TensorEntry, scale: TensorEntry) -> torch.Tensor:
        """Returns an fp8 weight times its scale as one row of float32 numbers."""
        factor = self._float32(scale)
        if factor.numel() > 1:
            factor = factor.reshape(-1, *[1] * (len(entry.shape) - 1))  # one scale per output channel
        return (self._float32(entry) * factor).view(-1)

    def _float32(self, entry: TensorEntry) -> torch.Tensor:
        import torch

        result = torch.empty(entry.shape)
        self._read_into(result.view(-1), entry)
        return result

    def _read_into(self, numbers: torch.Tensor, entry: TensorEntry) -> None:
        """Fills a row of numbers of any dtype with those of the entry."""
        import torch

        begin = 0
        for part in self._files.parts(entry):
            found = torch.frombuffer(part, dtype=self._dtype(entry))
            numbers[begin : begin + len(found)] = found
            begin += len(found)

    def _mapped_entry(self, entry: TensorEntry) -> torch.Tensor:
        from safetensors import safe_open

        if entry.file not in self._mapped:
            self._mapped[entry.file] = safe_open(entry.file, framework="pt")
        return self._mapped[entry.file].get_tensor(entry.name)

    @staticmethod
    def _dtype(entry: TensorEntry) -> torch.dtype:
        import torch

        return getattr(torch, _DTYPES[entry.dtype])
