"""Warnings of pictures that are trained smaller than the resolution asks, or enlarged much."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

from library.data.buckets import BucketChooser, Placement, Size
from library.data.config import DatasetConfig
from library.data.items import Item

logger = logging.getLogger(__name__)

_LEAST_SHARE = 0.9  # of the area: steps of 64 px alone take some percent
_MOST_ENLARGED = 1.5  # in length: what was one pixel fills two and more


def warn_of_sizes(datasets: Sequence[DatasetConfig], items: Sequence[Item]) -> None:
    """Warns of both kinds, each once a dataset with its worst example; regularisation pictures count too.

    Args:
        datasets: of the run.
        items: their pictures.
    """
    of_dataset: list[list[Item]] = [[] for _ in datasets]
    for item in items:
        of_dataset[item.dataset_index].append(item)
    for number, (config, own) in enumerate(zip(datasets, of_dataset, strict=True), start=1):
        placements = {item.size_px: item.placement for item in own}
        _warn_of_shrunk(f"Dataset {number}", config, own, placements)
        _warn_of_enlarged(f"Dataset {number}", config, own, placements)


def _warn_of_shrunk(
    where: str, config: DatasetConfig, items: Sequence[Item], placements: dict[Size, Placement]
) -> None:
    """Warns where ``max_bucket_reso`` leaves no bucket of the resolution's area that fits the picture's shape."""
    if not config.enable_bucket or config.bucket_no_upscale:
        return
    area = math.prod(config.resolution)
    shortest = max(config.min_bucket_reso // config.bucket_reso_steps, 1) * config.bucket_reso_steps
    longest = max(config.max_bucket_reso, area // shortest)
    unlimited = BucketChooser(dataclasses.replace(config, max_bucket_reso=longest))
    shares: dict[Size, float] = {}
    wanted: dict[Size, Size] = {}
    for size, placement in placements.items():
        # No bucket is larger than the resolution, no picture has more to lose than it is large, and one that is enlarged
        # all the same loses nothing.
        most = min(area, math.prod(size))
        if math.prod(placement.bucket_px) >= _LEAST_SHARE * most or placement.resized_px[0] >= size[0]:
            continue
        better = unlimited.place(*size)
        share = math.prod(placement.bucket_px) / math.prod(better.bucket_px) if better else 1.0
        if better and share < _LEAST_SHARE:
            shares[size], wanted[size] = share, better.bucket_px
    if not shares:
        return
    count, example = _counted(items, shares, min(shares, key=shares.__getitem__))
    logger.warning(
        "%s: %d of %d pictures are made smaller than the resolution asks, because max_bucket_reso is %d: %s (%s) becomes %s"
        " instead of %s, %.2f of the area; max_bucket_reso %d is enough for all of them",
        where,
        count,
        len(items),
        config.max_bucket_reso,
        example.name,
        _text(example.size_px),
        _text(example.bucket_px),
        _text(wanted[example.size_px]),
        shares[example.size_px],
        max(max(bucket) for bucket in wanted.values()),
    )


def _warn_of_enlarged(
    where: str, config: DatasetConfig, items: Sequence[Item], placements: dict[Size, Placement]
) -> None:
    factors = {size: placement.resized_px[0] / size[0] for size, placement in placements.items()}
    factors = {size: factor for size, factor in factors.items() if factor > _MOST_ENLARGED}
    if not factors:
        return
    count, example = _counted(items, factors, max(factors, key=factors.__getitem__))
    logger.warning(
        "%s: %d of %d pictures are enlarged more than %g times and so trained blurred: %s (%s) becomes %s, %.1f times;"
        " take larger pictures, a lower resolution, or %s",
        where,
        count,
        len(items),
        _MOST_ENLARGED,
        example.name,
        _text(example.size_px),
        _text(example.resized_px),
        factors[example.size_px],
        "bucket_no_upscale" if config.enable_bucket else "enable_bucket with bucket_no_upscale",
    )


def _counted(items: Sequence[Item], sizes: dict[Size, float], worst: Size) -> tuple[int, Item]:
    """Returns how many pictures have one of the sizes, and the first of those that have the worst."""
    return sum(item.size_px in sizes for item in items), next(item for item in items if item.size_px == worst)


def _text(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
