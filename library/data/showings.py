"""What one showing of a picture looks like to the model: its pixels, and the mask of what counts in the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from library.data import augment, images
from library.data.buckets import Placement
from library.data.cache_places import CachePlaces
from library.data.config import DatasetConfig
from library.data.items import Draw, Item
from library.data.mask_cache import MaskCache
from library.data.masks import MaskSources, check_masks, load_mask
from library.data.settings import DataSettings
from library.data.sharing import Sharing
from library.errors import DatasetError


class Showings:
    """Draws -> pixels and masks, for all pictures of a run.

    Args:
        items: all pictures, held-out ones too.
        datasets: their settings.
        settings: of the run.
        places: has the indexes of mask folders, and the folders of masks that are kept on disk.

    Raises:
        DatasetError: a mask folder cannot be read.
    """

    def __init__(
        self, items: Sequence[Item], datasets: Sequence[DatasetConfig], settings: DataSettings, places: CachePlaces
    ) -> None:
        self._datasets = datasets
        self._num_workers = settings.max_data_loader_n_workers
        self._places = places
        self._sources = MaskSources(items, settings.masked_loss)
        self._cache: MaskCache | None = None
        if settings.cache_latents:
            image_dirs = [subset.image_dir for config in datasets for subset in config.subsets]
            on_disk = settings.cache_latents_to_disk
            self._cache = MaskCache(self._sources, places if on_disk else None, image_dirs, self._num_workers)
            for subset in (subset for config in datasets for subset in config.subsets):
                if on_disk and subset.conditioning_data_dir is not None:
                    places.keep_index(subset.conditioning_data_dir)

    def check(self, items: Sequence[Item], sharing: Sharing) -> None:
        """Finds out whether masks fit their pictures and can be read, and which pictures have no face to be cut out.

        Masks that will be cached are not read now. All processes call it.

        Args:
            items: pictures that can be read, the same on every process.
            sharing: who shares the work.

        Raises:
            DatasetError: a mask cannot be read, or has another shape than its picture.
        """
        augment.warn_of_missing_faces(items)
        self._sources.check_sizes(items, self._places, self._num_workers, sharing.show_progress)
        if self._cache is None:
            check_masks(self._sources, items, self._num_workers, sharing)

    def fill_masks(self, items: Sequence[Item], sharing: Sharing) -> None:
        """Caches the masks that are missing, if latents are cached. All processes call it.

        Raises:
            DatasetError: a mask cannot be read, or nothing can be written.
        """
        if self._cache is not None:
            self._cache.fill(items, sharing)

    def placement(self, draw: Draw) -> Placement:
        """Returns how a showing is resized and cut out."""
        return augment.placement_of(draw, self._datasets[draw.item.dataset_index].enable_bucket)

    def pixels(self, draw: Draw) -> torch.Tensor:
        """Returns the pixels (3, H, W) float32 in [-1, 1] of a showing, read from the file.

        Raises:
            DatasetError: the picture cannot be read.
        """
        item = draw.item
        try:
            pixels = images.load_pixels(item.path, self.placement(draw), item.subset.resize_interpolation)
        except images.BROKEN_PICTURE as error:
            raise DatasetError(
                f"The picture {item.path} cannot be read ({images.reason(error)}); mend it, or take it out of its folder."
            ) from error
        change = augment.colour_change(draw)
        if change is not None:
            pixels = augment.with_colours(pixels, change)
        return pixels.flip(-1) if draw.flip else pixels

    def mask(self, draw: Draw) -> torch.Tensor | None:
        """Returns the loss mask (h, w) float32 in [0, 1] of a showing, or ``None`` where the whole picture counts.

        Raises:
            DatasetError: the mask cannot be read.
        """
        if self._cache is None or self._sources.of(draw.item) is None:
            return self.read_mask(draw)
        mask = self._cache.get(draw.item)
        return mask.flip(-1) if draw.flip else mask

    def read_mask(self, draw: Draw) -> torch.Tensor | None:
        """Returns what :meth:`mask` returns, always from the file.

        Raises:
            DatasetError: the mask cannot be read.
        """
        source = self._sources.of(draw.item)
        if source is None:
            return None
        mask = load_mask(source, self.placement(draw), draw.item.subset.resize_interpolation)
        return mask.flip(-1) if draw.flip else mask

    def masks(self, draws: Sequence[Draw]) -> torch.Tensor | None:
        """Returns the masks (B, h, w) of showings of one bucket, ones for those without; ``None`` where none has one."""
        masks = [self.mask(draw) for draw in draws]
        shape = next((mask.shape for mask in masks if mask is not None), None)
        if shape is None:
            return None
        return torch.stack([torch.ones(shape) if mask is None else mask for mask in masks])
