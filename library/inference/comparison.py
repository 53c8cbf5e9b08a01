"""LoRA files beside each other: each draws the same prompts from the same seeds, with each multiplier."""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from library.errors import DrawingError
from library.inference.painter import Painter
from library.inference.settings import CompareFlags
from library.prompts import Prompt

logger = logging.getLogger(__name__)

_EMPTY = (215, 215, 215)
_LABEL_BYTES = 120  # of a label in a file's name, which has 255 at most


def compare(painter: Painter, prompts: Sequence[Prompt], flags: CompareFlags, folder: Path) -> list[Path]:
    """Draws with every file and multiplier, writes a sheet for each prompt, and returns the sheets' files.

    Files are attached one at a time. Texts are encoded once, and again only with a file that changes the text encoder.

    Args:
        painter: attaches the files and draws.
        prompts: what to draw, with their seeds.
        flags: files and multipliers.
        folder: for the sheets; pictures go to the painter's.

    Raises:
        PromptError: the multipliers of other LoRA files that a prompt names cannot be had.
        DrawingError: memory is too small, or no picture is finite; one file's that are not are left out.
    """
    labels, multipliers = labels_of(flags.files), list(dict.fromkeys(flags.compare_multipliers))
    acting = [multiplier for multiplier in multipliers if multiplier != 0]
    count = len(prompts) * (len(labels) * len(acting) + (0.0 in multipliers))
    logger.info("Comparing %d LoRA files with %d multipliers: %d pictures", len(labels), len(multipliers), count)
    start = f"compare_{time.strftime('%Y%m%d%H%M%S')}"
    plain, problem = painter.encode(prompts), ""
    drawn: dict[tuple[Path, float], list[Path]] = {}
    if 0.0 in multipliers:
        without = painter.draw(prompts, plain, f"{start}_without")
        drawn |= {(file, 0.0): without for file in labels}
    for number, (file, label) in enumerate(labels.items(), start=1):
        logger.info("LoRA file %d of %d: %s", number, len(labels), file)
        with painter.beside(file) as network:
            for multiplier in acting:
                network.set_multiplier(multiplier)
                features = painter.encode(prompts) if network.text_encoder_loras else plain
                name = f"{start}_{_in_file_name(label)}_{multiplier:g}"
                try:
                    drawn[file, multiplier] = painter.draw(prompts, features, name)
                except DrawingError as error:  # as of a file from behind the step where a training went wrong
                    problem = str(error)
                    logger.warning("%s with multiplier %g is left out: %s", label, multiplier, problem)
    if not drawn:
        raise DrawingError(problem)
    sheets = []
    for index, prompt in enumerate(prompts):
        path = folder / f"{start}_sheet_{index:03d}.jpg"
        _write_sheet(path, prompt, labels, multipliers, {cell: files[index] for cell, files in drawn.items()})
        logger.info("Saved the comparison %s", path)
        sheets.append(path)
    return sheets


def _write_sheet(
    path: Path,
    prompt: Prompt,
    labels: Mapping[Path, str],
    multipliers: Iterable[float],
    drawn: Mapping[tuple[Path, float], Path],
) -> None:
    """Writes a grid: a column for each LoRA file, a row for each multiplier."""
    from PIL import Image

    from library.contact_sheet import Entry, contact_sheet, note_of, save_sheet

    entries = []
    for multiplier in multipliers:
        for file, label in labels.items():
            path_drawn, note = drawn.get((file, multiplier)), f"multiplier {multiplier:g}"
            if path_drawn is None:
                empty = Image.new("RGB", (prompt.width, prompt.height), _EMPTY)
                entries.append(Entry(empty, label, f"{note}: no picture, see the log"))
                continue
            with Image.open(path_drawn) as picture:
                entries.append(Entry(picture.convert("RGB"), label, note))
    below = note_of(prompt, prompt.seed or 0)
    save_sheet(path, contact_sheet(entries, prompt.prompt or "(empty prompt)", below, columns=len(labels)))


def labels_of(files: Sequence[Path]) -> dict[Path, str]:
    """Returns each file's name without ending; where several have one name, with the folder's in front, or a number."""
    labels = {file: file.stem for file in files}
    repeated = _repeated(labels)
    labels |= {file: f"{file.absolute().parent.name}/{file.stem}" for file in repeated}
    labels |= {file: f"{labels[file]} ({number})" for number, file in enumerate(_repeated(labels), start=1)}
    # What a file system gives in no valid encoding can be neither drawn nor written as text.
    return {file: label.encode("utf-8", "replace").decode("utf-8") for file, label in labels.items()}


def _repeated(labels: Mapping[Path, str]) -> list[Path]:
    counted = Counter(labels.values())
    return [file for file, label in labels.items() if counted[label] > 1]


def _in_file_name(label: str) -> str:
    # Pictures may go to a disk of Windows, which takes none of these.
    return re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", label).encode()[:_LABEL_BYTES].decode("utf-8", "ignore")
