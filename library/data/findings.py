"""What the log says of the pictures and captions that were found: each kind once, with numbers, examples and a remedy."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from library.data.captions import LINES_REMEDY, caption_stems
from library.data.config import SubsetConfig
from library.data.folders import Listing, not_read_note
from library.errors import some

logger = logging.getLogger(__name__)

_USUAL_EXTENSIONS = (".txt", ".TXT", ".caption", ".cap", ".tags")


@dataclass
class Findings:
    """What is worth telling, collected over all folders so that it is told once."""

    unreadable: list[tuple[Path, str]] = field(default_factory=list)
    too_small: list[Path] = field(default_factory=list)
    _class_tokens: list[str] = field(default_factory=list)
    _no_caption: list[str] = field(default_factory=list)
    _sources: set[str] = field(default_factory=set)
    _elsewhere: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # by extension looked for, and there
    _num_captions: int = 0
    _cut: list[str] = field(default_factory=list)
    _not_read: dict[Path, None] = field(default_factory=dict)
    _without_picture: dict[Path, None] = field(default_factory=dict)

    def look_at(self, subset: SubsetConfig, found: Listing) -> None:
        """Notes pictures of kinds that are not read, and caption files without a picture."""
        self._not_read |= dict.fromkeys(subset.image_dir / name for name in found.not_read)
        extension = subset.caption_extension
        stems = {os.path.splitext(name)[0] for name in (*found.pictures, *found.not_read)}  # noqa: PTH122
        captions = {name for name in found.others if name.endswith(extension) and not name.startswith(".")}
        captions -= {each + extension for stem in stems for each in caption_stems(stem)}
        self._without_picture |= dict.fromkeys(subset.image_dir / name for name in sorted(captions))

    def count_caption(self, name: str, is_there: bool, is_cut: bool) -> None:
        """Counts the caption file of a picture.

        Args:
            name: of the picture.
            is_there: it holds text.
            is_cut: it has lines that are never read.
        """
        self._num_captions += is_there
        if is_cut:
            self._cut.append(name)

    def without_caption(self, subset: SubsetConfig, name: str, found: Listing | None) -> None:
        """Notes a picture that has no caption of its own.

        Args:
            subset: the rules.
            name: of the picture.
            found: the files of its folder; ``None`` where captions come from a metadata file.
        """
        name = os.path.split(name)[1]
        (self._class_tokens if subset.class_tokens else self._no_caption).append(name)
        if found is None:
            self._sources.add(f"in {subset.metadata_file.name}" if subset.metadata_file else "")
            return
        looked_for = subset.caption_extension
        self._sources.add(f"in a {looked_for} file")
        stem = os.path.splitext(name)[0]  # noqa: PTH122 - as in read_lines
        for extension in _USUAL_EXTENSIONS:
            if extension != looked_for and stem + extension in found.others:
                self._elsewhere.setdefault((looked_for, extension), []).append(stem + extension)
                break

    def report(self, num_items: int) -> None:
        """Logs everything.

        Args:
            num_items: pictures of the run.
        """
        warn_unreadable(self.unreadable)
        if self.too_small:
            logger.warning(
                "%d pictures are left out: with bucket_no_upscale, a side would be shorter than bucket_reso_steps: %s",
                len(self.too_small),
                some([str(path) for path in self.too_small]),
            )
        if self._not_read:
            logger.warning("%s", not_read_note([str(path) for path in self._not_read]))
        self._report_missing_captions(num_items)
        if self._cut:
            logger.warning(
                "%d of %d caption files have more than one line, of which only the first is read (%s): those of %s",
                len(self._cut),
                self._num_captions,
                LINES_REMEDY,
                some(self._cut),
            )
        if self._without_picture:  # no warning: they may be notes
            count = len(self._without_picture)
            logger.info(
                "%s: %s",
                "1 caption file has no picture" if count == 1 else f"{count} caption files have no picture",
                some([str(path) for path in self._without_picture]),
            )

    def _report_missing_captions(self, num_items: int) -> None:
        looked_for = " or ".join(sorted(self._sources))
        for names, instead in ((self._class_tokens, "their class tokens"), (self._no_caption, "an empty caption")):
            if names:
                logger.warning(
                    "%d of %d pictures have no caption %s and are trained with %s: %s",
                    len(names),
                    num_items,
                    looked_for,
                    instead,
                    some(names),
                )
        for (extension, other), names in self._elsewhere.items():
            logger.warning(
                "%d of these pictures %s a %s file, which is not read: %s; set caption_extension to %s, or name these"
                " files %s",
                len(names),
                "has" if len(names) == 1 else "have",
                other,
                some(names),
                other,
                extension,
            )

    def why_none(self, subsets: Sequence[SubsetConfig]) -> str:
        """Returns why there is no picture at all."""
        reasons = []
        if self.unreadable:
            path, why = self.unreadable[0]
            reasons.append(f"{len(self.unreadable)} cannot be read, for example {path} ({why})")
        if self.too_small:
            reasons.append(f"{len(self.too_small)} are too small for a bucket, for example {self.too_small[0]}")
        if not reasons and all(subset.metadata_file for subset in subsets):
            named = some(sorted({str(subset.metadata_file) for subset in subsets}))
            reasons.append(f"no entry of {named} fits a picture file; mend its keys, or image_dir")
        return ("; ".join(reasons) or "the folders are empty") + "."


def warn_unreadable(pairs: Sequence[tuple[Path, str]]) -> None:
    """Warns once about pictures that are left out, with the first names."""
    if pairs:
        count = (
            "1 picture cannot be read and is" if len(pairs) == 1 else f"{len(pairs)} pictures cannot be read and are"
        )
        logger.warning("%s left out: %s", count, some([f"{path} ({why})" for path, why in pairs]))
