"""Folders -> items: which pictures there are, their sizes, captions and buckets."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from library.data import images
from library.data.buckets import BucketChooser, Placement, Size
from library.data.cache_places import CachePlaces
from library.data.captions import read_caption
from library.data.config import DatasetConfig, SubsetConfig
from library.data.folders import pictures
from library.data.items import Item
from library.data.picture_index import PictureIndex, PictureRow
from library.data.prefetch import prefetch
from library.errors import DatasetError, some

logger = logging.getLogger(__name__)


@dataclass
class _Findings:
    """What is worth telling, collected over all folders so that it is told once."""

    unreadable: list[tuple[Path, str]] = field(default_factory=list)
    too_small: list[Path] = field(default_factory=list)
    class_tokens: list[Path] = field(default_factory=list)
    no_caption: list[Path] = field(default_factory=list)
    extensions: set[str] = field(default_factory=set)


def build_items(
    datasets: Sequence[DatasetConfig], places: CachePlaces | None, num_workers: int, show_progress: bool
) -> list[Item]:
    """Returns the pictures of all datasets in a fixed order (datasets, subsets, file names).

    Unreadable pictures, pictures too small for any bucket and missing captions are warned about, each kind once.

    Args:
        datasets: what to look for.
        places: where sizes may be known from an earlier run; ``None`` opens every picture.
        num_workers: threads that open pictures.
        show_progress: with a progress bar.

    Raises:
        DatasetError: no picture is left, or a caption file is broken.
    """
    findings = _Findings()
    items: list[Item] = []
    for dataset_index, config in enumerate(datasets):
        place = _sharing(BucketChooser(config))
        for subset in config.subsets:
            index = places.index(subset.image_dir) if places else None
            for name, size in _sizes(subset.image_dir, index, findings, num_workers, show_progress):
                placement = place(size)
                if placement is None:
                    findings.too_small.append(subset.image_dir / name)
                    continue
                caption = _caption(subset, name, findings)
                items.append(Item(len(items), name, size, placement, caption, subset, dataset_index))
    _report(findings, len(items))
    if not items:
        raise DatasetError("No picture is left to train on: " + _why_none(findings))
    return items


def undecodable(items: Sequence[Item], num_workers: int, show_progress: bool) -> dict[int, str]:
    """Decodes every picture once and returns the indexes of those that fail, with the reason.

    For runs that read the files themselves in every epoch: a truncated one would end such a run hours later.
    """

    def check(item: Item) -> str | None:
        try:
            images.check_decodable(item.path)
        except images.BROKEN_PICTURE as error:
            return images.reason(error)
        return None

    checks = prefetch(items, check, num_workers)
    bar = tqdm(checks, total=len(items), desc="Checking pictures", unit="picture", disable=not show_progress)
    return {item.index: problem for item, problem in zip(items, bar, strict=True) if problem is not None}


def warn_unreadable(pairs: Sequence[tuple[Path, str]]) -> None:
    """Warns once about pictures that are left out, with the first names."""
    if pairs:
        count = (
            "1 picture cannot be read and is" if len(pairs) == 1 else f"{len(pairs)} pictures cannot be read and are"
        )
        logger.warning("%s left out: %s", count, some([f"{path} ({why})" for path, why in pairs]))


def _sharing(chooser: BucketChooser) -> Callable[[Size], Placement | None]:
    """Returns ``chooser.place`` that gives pictures of one size the same object, to save memory."""
    known: dict[Size, Placement | None] = {}

    def place(size: Size) -> Placement | None:
        if size not in known:
            known[size] = chooser.place(*size)
        return known[size]

    return place


def _sizes(
    folder: Path, index: PictureIndex | None, findings: _Findings, num_workers: int, show_progress: bool
) -> Iterator[tuple[str, Size]]:
    """Yields (file name, size) of a folder's readable pictures by name, and keeps the index up to date."""
    names = sorted(entry.name for entry in pictures(folder))
    known: dict[str, Size] = {}
    if index is not None:
        index.keep_only(set(names))
        for name in names:
            row = _row_of(index, folder, name)
            if row is not None:
                known[name] = (row.width_px, row.height_px)

    def read(name: str) -> tuple[str, os.stat_result | None, Size | str]:
        path = folder / name
        try:
            return name, path.stat(), images.read_size(path)
        except images.BROKEN_PICTURE as error:
            return name, None, images.reason(error)

    unknown = [name for name in names if name not in known]
    results = prefetch(unknown, read, num_workers)
    hidden = not (show_progress and unknown)
    for name, stat, size in tqdm(
        results, total=len(unknown), desc=f"Looking at {folder.name}", unit="picture", disable=hidden
    ):
        if isinstance(size, str):
            findings.unreadable.append((folder / name, size))
            continue
        known[name] = size
        if index is not None and stat is not None:
            index.put(name, PictureRow(stat.st_size, stat.st_mtime_ns, *size))
    for name in names:
        if name in known:
            yield name, known[name]


def _row_of(index: PictureIndex, folder: Path, name: str) -> PictureRow | None:
    try:
        return index.get(name, os.stat(os.path.join(folder, name)))  # noqa: PTH116, PTH118 - once per picture, of 100,000
    except OSError:
        return None  # reading its size will say what is wrong with it


def _caption(subset: SubsetConfig, name: str, findings: _Findings) -> str:
    path = subset.image_dir / name
    caption = read_caption(path, subset.caption_extension, subset.enable_wildcard)
    if caption is not None:
        return caption
    findings.extensions.add(subset.caption_extension)
    (findings.class_tokens if subset.class_tokens else findings.no_caption).append(path)
    return subset.class_tokens or ""


def _report(findings: _Findings, num_items: int) -> None:
    warn_unreadable(findings.unreadable)
    if findings.too_small:
        logger.warning(
            "%d pictures are left out: with bucket_no_upscale, a side would be shorter than bucket_reso_steps: %s",
            len(findings.too_small),
            some([str(path) for path in findings.too_small]),
        )
    looked_for = ", ".join(sorted(findings.extensions))
    for paths, instead in ((findings.class_tokens, "their class tokens"), (findings.no_caption, "an empty caption")):
        if paths:
            logger.warning(
                "%d of %d pictures have no caption in a %s file and are trained with %s: %s",
                len(paths),
                num_items,
                looked_for,
                instead,
                some([path.name for path in paths]),
            )


def _why_none(findings: _Findings) -> str:
    reasons = []
    if findings.unreadable:
        path, why = findings.unreadable[0]
        reasons.append(f"{len(findings.unreadable)} cannot be read, for example {path} ({why})")
    if findings.too_small:
        reasons.append(f"{len(findings.too_small)} are too small for a bucket, for example {findings.too_small[0]}")
    return ("; ".join(reasons) or "the folders are empty") + "."
