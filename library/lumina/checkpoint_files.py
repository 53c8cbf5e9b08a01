"""Model files and folders on disk: which tensors they hold, without reading one, and then reading exactly those wanted.

Only the JSON headers of safetensors files are read to check a model, so a wrong or truncated file is named within
milliseconds. Pickles are refused: loading one runs whatever code it contains.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.errors import ModelFileError, nearest
from library.files import read_safetensors_header

_PICKLE_SUFFIXES = {".ckpt", ".pt", ".pth", ".bin"}
_BYTES_PER_ELEMENT = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "I8": 1, "BOOL": 1}
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: ``dtype`` as safetensors spells it, bytes ``start`` to ``end`` of ``file``."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one file, or of one folder's shards, by name.

    Attributes:
        path: what the user gave, or the sub-folder of it that holds this model.
        files: the safetensors files.
        entries: tensor name -> entry.
        metadata: the string metadata of the files.
        folder_config: ``config.json`` beside the weights, where there is one.
    """

    path: Path
    files: tuple[Path, ...]
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    folder_config: Mapping[str, Any] | None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape."""
        return {name: entry.shape for name, entry in self.entries.items()}


def open_checkpoint(path: Path, flag: str, subfolder: str) -> Checkpoint:
    """Returns what a model file, a model's folder, or ``subfolder`` of a pipeline's root folder holds.

    Args:
        path: what the user gave.
        flag: the flag it was given with, for messages.
        subfolder: where a pipeline keeps this model, for example ``transformer``.

    Raises:
        ModelFileError: it does not exist, is broken, truncated, or no safetensors file.
    """
    if path.is_dir():
        return _open_folder(path / subfolder if (path / subfolder).is_dir() else path, flag)
    if not path.exists():
        raise ModelFileError(f"{flag}: {path} does not exist{_missing_hint(path)}")
    entries, metadata = _read_file(path, flag)
    return Checkpoint(path, (path,), entries, metadata, _read_config(path.parent / "config.json", flag))


def _missing_hint(path: Path) -> str:
    if path.parent.is_dir() and path.parent != Path():
        names = [item.name for item in path.parent.iterdir()]
        return f"{nearest(path.name, names)}. Check the path."
    if (
        len(path.parts) == 2
        and not path.is_absolute()
        and path.suffix.lower() not in {".safetensors", *_PICKLE_SUFFIXES}
    ):
        return f". If {path.as_posix()} is a repository on Hugging Face, download it first and give the folder."
    return ". Check the path."


def _open_folder(folder: Path, flag: str) -> Checkpoint:
    files = _weight_files(folder, flag)
    entries: dict[str, TensorEntry] = {}
    metadata: dict[str, str] = {}
    for file in files:
        more, more_metadata = _read_file(file, flag)
        entries |= more
        metadata |= more_metadata
    return Checkpoint(folder, files, entries, metadata, _read_config(folder / "config.json", flag))


def _weight_files(folder: Path, flag: str) -> tuple[Path, ...]:
    """Returns a folder's safetensors files: those of its index, or all shards of one set, or the only one.

    Raises:
        ModelFileError: there is none, a shard is missing, or it is unclear which one is meant.
    """
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        try:
            shards = set(json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ModelFileError(f"{flag}: {indexes[0]} cannot be read as an index of shards: {error}") from error
        return _all_present(folder, shards, flag)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(item.name for item in folder.iterdir() if item.suffix in _PICKLE_SUFFIXES)
        if pickles:
            raise ModelFileError(f"{flag}: {folder} holds {pickles[0]} and no .safetensors file. {_PICKLE_ADVICE}")
        raise ModelFileError(
            f"{flag}: the folder {folder} holds no .safetensors file. "
            "Give a model file, a Hugging Face-style model folder, or the pipeline's root folder."
        )
    if len(files) == 1 and not _SHARD.search(files[0].name):
        return (files[0],)
    stems = {_SHARD.sub("", file.name) for file in files}
    if len(stems) == 1 and (match := _SHARD.search(files[0].name)):
        stem, count = stems.pop(), int(match[2])
        return _all_present(folder, [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)], flag)
    raise ModelFileError(
        f"{flag}: the folder {folder} holds {len(files)} .safetensors files "
        f"({', '.join(file.name for file in files[:3])} ...) and no index of shards, "
        "so it is unclear which one is meant. Give the path of the file."
    )


def _all_present(folder: Path, names: Iterable[str], flag: str) -> tuple[Path, ...]:
    paths = [folder / name for name in sorted(names)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ModelFileError(
            f"{flag}: {folder} lacks {len(missing)} of {len(paths)} shards: {', '.join(missing[:3])}. "
            "Download the folder again."
        )
    return tuple(paths)


def _read_config(path: Path, flag: str) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{flag}: {path} is not valid JSON: {error}. Download it again.") from error
    return config if isinstance(config, dict) else None


_PICKLE_ADVICE = (
    "Such files are pickles, which can run any program when they are opened, so they are not read. Use the model's "
    ".safetensors version (on Hugging Face: Comfy-Org/Lumina_Image_2.0_Repackaged, Alpha-VLLM/Lumina-Image-2.0)."
)


def _read_file(path: Path, flag: str) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Returns one file's entries and metadata.

    Raises:
        ModelFileError: the file is no complete safetensors file.
    """
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise ModelFileError(f"{flag}: {path} is a {path.suffix} file. {_PICKLE_ADVICE}")
    try:
        header, data_start = read_safetensors_header(path)
    except OSError as error:
        raise ModelFileError(f"{flag}: {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelFileError(f"{flag}: {path} is not a safetensors file: {_what_it_is(path) or error}") from error
    metadata = header.pop("__metadata__", None) or {}
    try:
        if not isinstance(metadata, dict):
            raise TypeError("its __metadata__ is no table")
        entries = {name: _entry(path, name, fields, data_start) for name, fields in header.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFileError(f"{flag}: {path} has a broken safetensors header ({error}). Download it again.") from error
    size, needed = path.stat().st_size, max((entry.end for entry in entries.values()), default=data_start)
    if needed > size:
        raise ModelFileError(
            f"{flag}: {path} is truncated: its header promises {_readable(needed)} and the file has {_readable(size)}. "
            "The download was probably interrupted; download it again."
        )
    if needed < size:
        raise ModelFileError(
            f"{flag}: {path} has {size - needed} bytes behind its last tensor, so it is damaged. Download it again."
        )
    return entries, {str(key): str(value) for key, value in metadata.items()}


def _entry(path: Path, name: str, fields: Mapping[str, Any], data_start: int) -> TensorEntry:
    start, end = fields["data_offsets"]
    shape = tuple(int(size) for size in fields["shape"])
    entry = TensorEntry(path, name, fields["dtype"], shape, data_start + start, data_start + end)
    elements = 1
    for size in shape:
        elements *= size
    width = _BYTES_PER_ELEMENT.get(entry.dtype)
    if width is not None and elements * width != end - start:
        raise ValueError(f"{name} of shape {list(shape)} does not fill its {end - start} bytes")
    return entry


def _readable(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size} bytes"


def _what_it_is(path: Path) -> str | None:
    """Returns a sentence on what a file that is not safetensors seems to be, or None."""
    with path.open("rb") as file:
        start = file.read(512)
    text = start.lstrip().lower()
    if not start:
        return "it is empty. Download it again."
    if text.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer of a few lines, not the model. Run `git lfs pull`, or download the file itself."
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page (perhaps one asking for a login), not the model. Download the file itself."
    if text.startswith((b'{"error', b"{'error", b"invalid username", b"access to model")):
        return "it holds a server's error message. Download it again, logged in where the model asks for it."
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return f"it is a pickle. {_PICKLE_ADVICE}"
    if start.startswith(b"GGUF"):
        return (
            "it is a GGUF file, whose quantised weights are not read. Use a bf16, fp16, fp32 or fp8 safetensors file."
        )
    if not start.strip(b"\0"):
        return "it begins with zeros, as a download does that has only reserved its space. Download it again."
    return None
