"""Where on disk the cached things of a picture folder go."""

from __future__ import annotations

import logging
from pathlib import Path

from library.data.folders import CACHE_FOLDER
from library.data.picture_index import PictureIndex
from library.data.stores import digest_of
from library.settings import expanded

logger = logging.getLogger(__name__)


class CachePlaces:
    """Which folder on disk belongs to which picture folder, and the picture indexes in them."""

    def __init__(self, cache_dir: Path | None) -> None:
        self._cache_dir = expanded(cache_dir, "--cache_dir") if cache_dir else None
        self._folders: dict[Path, Path] = {}
        self._indexes: dict[Path, PictureIndex] = {}
        self._kept: set[Path] = set()
        self._told: set[Path | None] = set()

    def folder(self, image_dir: Path) -> Path:
        """Returns the cache folder for the pictures of ``image_dir``."""
        if image_dir not in self._folders:
            self._folders[image_dir] = self._cache_dir or image_dir / CACHE_FOLDER
        return self._folders[image_dir]

    def keep_index(self, image_dir: Path) -> None:
        """Has the index of ``image_dir`` kept on disk; to be called before the index is used."""
        self._kept.add(image_dir)

    def index(self, image_dir: Path) -> PictureIndex:
        """Returns the index of ``image_dir``: one that lasts as long as the run, or is read from disk the first time."""
        if image_dir not in self._indexes:
            self._indexes[image_dir] = self._load(image_dir) if image_dir in self._kept else PictureIndex(None)
        return self._indexes[image_dir]

    def _load(self, image_dir: Path) -> PictureIndex:
        name = "pictures.json"
        if self._cache_dir:
            # One folder for several picture folders: each has an index of its own.
            name = f"pictures-{digest_of(str(image_dir.resolve())).hex()[:12]}.json"
        return PictureIndex.load(self.folder(image_dir) / name)

    def save_indexes(self) -> None:
        """Writes the kept indexes that changed; a folder that cannot be written to is warned about once."""
        for index in self._indexes.values():
            try:
                index.save()
            except OSError as error:
                if index.path in self._told:
                    continue
                self._told.add(index.path)
                logger.warning(
                    "%s cannot be written (%s), so changed pictures are looked at again at the next start; "
                    "--cache_dir gives another folder.",
                    index.path,
                    error.strerror or error,
                )
