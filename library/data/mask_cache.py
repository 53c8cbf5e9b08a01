"""Masks of latent cells, read once, in memory or on disk beside the latents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from library import files
from library.data import images
from library.data.buckets import Size
from library.data.cache import exchange, not_shared
from library.data.cache_places import CachePlaces
from library.data.items import Item
from library.data.masks import CELL_PX, MaskSource, MaskSources, broken_mask, load_mask, warn_of_empty
from library.data.picture_index import FileState
from library.data.prefetch import prefetch
from library.data.sharing import Sharing
from library.data.stores import Digest, DiskStore, MemoryStore, Store, digest_of

# Part of every digest: raise it when masks are made differently.
_VERSION = 1


class MaskCache:
    """Masks (h, w) float32 of pictures that are cut out at one place, not mirrored.

    A mask that is 0 everywhere is not kept on disk: so it is found, and named, at every start.

    Args:
        sources: which pictures have masks.
        places: where entries and content hashes are kept on disk; ``None`` keeps masks in memory.
        image_dirs: the picture folders.
        num_workers: threads that read masks.
    """

    def __init__(
        self, sources: MaskSources, places: CachePlaces | None, image_dirs: Iterable[Path], num_workers: int
    ) -> None:
        self._sources = sources
        self._places = places
        self._num_workers = num_workers
        self._disk: DiskStore | None = None
        if places:
            self._disk = DiskStore("masks", [places.folder(folder) for folder in image_dirs], torch.float32)
        self._store: Store = self._disk or MemoryStore(torch.float32)
        self._empty: set[int] = set()

    def fill(self, items: Sequence[Item], sharing: Sharing) -> None:
        """Reads the masks that are missing. All processes call it, after pictures have been hashed.

        Args:
            items: all pictures that can be read, the same on every process.
            sharing: who shares the work.

        Raises:
            DatasetError: a mask cannot be read, or the cache folder cannot be written to.
        """
        masked = {item.index: item for item in items if self._sources.of(item) is not None}
        if not masked:
            return
        self._hash_files(masked, sharing)
        self._store.refresh()
        missing = sharing.union(index for index, item in masked.items() if self._digest(item) not in self._store)
        if self._disk and self._places:
            for image_dir in {masked[index].subset.image_dir for index in missing}:
                self._disk.check_writable(self._places.folder(image_dir))
        mine = sharing.share(missing)
        made: list[Digest] = []
        empty: list[int] = []
        with sharing.bar(len(missing), "Caching masks", "mask") as bar:
            for index, mask in prefetch(mine, lambda index: (index, self._load(masked[index])), self._num_workers):
                if bool(mask.any()):
                    item = masked[index]
                    folder = self._places.folder(item.subset.image_dir) if self._places else None
                    self._store.put(self._digest(item), mask, folder)
                    made.append(self._digest(item))
                else:
                    empty.append(index)
                bar.update()
        exchange(self._store, made, sharing)
        self._empty = set(sharing.union(empty))
        warn_of_empty([str(self._sources.of(masked[index])) for index in sorted(self._empty)])
        if any(self._digest(masked[index]) not in self._store for index in missing if index not in self._empty):
            raise not_shared()

    def get(self, item: Item) -> torch.Tensor:
        """Returns the mask (h, w) float32 of a picture that has one; ``fill`` came before."""
        if item.index in self._empty:
            width, height = item.bucket_px
            return torch.zeros(height // CELL_PX, width // CELL_PX)
        return self._store.get(self._digest(item))

    def _load(self, item: Item) -> torch.Tensor:
        return load_mask(self._source(item), item.placement, item.subset.resize_interpolation)

    def _source(self, item: Item) -> MaskSource:
        source = self._sources.of(item)
        if source is None:
            raise RuntimeError(f"{item.path} has no mask")
        return source

    def _digest(self, item: Item) -> Digest:
        if self._places is None:
            return digest_of("mask in memory", item.index)
        source, subset = self._source(item), item.subset
        contents = []
        if source.file:
            contents.append(("file", self._places.index(source.file.parent).hash_of(source.file.name)))
        if source.alpha_of:
            contents.append(("alpha", self._places.index(subset.image_dir).hash_of(item.name)))
        return digest_of(
            "masks",
            _VERSION,
            images.PIXELS_VERSION,
            [(kind, content.hex() if content else "") for kind, content in contents],
            item.resized_px,
            item.bucket_px,
            subset.resize_interpolation,
        )

    def _hash_files(self, masked: dict[int, Item], sharing: Sharing) -> None:
        """Brings the content hashes of mask pictures up to date, on every process."""
        if self._places is None:
            return
        paths = {index: self._sources.file_of(item) for index, item in masked.items() if self._sources.has_file(item)}
        places = self._places
        todo = sharing.union(
            index for index, path in paths.items() if places.index(path.parent).hash_of(path.name) is None
        )
        mine = sharing.share(todo)
        results = prefetch(mine, lambda index: (index, *_hash(paths[index])), self._num_workers)
        with sharing.bar(len(todo), "Hashing masks", "mask") as bar:
            rows = list(bar.over(results))
        for index, state, size, content in sharing.together(rows):
            places.index(paths[index].parent).put(paths[index].name, FileState(*state), size, content)
        if sharing.rank == 0:
            places.save_indexes()


def _hash(path: Path) -> tuple[FileState, Size, bytes]:
    """Returns (state, size, content hash) of a mask picture.

    Raises:
        DatasetError: the file cannot be read.
    """
    try:
        # The state before reading: should the file change meanwhile, the next start sees a different one.
        stat = path.stat()
        content = bytes.fromhex(files.sha256_of_file(path))
        return FileState(stat.st_size, stat.st_mtime_ns), images.read_size(path), content
    except images.BROKEN_PICTURE as error:
        raise broken_mask(path, error) from error
