"""SHA-256 over the content of picture files, made once for each file and kept in the picture indexes."""

from __future__ import annotations

from collections.abc import Sequence

from library import files
from library.data import images
from library.data.cache_places import CachePlaces
from library.data.items import Item
from library.data.picture_index import FileState
from library.data.prefetch import prefetch
from library.data.sharing import Sharing


def hash_contents(items: Sequence[Item], places: CachePlaces, sharing: Sharing, num_workers: int) -> dict[int, str]:
    """Brings the content hashes in the indexes up to date and returns the pictures that cannot be read, with the reason.

    The indexes hold a row for every picture; a row without a hash is new or changed since the last run. All processes call
    this: each hashes a part, and all know every hash afterwards.

    Args:
        items: pictures, the same on every process.
        places: has the indexes; those that are kept are written to disk.
        sharing: who shares the work.
        num_workers: threads that read.
    """
    of_file: dict[str, list[Item]] = {}
    for item in items:
        if places.index(item.subset.image_dir).hash_of(item.name) is None:
            of_file.setdefault(str(item.path), []).append(item)
    todo = {same[0].index: same for same in of_file.values()}
    everything = sharing.union(todo)
    mine = sharing.share(everything)
    rows: list[tuple[int, FileState, bytes | str]] = []
    with sharing.bar(len(everything), "Hashing pictures", "picture") as bar:
        for row in prefetch(mine, lambda index: _hash(todo[index][0]), num_workers):
            rows.append(row)
            bar.update()
    unreadable = {}
    for index, state, content in sharing.together(rows):
        for item in todo[index]:
            if isinstance(content, str):
                unreadable[item.index] = content
            else:
                places.index(item.subset.image_dir).put(item.name, FileState(*state), item.size_px, content)
    if sharing.rank == 0:
        places.save_indexes()
    return unreadable


def content_of(item: Item, places: CachePlaces) -> bytes:
    """Returns the SHA-256 of a picture that :func:`hash_contents` has seen."""
    content = places.index(item.subset.image_dir).hash_of(item.name)
    if content is None:
        raise RuntimeError(f"{item.path} was not hashed")
    return content


def _hash(item: Item) -> tuple[int, FileState, bytes | str]:
    """Returns (index, state, content hash of a picture file, or what is wrong with the file)."""
    path = item.path
    try:
        # The state before reading: should the file change meanwhile, the next start sees a different one.
        stat = path.stat()
        content = bytes.fromhex(files.sha256_of_file(path))
    except OSError as error:
        return item.index, FileState(0, 0), images.reason(error)
    return item.index, FileState(stat.st_size, stat.st_mtime_ns), content
