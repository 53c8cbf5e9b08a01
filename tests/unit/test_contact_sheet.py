"""The sheet of previews: what is where, and texts that do not fit."""

from pathlib import Path

import numpy
import pytest
from PIL import Image, ImageFont

from library.contact_sheet import Entry, _wrapped, contact_sheet, save_sheet

RED = (255, 0, 0)


def _sheet(sizes: list[tuple[int, int]], text: str = "a cat") -> Image.Image:
    return contact_sheet([Entry(Image.new("RGB", size, RED), text, "0: seed 1") for size in sizes], "my epoch 1")


def _has_ink(sheet: Image.Image, box: tuple[int, int, int, int]) -> bool:
    return sheet.crop(box).convert("L").getextrema()[0] < 100


def test_pictures_lie_in_a_grid_with_their_text_below() -> None:
    sheet = _sheet([(384, 384)] * 2)
    assert sheet.mode == "RGB"
    assert sheet.width == 2 * (384 + 16) + 16
    top = 33 + 16
    assert _has_ink(sheet, (0, 0, sheet.width, top))  # the title
    for left in (16, 16 + 400):
        assert sheet.getpixel((left, top)) == sheet.getpixel((left + 383, top + 383)) == RED
        assert _has_ink(sheet, (left, top + 384, left + 384, sheet.height))
    assert RED not in (sheet.getpixel((15, top)), sheet.getpixel((408, top + 100)), sheet.getpixel((20, top + 384)))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 12, 30])
def test_every_picture_is_there_whatever_their_number_and_sizes(count: int) -> None:
    sizes = [(64 + 16 * (number % 3), 64) for number in range(count)]
    sheet = _sheet(sizes)
    longest = max(max(size) for size in sizes)
    factor = round(0.75 * (512 if count <= 25 else 256) / longest)  # one for all
    expected = sum(width * height * factor**2 for width, height in sizes)
    assert int((numpy.asarray(sheet) == RED).all(axis=-1).sum()) == expected


def test_large_pictures_are_shrunk_and_keep_their_shape() -> None:
    sheet = _sheet([(2048, 1024)])
    columns = [x for x in range(sheet.width) if sheet.getpixel((x, 100)) == RED]
    rows = [y for y in range(sheet.height) if sheet.getpixel((100, y)) == RED]
    assert (len(columns), len(rows)) == (512, 256)


def test_columns_and_longer_titles() -> None:
    entries = [Entry(Image.new("RGB", (384, 384), RED), "a", "b") for _ in range(4)]
    sheet = contact_sheet(entries, "word " * 100, "seed 1, 384x384", columns=2)
    assert sheet.width == 2 * (384 + 16) + 16
    top = 3 * 33 + 18 + 8 + 16  # three lines of title, and the one below
    assert _has_ink(sheet, (0, 16 + 2 * 33, sheet.width, 16 + 3 * 33))
    assert sheet.getpixel((16, top)) == RED != sheet.getpixel((16, top - 1))


def test_a_sheet_that_is_too_wide_for_its_format_becomes_smaller(tmp_path: Path) -> None:
    save_sheet(tmp_path / "a.jpg", Image.new("RGB", (70000, 700), RED))
    with Image.open(tmp_path / "a.jpg") as found:
        assert found.size == (65500, 655)


def test_texts_are_wrapped_and_end_in_an_ellipsis() -> None:
    font = ImageFont.load_default(16)
    short = _wrapped("a cat", font, 256, 4)
    assert short == ["a cat"]
    lines = _wrapped("word " * 200 + "x" * 500, font, 256, 4)
    assert len(lines) == 4
    assert lines[-1].endswith("...")
    assert all(font.getlength(line) <= 256 for line in lines)
    unbroken = _wrapped("x" * 60, font, 100, 9)
    assert "".join(unbroken) == "x" * 60
    assert all(font.getlength(line) <= 100 for line in unbroken)
    assert _wrapped("", font, 100, 2) == []


def test_every_script_is_drawn_with_some_font() -> None:
    assert _sheet([(384, 384)], "花と猫、 кошка – “cat”").width == 416
