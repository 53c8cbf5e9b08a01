"""Settings as others may see them: without the folders of paths, which tell a user's name and disks."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any


def without_folders(value: Any) -> Any:
    """Returns a setting's value with every path in it cut to its last part; tuples become lists."""
    if isinstance(value, (tuple, list)):
        return [without_folders(part) for part in value]
    if isinstance(value, Path) or (isinstance(value, str) and _is_path(value)):
        return Path(value).name
    return value


def _is_path(text: str) -> bool:
    return PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute() or text.startswith(("~/", "~\\"))
