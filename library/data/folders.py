"""Which files of a folder are pictures, and which sub-folders say how often theirs are repeated; nothing is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from library.errors import some

_ALWAYS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
# Named where they lie among pictures, as their owner may think that they are trained on.
_NOT_READ = frozenset(
    {".gif", ".tif", ".tiff", ".jfif", ".jpe", ".jp2", ".heic", ".heif", ".svg", ".psd", ".tga", ".avif", ".jxl"}
)
CACHE_FOLDER = "lumina_cache"


@cache
def _optional_extensions() -> frozenset[str]:
    """Returns the further extensions that this Pillow can read."""
    from PIL import Image

    Image.init()
    return frozenset({".avif", ".jxl"} & set(Image.EXTENSION))


def is_picture(name: str) -> bool:
    """Tells whether a file name has the extension of a picture, in any case; hidden files are none."""
    extension = _stem_and_kind(name)[1]
    if name.startswith("."):
        return False
    return extension in _ALWAYS or (extension in (".avif", ".jxl") and extension in _optional_extensions())


class Listing(NamedTuple):
    """The files of one folder."""

    pictures: list[str]
    """Sorted."""
    not_read: list[str]
    """Pictures of kinds that are not read and that have no copy among those that are, sorted."""
    others: set[str]
    """All other names."""


def listing(folder: Path) -> Listing:
    """Returns the names in a folder (not in its sub-folders)."""
    names, others = [], set()
    with os.scandir(folder) as entries:
        for entry in entries:
            if not is_picture(entry.name):
                others.add(entry.name)
            elif entry.is_file():
                names.append(entry.name)
    not_read = [name for name in others if _stem_and_kind(name)[1] in _NOT_READ and not name.startswith(".")]
    if not_read:
        stems = {_stem_and_kind(name)[0] for name in names}
        not_read = sorted(name for name in not_read if _stem_and_kind(name)[0] not in stems)
    return Listing(sorted(names), not_read, others.difference(not_read))


def _stem_and_kind(name: str) -> tuple[str, str]:
    stem, extension = os.path.splitext(name)  # noqa: PTH122 - a Path per name would cost more than the test
    return stem, extension.lower()


def not_read_note(not_read: list[str]) -> str:
    """Returns what is said of pictures of kinds that are not read, of which there are some."""
    count = "1 picture is" if len(not_read) == 1 else f"{len(not_read)} pictures are"
    return f"{count} of a kind that is not read: {some(not_read)}; save as .png or .jpg (a .jfif needs only that name)"


def why_no_pictures(folder: Path) -> str:
    """Returns ``"; ..."`` where a folder without pictures holds some of kinds that are not read, else ``""``."""
    not_read = listing(folder).not_read
    return f"; {not_read_note(not_read)}" if not_read else ""


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


def repeats_and_words(folder: Path) -> tuple[int | None, str]:
    """Returns what the name of a folder says, ``N_words``; repeats are ``None`` where it has no number in front."""
    count, _, words = folder.name.partition("_")
    return (int(count), words) if count.isascii() and count.isdigit() else (None, "")


def named_subfolders(folder: Path) -> tuple[list[tuple[Path, int, str]], list[str]]:
    """Returns (folder, repeats, class tokens) of each sub-folder ``N_name``, sorted, and the names of the others."""
    named, others = [], []
    with os.scandir(folder) as entries:
        sub_folders = [Path(entry.path) for entry in entries if entry.is_dir()]
    for sub_folder in sorted(sub_folders):
        repeats, class_tokens = repeats_and_words(sub_folder)
        if repeats is not None:
            named.append((sub_folder, repeats, class_tokens))
        elif sub_folder.name != CACHE_FOLDER and not sub_folder.name.startswith("."):
            others.append(sub_folder.name)
    return named, others
