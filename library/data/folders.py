"""Which files of a folder are pictures, and which sub-folders say how often theirs are repeated; nothing is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_ALWAYS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
CACHE_FOLDER = "lumina_cache"


@cache
def _optional_extensions() -> frozenset[str]:
    """Returns the further extensions that this Pillow can read."""
    from PIL import Image

    Image.init()
    return frozenset({".avif", ".jxl"} & set(Image.EXTENSION))


def is_picture(name: str) -> bool:
    """Tells whether a file name has the extension of a picture, in any case; hidden files are none."""
    extension = os.path.splitext(name)[1].lower()  # noqa: PTH122 - a Path per name would cost more than the test
    if name.startswith("."):
        return False
    return extension in _ALWAYS or (extension in (".avif", ".jxl") and extension in _optional_extensions())


def pictures(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yields the pictures of one folder (not of its sub-folders) in the file system's order."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_picture(entry.name) and entry.is_file():
                yield entry


def first_picture(folder: Path) -> Path | None:
    """Returns some picture of the folder, or ``None`` where it has none."""
    entry = next(pictures(folder), None)
    return Path(entry.path) if entry else None


def named_subfolders(folder: Path) -> tuple[list[tuple[Path, int, str]], list[str]]:
    """Returns (folder, repeats, class tokens) of each sub-folder ``N_name``, sorted, and the names of the others."""
    named, others = [], []
    with os.scandir(folder) as entries:
        sub_folders = [Path(entry.path) for entry in entries if entry.is_dir()]
    for sub_folder in sorted(sub_folders):
        count, _, class_tokens = sub_folder.name.partition("_")
        if count.isascii() and count.isdigit():
            named.append((sub_folder, int(count), class_tokens))
        elif sub_folder.name != CACHE_FOLDER and not sub_folder.name.startswith("."):
            others.append(sub_folder.name)
    return named, others
