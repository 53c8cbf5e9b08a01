"""One model's tensors in one checkpoint: checked strictly against what the model needs, read only when asked for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from tqdm import tqdm

from library.console import process_rank
from library.errors import ModelFileError, some
from library.file_hashes import remembered
from library.lumina.checkpoint_files import Checkpoint, TensorEntry
from library.lumina.key_maps import Found, Layout, find_layout, is_harmless
from library.lumina.model_guess import guess_model
from library.lumina.tensor_reader import OpenFiles, Shape, TensorReader, TensorSource

if TYPE_CHECKING:
    import torch

ConfigT = TypeVar("ConfigT")

_FLOAT_DTYPES = {"F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2"}
_FP8_DTYPES = {"F8_E4M3", "F8_E5M2"}
_SCALE_SUFFIXES = ("scale_weight", "weight_scale")


@dataclass(frozen=True)
class ComponentFile(Generic[ConfigT]):
    """A model's file or folder after its header was checked.

    Attributes:
        path: what the user gave (for an all-in-one file or a pipeline's root, the same for several components).
        single_file: the one safetensors file the tensors lie in; None for a sharded folder.
        config: the model's sizes.
        sources: our tensor name -> where it lies.
        mmap: tensors are mapped into memory and used in place, instead of being read.
        flag: the flag the path was given with.
    """

    path: Path
    single_file: Path | None
    config: ConfigT
    sources: Mapping[str, TensorSource]
    mmap: bool
    flag: str

    @cached_property
    def fingerprint(self) -> str:
        """A hash over each tensor's name, dtype, shape and bytes; made once for a file, then remembered."""
        entries = [
            (name, entry)
            for name, source in sorted(self.sources.items())
            for entry in (*source.entries, *filter(None, source.scales))
        ]
        layout = hashlib.blake2b(json.dumps(dataclasses.asdict(self.config), sort_keys=True).encode())  # type: ignore[call-overload]
        for name, entry in entries:
            layout.update(f"{name} {entry.dtype} {list(self.sources[name].shape)} {entry.start}".encode())

        def compute() -> str:
            digest = hashlib.blake2b(digest_size=16)
            total = sum(entry.end - entry.start for _, entry in entries)
            hidden = process_rank() > 0  # the others hash it too, and see the same
            what = f"Hashing {self.path.name}"
            bar = tqdm(total=total, desc=what, unit="B", unit_scale=True, delay=2, leave=False, disable=hidden)
            with OpenFiles() as files, bar:
                for name, entry in entries:
                    digest.update(f"{name} {entry.dtype} {list(self.sources[name].shape)}".encode())
                    for part in files.parts(entry):
                        digest.update(part)
                        bar.update(len(part))
            return digest.hexdigest()

        return remembered(f"component {layout.hexdigest()}", sorted({entry.file for _, entry in entries}), compute)

    @property
    def num_parameters(self) -> int:
        """How many numbers the model has."""
        return sum(math.prod(source.shape) for source in self.sources.values())

    def read(
        self, dtype: torch.dtype, show_progress: bool = True, in_place: Collection[str] = ()
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields one tensor after the other, on the CPU in ``dtype``, under our names.

        A tensor that has this dtype already is mapped from the file and not copied (with ``mmap``). Others are converted
        while they are read, part by part, so that a file takes no memory beside what is made of it.

        Args:
            dtype: of the tensors.
            show_progress: a bar where reading takes more than two seconds.
            in_place: names of tensors that are mapped in whatever dtype the file has them, because only parts of them
                are needed; those that are not there as they are (scaled, joined, or not mapped) come in ``dtype``.
        """
        names = tqdm(self.sources, desc=f"Loading {self.path.name}", delay=2, leave=False, disable=not show_progress)
        with TensorReader(self.mmap) as reader:
            for name in names:
                source = self.sources[name]
                as_it_is = self.mmap and name in in_place and source.is_whole
                yield name, reader.source(source, None if as_it_is else dtype)

    def tensors(self, dtype: torch.dtype, show_progress: bool = True) -> dict[str, torch.Tensor]:
        """Returns all tensors; see :meth:`read`."""
        return dict(self.read(dtype, show_progress))


def layout_of(checkpoint: Checkpoint, layouts: Sequence[Layout]) -> Found | None:
    """Returns the naming and prefix under which a checkpoint holds a model, or None where it does not."""
    return find_layout(checkpoint.entries, layouts)


class SourceShapes(Mapping[str, Shape]):
    """The shapes of a component under our names, whatever the file calls its tensors.

    Iterating gives the file's names without prefix (block numbers are the same in every layout).
    """

    def __init__(self, checkpoint: Checkpoint, found: Found) -> None:
        self._entries = checkpoint.entries
        self._found = found
        self._scope = found.scope(checkpoint.entries)

    def __getitem__(self, name: str) -> Shape:
        sources = self._found.layout.source_names(name)
        missing = next((source for source in sources if source not in self._scope), None)
        if missing is not None or not sources:
            raise KeyError(missing or name)
        shapes = [self._entries[self._found.prefix + source].shape for source in sources]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def __iter__(self) -> Iterator[str]:
        return iter(self._scope)

    def __len__(self) -> int:
        return len(self._scope)


def bind(
    checkpoint: Checkpoint,
    found: Found,
    needed: Mapping[str, Shape],
    allowed: Iterable[str],
    describe: Callable[[str], str],
    optional: frozenset[str] = frozenset(),
) -> dict[str, TensorSource]:
    """Returns where each needed tensor lies.

    Args:
        checkpoint: the file or folder.
        found: how it names the component's tensors.
        needed: our name -> shape.
        allowed: our names that may be there besides, and are never read.
        describe: makes the error's text out of a report on the tensors.
        optional: names of ``needed`` that become ones where the file lacks them.

    Raises:
        ModelFileError: tensors are missing, unexpected, have another shape, or are quantised in an unknown way.
    """
    scope = found.scope(checkpoint.entries)
    missing: list[str] = []
    misshaped: list[str] = []
    quantised: list[str] = []
    used: set[str] = set()
    sources: dict[str, TensorSource] = {}
    for name, shape in needed.items():
        names = found.layout.source_names(name)
        absent = [source for source in names if source not in scope]
        if absent:
            if name in optional:
                sources[name] = TensorSource(shape, (), ())
            else:
                missing += [found.prefix + source for source in absent]
            continue
        used |= set(names)
        entries = tuple(checkpoint.entries[found.prefix + source] for source in names)
        quantised += [entry.name for entry in entries if entry.dtype not in _FLOAT_DTYPES]
        scales = tuple(_scale_of(checkpoint, entry) for entry in entries)
        unfit = [scale for entry, scale in zip(entries, scales, strict=True) if scale and not _scales(scale, entry)]
        misshaped += [f"{scale.name} is {scale.dtype} {list(scale.shape)}, no scale of its weight" for scale in unfit]
        if not entries or _fits(entries, shape):
            sources[name] = TensorSource(shape, entries, scales)
        else:
            is_now = " + ".join(str(list(entry.shape)) for entry in entries)
            misshaped.append(f"{entries[0].name} is {is_now}, not {list(shape)}")
    ignored = {source for name in allowed for source in found.layout.source_names(name)}
    unexpected = sorted(found.prefix + name for name in scope - used - ignored if not is_harmless(name))
    _report(missing, unexpected, misshaped, quantised, describe)
    return sources


def _fits(entries: Sequence[TensorEntry], shape: Shape) -> bool:
    """Whether the entries, joined, have this shape; 1x1 convolutions count as matrices."""
    shapes = [entry.shape[:2] if entry.shape[2:] == (1, 1) and len(shape) == 2 else entry.shape for entry in entries]
    if any(part[1:] != shape[1:] or not part for part in shapes):
        return False
    return sum(part[0] for part in shapes) == shape[0]


def _scales(scale: TensorEntry, weight: TensorEntry) -> bool:
    """Whether a scale is one number, or one a row of its weight."""
    num_scales = math.prod(scale.shape)
    return scale.dtype in _FLOAT_DTYPES and num_scales in (1, *weight.shape[:1])


def _scale_of(checkpoint: Checkpoint, entry: TensorEntry) -> TensorEntry | None:
    """Returns the scale that belongs to an fp8 weight in ComfyUI's files, or None."""
    if entry.dtype not in _FP8_DTYPES:
        return None
    module = entry.name.removesuffix("weight")
    return next((checkpoint.entries[module + s] for s in _SCALE_SUFFIXES if module + s in checkpoint.entries), None)


def _report(
    missing: list[str],
    unexpected: list[str],
    misshaped: list[str],
    quantised: list[str],
    describe: Callable[[str], str],
) -> None:
    parts = []
    if missing:
        parts.append(f"{_count(missing)} missing ({some(missing)})")
    if unexpected:
        parts.append(f"{_count(unexpected)} unexpected ({some(unexpected)})")
    if misshaped:
        parts.append(f"{_count(misshaped)} of another shape ({some(misshaped)})")
    if quantised:
        parts.append(f"{_count(quantised)} in a quantised format that cannot be read ({some(quantised)})")
    if parts:
        raise ModelFileError(describe("; ".join(parts)))


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s are' if len(names) > 1 else ' is'}"


def not_this_model(flag: str, path: Path, wanted: str, shapes: Mapping[str, Shape], report: str = "") -> str:
    """Returns the message for a file that is not the model that a flag wants, with a guess at what it is."""
    guess = guess_model(shapes)
    if guess == wanted:
        return f"{flag}: {path} is {wanted}, but not a whole or unchanged one: {report}. Download it again."
    text = f"{flag}: {path} is not {wanted}"
    if report:
        text += f": {report}"
    if guess:
        text += f". It looks like {guess}"
    return f"{text}. Give the file of {wanted}."
