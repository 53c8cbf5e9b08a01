"""Several pictures on one, each with its text below it: the previews of a moment, or what LoRA files draw."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from library.files import write_with
from library.prompts import Prompt

logger = logging.getLogger(__name__)

_SMALLEST_CELL_PX, _LARGEST_CELL_PX = 256, 512
_MANY = 25  # above this many pictures cells are of the smallest size
_GAP_PX = 16
_TEXT_PX, _NOTE_PX, _TITLE_PX = 16, 13, 22
_TITLE_LINES, _TEXT_LINES, _NOTE_LINES = 3, 4, 2
_JPEG_QUALITY, _LARGEST_JPEG_PX = 92, 65500
_PAPER, _INK, _GREY = (250, 250, 250), (20, 20, 20), (110, 110, 110)

# Pillow's own font has Latin letters only. These are what common systems have for others, and are found by name.
_WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "YuGothM.ttc",
    "meiryo.ttc",
    "msgothic.ttc",
    "ヒラギノ角ゴシック W3.ttc",
    "Hiragino Sans GB.ttc",
    "Arial Unicode.ttf",
    "DejaVuSans.ttf",
)

_LAST_LATIN, _PUNCTUATION = 0x24F, "‘’“”–—…•"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Entry:
    """One picture of a sheet: the picture, the prompt below it, and a smaller line below that."""

    picture: Image.Image
    text: str
    note: str


def contact_sheet(
    entries: Sequence[Entry], title: str, below_title: str = "", columns: int | None = None
) -> Image.Image:
    """Returns an RGB picture with a title and all entries in a grid, row by row.

    All pictures are shrunk or enlarged alike, the latter by a whole number, so that pixels stay what they are. Texts that
    are too long for their lines end in an ellipsis.

    Args:
        entries: the pictures.
        title: over all of them.
        below_title: smaller than that.
        columns: of the grid; as many as make the sheet a little wider than high where left out.
    """
    longest = max(max(entry.picture.size) for entry in entries)
    scale = _scale(longest, _SMALLEST_CELL_PX if len(entries) > _MANY else _LARGEST_CELL_PX)
    cell = max(round(longest * scale), _SMALLEST_CELL_PX)
    columns = columns or min(len(entries), math.ceil(math.sqrt(len(entries) * 1.5)))
    every_text = title + below_title + "".join(entry.text + entry.note for entry in entries)
    text_font, note_font, title_font = (_font(size, every_text) for size in (_TEXT_PX, _NOTE_PX, _TITLE_PX))
    pictures = [_scaled(entry.picture, scale) for entry in entries]
    texts = [_wrapped(entry.text or "(empty prompt)", text_font, cell, _TEXT_LINES) for entry in entries]
    notes = [_wrapped(entry.note, note_font, cell, _NOTE_LINES) for entry in entries]
    text_step, note_step, title_step = int(_TEXT_PX * 1.3), int(_NOTE_PX * 1.4), int(_TITLE_PX * 1.5)

    rows = [range(start, min(start + columns, len(entries))) for start in range(0, len(entries), columns)]
    picture_heights = [max(pictures[index].height for index in row) for row in rows]
    text_heights = [max(len(texts[index]) * text_step + len(notes[index]) * note_step for index in row) for row in rows]
    width = columns * (cell + _GAP_PX) + _GAP_PX
    title_lines = _wrapped(title, title_font, width - 2 * _GAP_PX, _TITLE_LINES)
    lines_below = _wrapped(below_title, note_font, width - 2 * _GAP_PX, _NOTE_LINES)
    title_height = max(1, len(title_lines)) * title_step + len(lines_below) * note_step
    title_height += _GAP_PX // 2 if lines_below else 0
    height = title_height + _GAP_PX + sum(picture_heights) + sum(text_heights) + len(rows) * (_GAP_PX // 2 + _GAP_PX)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    line_top = _GAP_PX
    for line in title_lines:
        draw.text((_GAP_PX, line_top), line, font=title_font, fill=_INK)
        line_top += title_step
    for line in lines_below:
        draw.text((_GAP_PX, line_top), line, font=note_font, fill=_GREY)
        line_top += note_step
    top = title_height + _GAP_PX
    for row, picture_height, text_height in zip(rows, picture_heights, text_heights, strict=True):
        for column, index in enumerate(row):
            left = _GAP_PX + column * (cell + _GAP_PX)
            picture = pictures[index]
            sheet.paste(picture, (left + (cell - picture.width) // 2, top + (picture_height - picture.height) // 2))
            line_top = top + picture_height + _GAP_PX // 2
            for line in texts[index]:
                draw.text((left, line_top), line, font=text_font, fill=_INK)
                line_top += text_step
            for line in notes[index]:
                draw.text((left, line_top), line, font=note_font, fill=_GREY)
                line_top += note_step
        top += picture_height + _GAP_PX // 2 + text_height + _GAP_PX
    return sheet


def note_of(prompt: Prompt, seed: int) -> str:
    """Returns how a prompt is drawn, for the smaller line below its picture."""
    note = f"seed {seed}, {prompt.width}x{prompt.height}, {prompt.sample_steps} steps, guidance {prompt.scale:g}"
    return note + (f", without: {prompt.negative_prompt}" if prompt.negative_prompt else "")


def save_sheet(path: Path, sheet: Image.Image) -> None:
    """Writes a sheet to a JPEG file, atomically; one that is too wide or too high for the format becomes smaller."""
    sheet.thumbnail((_LARGEST_JPEG_PX, _LARGEST_JPEG_PX))
    write_with(path, lambda temporary: sheet.save(temporary, quality=_JPEG_QUALITY))


def _scale(longest_px: int, cell_px: int) -> float:
    """Returns the factor of all pictures: whole where they are enlarged, towards three quarters of the largest cell."""
    return cell_px / longest_px if longest_px > cell_px else max(1, round(0.75 * cell_px / longest_px))


def _scaled(picture: Image.Image, scale: float) -> Image.Image:
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)


def _font(size_px: int, text: str) -> Font:
    """Returns Pillow's own font, or one of the system's where the text has letters that it lacks."""
    if any(ord(letter) > _LAST_LATIN and letter not in _PUNCTUATION for letter in text):
        for name in _WIDE_FONTS:
            try:
                return ImageFont.truetype(name, size_px)
            except OSError:
                continue
        logger.info("No font for all letters of the prompts was found; some are boxes on the contact sheet")
    return ImageFont.load_default(size_px)


def _wrapped(text: str, font: Font, width_px: int, most_lines: int) -> list[str]:
    """Returns the text in lines that fit the width, the last one with an ellipsis where there would be more."""
    lines: list[str] = []
    line = ""
    for word in _pieces(" ".join(text.split()), font, width_px):
        if font.getlength((line + word).rstrip()) <= width_px:
            line += word
        else:
            lines.append(line.rstrip())
            line = word
        if len(lines) == most_lines:
            shortened = lines[-1]
            while shortened and font.getlength(shortened + "...") > width_px:
                shortened = shortened[:-1]
            return [*lines[:-1], shortened.rstrip() + "..."]
    return [*lines, line.rstrip()] if line.strip() else lines


def _pieces(text: str, font: Font, width_px: int) -> list[str]:
    """Returns what may stand on lines of its own: words with the space behind them, and letters of words too long."""
    pieces: list[str] = []
    for word in text.split(" "):
        pieces += [word + " "] if font.getlength(word) <= width_px else [*word, " "]
    return pieces
