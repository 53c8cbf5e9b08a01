"""Folders and metadata files -> items: which pictures there are, their sizes, captions and buckets."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from library.data import images
from library.data.buckets import BucketChooser, Placement, Size
from library.data.cache_places import CachePlaces
from library.data.captions import kept_lines, leaves_lines_out, read_lines
from library.data.config import DatasetConfig, SubsetConfig
from library.data.findings import Findings
from library.data.folders import Listing, listing
from library.data.items import Item
from library.data.metadata_file import read_metadata
from library.data.picture_index import FileState
from library.data.prefetch import prefetch
from library.data.sharing import Sharing
from library.data.size_report import warn_of_sizes
from library.errors import DatasetError

Result = TypeVar("Result")
Caption = str | None  # None: there is none
_Key = tuple[Path, Path | None, bool, bool, str]  # what decides which pictures and captions a subset has
_AT_A_TIME = 128  # files that a thread looks at before it reports


def build_items(
    datasets: Sequence[DatasetConfig], places: CachePlaces, num_workers: int, sharing: Sharing
) -> list[Item]:
    """Returns the pictures of all datasets in a fixed order (datasets, subsets, file names), the same on every process.

    Unreadable pictures, pictures too small for any bucket and missing captions are warned about, each kind once.
    Afterwards the indexes of ``places`` hold a row for every picture.

    Args:
        datasets: what to look for.
        places: has the indexes, from which sizes may be known.
        num_workers: threads that open files.
        sharing: who shares the opening of pictures; all processes call this.

    Raises:
        DatasetError: no picture is left, a caption or metadata file is broken, or processes see different pictures.
    """
    findings = Findings()
    subsets = [subset for config in datasets for subset in config.subsets]
    sources = _Sources(subsets, findings, num_workers, sharing.show_progress)
    _look_at_sizes(sources, places, findings, num_workers, sharing)
    items: list[Item] = []
    for dataset_index, config in enumerate(datasets):
        place = _sharing(BucketChooser(config))
        for subset in config.subsets:
            index = places.index(subset.image_dir)
            repeats = subset.num_repeats
            for name, caption in sources.of(subset):
                size = index.known_size(name)
                if size is None:
                    continue
                size, placement = place(size)
                if placement is None:
                    findings.too_small.append(subset.image_dir / name)
                    continue
                if caption is None:
                    findings.without_caption(subset, name, sources.listing(subset))
                    caption = subset.class_tokens or ""
                items.append(Item(len(items), name, size, placement, caption, subset, dataset_index, repeats))
    findings.report(len(items))
    if not items:
        raise DatasetError("No picture is left to train on: " + findings.why_none(subsets))
    warn_of_sizes(datasets, items)
    _check_same(items, sharing)
    return items


class _Sources:
    """What each subset's folder or metadata file holds; one that several subsets use is read once."""

    def __init__(
        self, subsets: Sequence[SubsetConfig], findings: Findings, num_workers: int, show_progress: bool
    ) -> None:
        self._listings: dict[Path, Listing] = {}  # of folders
        self._pairs: dict[_Key, list[tuple[str, Caption]]] = {}
        for subset in subsets:
            key = _source_key(subset)
            if key in self._pairs:
                continue
            if subset.metadata_file is not None:
                self._pairs[key] = read_metadata(subset)
                continue
            if subset.image_dir not in self._listings:
                self._listings[subset.image_dir] = listing(subset.image_dir)
            found = self._listings[subset.image_dir]
            findings.look_at(subset, found)
            captions = _captions(subset, found.pictures, findings, num_workers, show_progress)
            self._pairs[key] = list(zip(found.pictures, captions, strict=True))

    def of(self, subset: SubsetConfig) -> list[tuple[str, Caption]]:
        """Returns (name, caption) of a subset's pictures, by name."""
        return self._pairs[_source_key(subset)]

    def listing(self, subset: SubsetConfig) -> Listing | None:
        """Returns what lies in a subset's folder, ``None`` for one with a metadata file."""
        return None if subset.metadata_file else self._listings[subset.image_dir]

    def folders(self) -> dict[Path, tuple[list[str], bool]]:
        """Returns each picture folder with all names in use, and whether these are all of its pictures."""
        found: dict[Path, tuple[list[str], bool]] = {}
        for (image_dir, *_), pairs in self._pairs.items():
            names = found[image_dir][0] if image_dir in found else []
            found[image_dir] = ([*names, *(name for name, _ in pairs)], image_dir in self._listings)
        return {folder: (list(dict.fromkeys(names)), whole) for folder, (names, whole) in found.items()}


def _source_key(subset: SubsetConfig) -> _Key:
    rule = subset.caption_separator if subset.metadata_file else subset.caption_extension
    return subset.image_dir, subset.metadata_file, subset.enable_wildcard, subset.join_caption_lines, rule


def _captions(
    subset: SubsetConfig, names: list[str], findings: Findings, num_workers: int, show_progress: bool
) -> Iterator[Caption]:
    """Yields the texts of the caption files beside pictures, in order; equal ones are one object, to save memory."""
    folder, extension = str(subset.image_dir), subset.caption_extension
    known: dict[Caption, Caption] = {}
    what = f"Reading captions of {subset.image_dir.name}"

    def read(name: str) -> tuple[Caption, bool]:
        lines = read_lines(os.path.join(folder, name), extension)  # noqa: PTH118 - as in read_lines
        return "\n".join(kept_lines(subset, lines)) or None, leaves_lines_out(subset, lines)

    results = _each(names, read, num_workers, what, show_progress)
    for name, (caption, is_cut) in zip(names, results, strict=True):
        findings.count_caption(name, caption is not None, is_cut)
        yield known.setdefault(caption, caption)


def _each(
    names: Sequence[str], work: Callable[[str], Result], num_workers: int, what: str, show_progress: bool
) -> Iterator[Result]:
    """Yields ``work(name)`` in order, done by threads; a bar appears where that takes long."""
    chunks = [names[start : start + _AT_A_TIME] for start in range(0, len(names), _AT_A_TIME)]
    with tqdm(total=len(names), desc=what, unit="file", delay=3, disable=not show_progress) as bar:
        for results in prefetch(chunks, lambda chunk: [work(name) for name in chunk], num_workers):
            yield from results
            bar.update(len(results))


def _look_at_sizes(
    sources: _Sources, places: CachePlaces, findings: Findings, num_workers: int, sharing: Sharing
) -> None:
    """Brings the indexes up to date: files that are new or changed are opened, each by one process."""
    folders = sources.folders()
    unknown: list[tuple[str, str]] = []
    for folder, (names, whole) in folders.items():
        index = places.index(folder)
        states = _each(names, _state_of(folder), num_workers, f"Looking at {folder.name}", sharing.show_progress)
        new = {name for name, state in zip(names, states, strict=True) if index.size_of(name, state) is None}
        unknown += [(str(folder), name) for name in new]
        known = [name for name in names if name not in new]
        if not whole:  # a metadata file names some of the pictures; what is known of the others stays
            known += sorted(index.names() - set(names))
        index.keep_only(known)
    unknown = sharing.union(unknown)
    by_text = {str(folder): folder for folder in folders}

    def read(job: tuple[str, str]) -> tuple[str, str, FileState | None, Size | str]:
        path = by_text[job[0]] / job[1]
        try:
            stat = path.stat()
            return *job, FileState(stat.st_size, stat.st_mtime_ns), images.read_size(path)
        except images.BROKEN_PICTURE as error:
            return *job, None, images.reason(error)

    mine = sharing.share(unknown)
    results = prefetch(mine, read, num_workers)
    with sharing.bar(len(unknown), "Looking at new pictures", "picture") as bar:
        found = list(bar.over(results))
    for text, name, state, size in sorted(sharing.together(found), key=lambda row: row[:2]):
        if isinstance(size, str):
            findings.unreadable.append((by_text[text] / name, size))
        elif state is not None:
            places.index(by_text[text]).put(name, FileState(*state), size)


def _state_of(folder: Path) -> Callable[[str], FileState]:
    base = str(folder)

    def state(name: str) -> FileState:
        try:
            stat = os.stat(os.path.join(base, name))  # noqa: PTH116, PTH118 - once per picture, of 100,000
        except OSError:
            return FileState(-1, -1)  # reading its size will say what is wrong with it
        return FileState(stat.st_size, stat.st_mtime_ns)

    return state


def _check_same(items: Sequence[Item], sharing: Sharing) -> None:
    """Raises ``DatasetError`` where processes, on several machines, see different pictures or captions."""
    if sharing.count == 1:
        return
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr((item.name, item.size_px, item.caption)).encode("utf-8", "surrogatepass"))
    states = sharing.together([(len(items), digest.hexdigest())])
    if len(set(states)) > 1:
        counts = ", ".join(str(count) for count, _ in states)
        raise DatasetError(
            f"The processes of this run see different pictures or captions ({counts} pictures); all machines need the same"
            " files."
        )


def undecodable(items: Sequence[Item], num_workers: int, sharing: Sharing) -> dict[int, str]:
    """Decodes every picture once and returns the indexes of those that fail, with the reason. All processes call it.

    For runs that read the files themselves in every epoch: a truncated one would end such a run hours later.
    """

    def check(item: Item) -> str | None:
        try:
            images.check_decodable(item.path)
        except images.BROKEN_PICTURE as error:
            return images.reason(error)
        return None

    once = {item.path: item for item in items}  # of several datasets, one picture each
    mine = sharing.share(list(once.values()))
    with sharing.bar(len(once), "Checking pictures", "picture") as bar:
        checks = zip(mine, bar.over(prefetch(mine, check, num_workers)), strict=True)
        failed = [(str(item.path), problem) for item, problem in checks if problem is not None]
    problems = dict(sharing.together(failed))
    return {item.index: problems[str(item.path)] for item in items if str(item.path) in problems} if problems else {}


def _sharing(chooser: BucketChooser) -> Callable[[Size], tuple[Size, Placement | None]]:
    """Returns ``chooser.place`` that gives pictures of one size the same objects, to save memory."""
    known: dict[Size, tuple[Size, Placement | None]] = {}

    def place(size: Size) -> tuple[Size, Placement | None]:
        if size not in known:
            known[size] = size, chooser.place(*size)
        return known[size]

    return place
