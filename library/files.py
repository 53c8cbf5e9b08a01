"""The one place that writes files, and the hashes of files.

Whatever this program leaves on disk is written beside its final name and then moved there, so that a run that is killed
half-way leaves either the old file or the new one, never a torn one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import SettingsError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 8 * 2**20
_ALIGNMENT = 64  # of the data's start in a safetensors file
_LONGEST_IN_TEMPORARY_BYTES = 220  # with what comes behind it a name stays within the 255 bytes of file systems
_PARTIAL, _REMOVED = ".partial", ".removed"
_UMASK = threading.Lock()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path in the folder of ``path`` and moves it to ``path`` when the block ends without an error.

    Within another call's block its temporary path is written to as it is: that call moves it, whole or not at all.
    """
    if _name_of_temporary(path.name) is not None:
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept: some writers choose the format by it.
    suffix = f"{_PARTIAL}{path.suffix}"
    stem = path.stem.encode("utf-8", "surrogateescape")[:_LONGEST_IN_TEMPORARY_BYTES].decode("utf-8", "ignore")
    handle, name = tempfile.mkstemp(prefix=f".{stem}-", suffix=suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files for the owner alone; give what an ordinary open() would have given.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        if error.filename not in (None, name) or error.errno is None:
            raise
        # What comes up while a file is open, such as a full disk, does not say which; and a temporary one says little.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    with _UMASK:  # it can only be read by changing it, and is the whole program's
        current = os.umask(0)
        os.umask(current)
    return current


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder beside ``folder`` and moves it there when the block ends without an error.

    A folder that stands there already is replaced. Everything is on the disk before it gets its name, so that a folder
    of this name is complete also after a power cut. A program that is killed at the very moment between the old
    folder's going and the new one's coming leaves the new one complete under its temporary name:
    :func:`remove_leftovers` brings it to its place.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=_PARTIAL, dir=folder.parent))
    whole = False
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        for path in temporary.iterdir():
            _flush(path)
        whole = True
        if folder.exists():
            remove_folder(folder)
        temporary.replace(folder)
    finally:
        if whole and temporary.exists() and not folder.exists():
            temporary.replace(folder)  # Ctrl+C came in between
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    """Waits until a file's content is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def remove_folder(folder: Path) -> None:
    """Removes a folder such that it is never seen in part under its name."""
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=_REMOVED, dir=folder.parent))
    folder.replace(aside / "content")
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path, is_ours: Callable[[str], bool], is_complete: Callable[[Path], bool]) -> list[str]:
    """Removes what killed writers left in a folder under temporary names; returns these names.

    A folder that is complete and misses only its name gets it.

    Args:
        folder: where to look; may be missing.
        is_ours: tells by the name (a file's without extension) whose leftovers to take: another program may be writing
            to the folder at this moment.
        is_complete: whether nothing is missing in a folder with a temporary name.
    """
    if not folder.is_dir():
        return []
    found = []
    for path in sorted(folder.iterdir()):
        name = _name_of_temporary(path.name)
        if name is None or not is_ours(name):
            continue
        found.append(path.name)
        target = folder / name
        if not path.is_dir():
            path.unlink(missing_ok=True)
        elif path.name.endswith(_PARTIAL) and not target.exists() and is_complete(path):
            path.replace(target)
        else:
            shutil.rmtree(path, ignore_errors=True)
    return found


def _name_of_temporary(name: str) -> str | None:
    """Returns what a temporary file or folder was to be called, or None where the name is not a temporary one."""
    # What tempfile puts between: eight letters, digits or underscores.
    match = re.fullmatch(r"\.(.*)-[a-z0-9_]{8}(?:\.partial(?:\.\w+)?|\.removed)", name, re.DOTALL)
    return match.group(1) if match else None


def numbered(folder: Path, pattern: str) -> dict[int, Path]:
    """Returns what is in a folder under names of this pattern, by the number that is its one group."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    matches = ((re.fullmatch(pattern, path.name), path) for path in entries)
    return {int(match.group(1)): path for match, path in matches if match}


def written_at(path: Path) -> str:
    """Returns when a file was last changed, in local time: ``2026-11-27 21:30``."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))


def write_bytes(path: Path, data: bytes) -> None:
    """Writes ``data`` to ``path`` atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` as UTF-8 with ``\\n`` line ends to ``path`` atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as readable JSON to ``path`` atomically."""
    # ASCII, so that file names that are no valid Unicode survive too.
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None) -> None:
    """Writes tensors (made contiguous, moved to the CPU) and string metadata to ``path`` atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(plain, temporary, metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:  # a full disk comes as this, and not as what it is
            number = re.search(r"\(os error (\d+)\)", str(error))
            code = int(number[1]) if number else errno.EIO
            raise OSError(code, os.strerror(code) if number else str(error), str(path)) from error


def write_safetensors_in_parts(
    path: Path,
    entries: Mapping[str, tuple[str, Sequence[int], int]],
    parts_of: Callable[[str], Iterable[bytes | memoryview]],
    metadata: Mapping[str, str] | None,
) -> None:
    """Writes a safetensors file atomically, without its tensors ever being in memory together.

    Args:
        path: where to.
        entries: name -> dtype in the format's words (``BF16``), shape, size in bytes; in the file's order.
        parts_of: gives a tensor's bytes (little-endian, contiguous) in one or more parts; called in that order.
        metadata: string metadata.

    Raises:
        RuntimeError: the parts of a tensor are not of the size that its entry says.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape, size) in entries.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (_, _, size) in entries.items():
            written = sum(file.write(part) for part in parts_of(name))
            if written != size:
                raise RuntimeError(f"{name}: {written} bytes instead of {size}")


def write_with(path: Path, write: Callable[[Path], None]) -> None:
    """Calls ``write`` with a temporary path and moves what it wrote to ``path``."""
    with replacing(path) as temporary:
        write(temporary)


def sha256_of_file(path: Path) -> str:
    """Returns the SHA-256 of a file's content as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """Returns the JSON header of a safetensors file and the offset of its first data byte.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no safetensors file (the message says why).
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length == 0 or 8 + length > size or length > 100 * 2**20:
            raise ValueError("it does not begin with a safetensors header")
        try:
            header = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError("its safetensors header is not valid JSON") from error
    if not isinstance(header, dict):
        raise ValueError("its safetensors header is not a JSON object")
    if header.get("__metadata__", {}) is None:  # which the format's own reader takes for none
        del header["__metadata__"]
    return header, 8 + length


def check_writable(flag: str, folder: Path) -> None:
    """Makes a folder, and makes sure that files can be written to it, before hours are spent on what goes there.

    Raises:
        SettingsError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise SettingsError(f"{flag}: {folder} cannot be written to ({reason}); give another folder") from error


def prepare_target(flag: str, target: Path) -> None:
    """Makes sure that a file can be written, says where it stands already, and removes what killed writers left of it.

    Raises:
        SettingsError: its folder cannot be written to.
    """
    check_writable(flag, target.parent)
    if target.exists():
        logger.info("%s of %s is overwritten", target, written_at(target))
    remove_leftovers(target.parent, lambda name: name == target.stem, lambda _: False)
