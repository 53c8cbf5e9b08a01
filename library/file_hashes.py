"""Hashes over whole files, made once and remembered for as long as a file's size and modification time stay the same.

Model files are gigabytes, and hashing one takes seconds to minutes. What is remembered lies in the user's cache folder
(``XDG_CACHE_HOME``, ``%LOCALAPPDATA%`` or ``~/.cache``) as one small JSON file, which may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from library.files import write_json

logger = logging.getLogger(__name__)


def remembered(kind: str, files: Iterable[Path], compute: Callable[[], str]) -> str:
    """Returns ``compute()``, or what it returned when these files were last asked about and have not changed since.

    Args:
        kind: what is computed, with everything besides the files that it depends on.
        files: what it is computed from.
        compute: makes the hash.

    Raises:
        OSError: a file cannot be looked at.
    """
    identity = hashlib.blake2b(kind.encode(), digest_size=16)
    for file in files:
        state = file.stat()
        identity.update(f"\0{file.resolve()}\0{state.st_size}\0{state.st_mtime_ns}".encode())
    name = identity.hexdigest()
    known = _read()
    if name not in known:
        made = compute()
        # Read again: another process may have written meanwhile.
        known = {**_read(), name: made}
        _write(known)
    return known[name]


def _store() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    base = Path(folder) if folder else Path.home() / ".cache"
    return base / "lumina-lora-trainer" / "file_hashes.json"


def _read() -> dict[str, str]:
    try:
        content = json.loads(_store().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # not there yet, or damaged: hashes are made anew
    return content if isinstance(content, dict) else {}


def _write(known: dict[str, str]) -> None:
    try:
        write_json(_store(), known)
    except OSError as error:
        logger.debug("hashes cannot be remembered in %s: %s", _store(), error)
