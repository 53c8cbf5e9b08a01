"""The one place that writes files, and the hashes of files.

Whatever this program leaves on disk is written beside its final name and then moved there, so that a run that is killed
half-way leaves either the old file or the new one, never a torn one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import SettingsError

if TYPE_CHECKING:
    import torch

_CHUNK_BYTES = 8 * 2**20


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path in the folder of ``path`` and moves it to ``path`` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept: some writers choose the format by it.
    handle, name = tempfile.mkstemp(prefix=f".{path.stem[:40]}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files for the owner alone; give what an ordinary open() would have given.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


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
            raise OSError(errno.EIO, str(error), str(path)) from error


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
