"""Loss masks: which picture has one, and mask pictures and alpha channels -> weights of latent cells.

A mask is resized and cut exactly as its picture, from its own size, and then averaged over the 8 x 8 pixels of each
latent cell. The averages are made of whole numbers, so a mirrored mask is the mask mirrored, to the last bit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from library.data import images
from library.data.buckets import Placement, Size
from library.data.cache_places import CachePlaces
from library.data.folders import pictures
from library.data.items import Item
from library.data.picture_index import FileState
from library.data.prefetch import prefetch
from library.data.sharing import Sharing
from library.errors import DatasetError, some

logger = logging.getLogger(__name__)

CELL_PX = 8  # pixels of a latent cell's side
_WHITE = 255

# Filters that never give more than the brightest pixel or less than the darkest one.
_WITHOUT_RINGING = ("box", "bilinear", "nearest")

# Extensions of pictures that cannot hold transparency.
_ALWAYS_OPAQUE = (".jpg", ".jpeg", ".bmp")


@dataclass(frozen=True, slots=True)
class MaskSource:
    """Where a picture's mask comes from; with both, it is their product.

    Attributes:
        file: a picture, bright where the loss counts.
        alpha_of: a picture that is trained on, transparent where the loss does not count.
    """

    file: Path | None
    alpha_of: Path | None

    def __str__(self) -> str:
        return str(self.file or self.alpha_of)


class MaskSources:
    """Which pictures have masks, for all folders of a run."""

    def __init__(self, items: Sequence[Item], masked_loss: bool) -> None:
        """Looks for the mask of every picture, and warns of pictures without one and of masks without a picture.

        Args:
            items: all pictures of the run, held-out ones too.
            masked_loss: whether ``--masked_loss`` is given.

        Raises:
            DatasetError: a mask folder cannot be read.
        """
        self._files: dict[int, str] = {}
        folders: dict[Path, _MaskFolder] = {}
        without = []
        for item in items:
            folder = item.subset.conditioning_data_dir
            if folder is None:
                continue
            if folder not in folders:
                folders[folder] = _MaskFolder(folder)
            name = folders[folder].mask_of(item.path)
            if name is None:
                without.append(item.path.name)
            else:
                self._files[item.index] = name
        if without:
            logger.warning(
                "%d pictures have no mask of the same name in conditioning_data_dir and are trained whole: %s",
                len(without),
                some(without),
            )
        unused = [path for folder in folders.values() for path in folder.unused()]
        if unused:
            logger.warning("%d masks belong to no picture that is used: %s", len(unused), some(unused))
        _warn_of_no_effect(items, masked_loss)

    def of(self, item: Item) -> MaskSource | None:
        """Returns where the mask of a picture comes from, or ``None`` where it is trained whole."""
        file = self.file_of(item) if self.has_file(item) else None
        if file is None and not item.subset.alpha_mask:
            return None
        return MaskSource(file, item.path if item.subset.alpha_mask else None)

    def has_file(self, item: Item) -> bool:
        """Tells whether a picture has a mask picture."""
        return item.index in self._files

    def file_of(self, item: Item) -> Path:
        """Returns the mask picture of a picture that has one."""
        folder = item.subset.conditioning_data_dir
        if folder is None or not self.has_file(item):
            raise RuntimeError(f"{item.path} has no mask picture")
        return folder / self._files[item.index]

    def check_sizes(self, items: Iterable[Item], places: CachePlaces, num_workers: int, show_progress: bool) -> None:
        """Looks at the size of every mask picture, and has a row for each in the indexes afterwards.

        Args:
            items: the pictures.
            places: where sizes may be known from an earlier run.
            num_workers: threads that open masks.
            show_progress: with a progress bar.

        Raises:
            DatasetError: a mask cannot be read, or has another shape than its picture.
        """
        with_file = [item for item in items if self.has_file(item)]
        for folder in {self.file_of(item).parent for item in with_file}:
            places.index(folder)  # read here: two threads would each read one, and rows of one would be lost

        def read(item: Item) -> tuple[Path, Size, FileState | None]:
            path = self.file_of(item)
            try:
                stat = path.stat()
                state = FileState(stat.st_size, stat.st_mtime_ns)
                known = places.index(path.parent).size_of(path.name, state)
                return (path, known, None) if known else (path, images.read_size(path), state)
            except images.BROKEN_PICTURE as error:
                raise broken_mask(path, error) from error

        results = prefetch(with_file, read, num_workers)
        hidden = not (show_progress and with_file)
        bar = tqdm(results, total=len(with_file), desc="Looking at masks", unit="mask", disable=hidden)
        wrong = []
        for item, (path, size, new_state) in zip(with_file, bar, strict=True):
            if new_state is not None:
                places.index(path.parent).put(path.name, new_state, size)
            if not _same_shape(size, item.size_px):
                wrong.append((item, path, size))
        if wrong:
            raise _wrong_shape(*wrong[0], num_more=len(wrong) - 1)


class _MaskFolder:
    """The mask pictures of one folder, and which of them are used."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._names = sorted(entry.name for entry in pictures(folder))
        except OSError as error:
            raise DatasetError(
                f"conditioning_data_dir: {folder} cannot be read ({error.strerror or error}); give the folder of the"
                " mask pictures."
            ) from error
        self._by_stem = {PurePath(name).stem: name for name in reversed(self._names)}
        self._all = set(self._names)
        self._used: set[str] = set()

    def mask_of(self, picture: Path) -> str | None:
        """Returns the name of a picture's mask: of the same name, else with another extension."""
        name = picture.name if picture.name in self._all else self._by_stem.get(picture.stem)
        if name is not None:
            self._used.add(name)
        return name

    def unused(self) -> list[str]:
        return [str(self._folder / name) for name in self._names if name not in self._used]


def _warn_of_no_effect(items: Sequence[Item], masked_loss: bool) -> None:
    if masked_loss and not any(item.subset.conditioning_data_dir or item.subset.alpha_mask for item in items):
        logger.warning(
            "--masked_loss has no effect: there are no masks; give a folder of mask pictures (conditioning_data_dir), or"
            " use the pictures' transparency (alpha_mask)"
        )
    alpha = [item for item in items if item.subset.alpha_mask]
    if alpha and all(PurePath(item.name).suffix.lower() in _ALWAYS_OPAQUE for item in alpha):
        logger.warning(
            "alpha_mask has no effect: all %d pictures are of kinds without transparency (%s), so they are trained"
            " whole; use PNG or WebP",
            len(alpha),
            ", ".join(sorted({PurePath(item.name).suffix.lower() for item in alpha})),
        )


def _same_shape(mask: Size, picture: Size) -> bool:
    """Tells whether one is the other resized, give or take a pixel of the smaller one."""
    return abs(mask[0] * picture[1] - mask[1] * picture[0]) <= max(*mask, *picture)


def _wrong_shape(item: Item, path: Path, size: Size, num_more: int) -> DatasetError:
    turned = (size[1], size[0])
    remedy = "make it again from the picture"
    if _same_shape(turned, item.size_px):
        remedy = "turn it: pictures are used upright, as their EXIF orientation says and as viewers show them"
    more = f" {num_more} more masks do not fit either." if num_more else ""
    return DatasetError(
        f"The mask {path} is {size[0]} x {size[1]} pixels and its picture {item.path} {item.size_px[0]} x"
        f" {item.size_px[1]}: their shapes differ, so it would cover other parts than were meant; {remedy}.{more}"
    )


def broken_mask(source: MaskSource | Path, error: BaseException) -> DatasetError:
    """Returns the error for a mask that cannot be read."""
    return DatasetError(
        f"The mask {source} cannot be read ({images.reason(error)}); make it again, or remove it to train the whole"
        " picture."
    )


def load_mask(source: MaskSource, placement: Placement, interpolation: str | None) -> torch.Tensor:
    """Returns the weights of a picture's latent cells.

    Args:
        source: the mask picture, the picture with transparency, or both.
        placement: what happens to the picture.
        interpolation: the user's ``resize_interpolation``, which masks share where it does not overshoot.

    Returns:
        (h, w) float32 in [0, 1]; ones where a picture has no alpha channel.

    Raises:
        DatasetError: a file cannot be read.
    """
    width, height = placement.bucket_px
    weights = np.full((height, width), _WHITE * _WHITE, dtype=np.int32)
    try:
        for image in _layers(source):
            layer = images.placed(image, placement, _method(interpolation, image.size, placement.resized_px))
            weights = weights * np.asarray(layer, dtype=np.int32) // _WHITE
    except images.BROKEN_PICTURE as error:
        raise broken_mask(source, error) from error
    cells = weights.reshape(height // CELL_PX, CELL_PX, width // CELL_PX, CELL_PX).sum(axis=(1, 3))
    return torch.from_numpy(cells / (CELL_PX * CELL_PX * _WHITE * _WHITE)).to(torch.float32)


def _layers(source: MaskSource) -> list[Image.Image]:
    layers = [images.open_mask(source.file)] if source.file else []
    alpha = images.open_alpha(source.alpha_of) if source.alpha_of else None
    return layers if alpha is None else [*layers, alpha]


def _method(interpolation: str | None, size: Size, resized: Size) -> str:
    """Returns the filter for a mask: the picture's, or bilinear in place of one that rings."""
    method = images.resize_method(interpolation, size, resized)
    return method if method == "none" or method in _WITHOUT_RINGING else "bilinear"


def check_masks(sources: MaskSources, items: Sequence[Item], num_workers: int, sharing: Sharing) -> None:
    """Reads every mask once, for runs that read them in every epoch; warns of masks that leave nothing to train.

    All processes call it: each reads a part.

    Raises:
        DatasetError: one cannot be read.
    """
    masked = [item.index for item in items if sources.of(item) is not None]
    by_index = {item.index: item for item in items}

    def is_empty(index: int) -> bool:
        item = by_index[index]
        source = sources.of(item)
        return source is not None and not bool(
            load_mask(source, item.placement, item.subset.resize_interpolation).any()
        )

    mine = sharing.share(masked)
    results = prefetch(mine, is_empty, num_workers)
    with sharing.bar(len(masked), "Checking masks", "mask") as bar:
        empty = [index for index, is_black in zip(mine, bar.over(results), strict=True) if is_black]
    found = sharing.union(empty)
    warn_of_empty([str(sources.of(by_index[index])) for index in found])


def warn_of_empty(names: Sequence[str]) -> None:
    """Warns once of masks that are 0 everywhere."""
    if names:
        logger.warning(
            "%d masks are black (or wholly transparent) where their pictures are cut out, so nothing is learned from"
            " these pictures: %s",
            len(names),
            some(names),
        )
