"""The page of --debug_dataset shows what a batch holds, marks what is cut off, and needs nothing but itself."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import missing_latents, noise_image, settings_for
from PIL import Image

from library.data.config import DatasetConfig, SubsetConfig
from library.data.dataset import TrainingData
from library.data.debug_page import CaptionTokens, PageSummary, write_debug_page

LIMIT = 12


def letters(caption: str) -> CaptionTokens:
    """A tokenizer with a token a character, and four in front of every caption."""
    room = LIMIT - 4
    return CaptionTokens(caption[:room], caption[room:], 4 + len(caption), LIMIT)


class Outline(HTMLParser):
    """Checks that tags are closed, and collects addresses and the text outside of style."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def figures(page: str) -> list[str]:
    return re.findall(r"<figure.*?</figure>", page, re.DOTALL)


def image_in(figure: str) -> np.ndarray:
    found = re.search(r"base64,([^\"]+)", figure)
    assert found
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1]))), dtype=np.int64)


def write(folder: Path, dataset: dict[str, Any] | None = None, **subset: Any) -> tuple[str, PageSummary, TrainingData]:
    masked = "conditioning_data_dir" in subset
    settings = settings_for(folder / "pictures", masked_loss=masked, cache_latents=bool(subset.pop("cached", False)))
    one = SubsetConfig(folder / "pictures", caption_extension=".txt", **subset)
    config = DatasetConfig(**{"resolution": (64, 64), "subsets": (one,), **(dataset or {})})
    data = TrainingData.build(settings, 3, [config], show_progress=False)
    summary = write_debug_page(folder / "page.html", data, letters, 1, show_progress=False)
    return (folder / "page.html").read_text(encoding="utf-8"), summary, data


def make(folder: Path, captions: dict[str, str], size: tuple[int, int] = (64, 64)) -> None:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for seed, (name, caption) in enumerate(captions.items()):
        noise_image(4, 4, seed).resize(size, Image.Resampling.BICUBIC).save(folder / "pictures" / name)
        (folder / "pictures" / name).with_suffix(".txt").write_text(caption, encoding="utf-8")


def test_the_page_stands_alone_and_escapes_what_it_shows(tmp_path: Path) -> None:
    make(tmp_path, {"a & <b>.png": '<script>x</script> & "q"', "c.png": "日本語 😀"})
    page, _, _ = write(tmp_path)
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert "script" not in outline.tags
    assert outline.addresses
    assert all(address.startswith("data:image/jpeg;base64,") for address in outline.addresses)
    assert not re.search(r"https?:|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page
    words = "".join(outline.words)
    assert '<script>x</script> & "q"' in words
    assert "a & <b>.png" in words
    assert "日本語 😀" in words


def test_what_is_beyond_the_limit_is_struck_through_and_counted(tmp_path: Path) -> None:
    make(tmp_path, {"a.png": "12345678", "b.png": "123456789<", "c.png": ""})
    page, _, _ = write(tmp_path)
    by_name = {
        name: next(part for part in figures(page) if f">{name}<" in part) for name in ("a.png", "b.png", "c.png")
    }
    assert "<del>" not in by_name["a.png"]
    assert "12 tokens</div>" in by_name["a.png"]
    assert "12345678<del>9&lt;</del>" in by_name["b.png"]
    assert "14 tokens" in by_name["b.png"]
    assert "2 cut off" in by_name["b.png"]
    assert "(empty)" in by_name["c.png"]
    assert "1 captions are longer than 12 tokens" in page
    assert "1 pictures have an empty caption" in page
    lengths = page.split("Caption lengths")[1].split("</section>")[0]
    rows = re.findall(r'label">([^<]*)</span><span class="count">(\d+)', lengths)
    assert {label: int(count) for label, count in rows if count != "0"} == {
        "4 to 4": 1,
        "12 to 12": 1,
        "more than 12": 1,
    }


def test_pictures_are_those_of_the_batches(tmp_path: Path) -> None:
    make(tmp_path, {"a.png": "a", "b.png": "b"}, size=(90, 70))
    page, summary, data = write(tmp_path, flip_aug=True, color_aug=True, random_crop=True, num_repeats=5)
    assert summary == PageSummary(10, 10, 0)
    shown = {
        (re.search(r'name">(\w)', figure)[1], int(re.search(r"repeat (\d)", figure)[1])): figure  # type: ignore[index]
        for figure in figures(page)
    }
    assert len(shown) == 10
    mirrored = set()
    for batch in data.plan_epoch(1, 1).batches:
        pixels = data.load(batch.draws).pixels
        assert pixels is not None
        draw = batch.draws[0]
        figure = shown[draw.item.name[0], draw.repeat + 1]
        expected = ((pixels[0].permute(1, 2, 0).numpy() + 1) * 127.5).round()
        # JPEG of smooth shapes: a few of 256 steps.
        assert np.abs(image_in(figure) - expected).mean() < 4
        assert ("mirrored" in figure) == draw.flip
        mirrored.add(draw.flip)
    assert mirrored == {True, False}


def test_masks_are_tinted_where_they_leave_out(tmp_path: Path) -> None:
    make(tmp_path, {"a.png": "a"})
    Image.new("RGB", (64, 64), (0, 0, 0)).save(tmp_path / "pictures" / "a.png")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 16, 64))
    (tmp_path / "masks").mkdir()
    mask.save(tmp_path / "masks" / "a.png")
    page, _, _ = write(tmp_path, conditioning_data_dir=tmp_path / "masks")
    (figure,) = figures(page)
    assert "mask 25 %" in figure
    image = image_in(figure)
    assert image[:, :8].mean() < 12  # black, but for JPEG
    assert image[:, 24:, 0].mean() > 130
    assert image[:, 24:, 1].mean() < 20


def test_only_some_of_many_are_shown_each_picture_first(tmp_path: Path) -> None:
    make(tmp_path, {f"{number:02d}.png": "x" for number in range(40)}, size=(16, 16))
    page, summary, _ = write(tmp_path, {"resolution": (16, 16)}, num_repeats=3)
    assert summary == PageSummary(120, 60, 0)
    assert "and 60 more" in page
    assert len(figures(page)) == 60
    assert all(f'name">{number:02d}.png' in page for number in range(40))


def test_counts_of_the_whole(tmp_path: Path) -> None:
    make(tmp_path, {"a.png": "one, two", "b.png": "two"}, size=(96, 64))
    make(tmp_path, {"c.png": "Two"}, size=(64, 96))
    buckets = {"enable_bucket": True, "bucket_reso_steps": 16, "min_bucket_reso": 32, "max_bucket_reso": 128}
    page, _, data = write(tmp_path, buckets, num_repeats=2)
    assert "3 pictures; 6 showings with repeats; 6 batches" in page
    sizes = page.split("Showings in each size")[1].split("<h3>")[0]
    assert re.findall(r'label">([^<]*)</span><span class="count">(\d+)', sizes) == [("48 x 80", "2"), ("80 x 48", "4")]
    tags = page.split("Tags")[1].split("</section>")[0]
    assert re.findall(r'label">([^<]*)</span><span class="count">(\d+)', tags) == [("two", "3"), ("one", "1")]
    assert len(data.items) == 3


def test_held_out_and_regularisation_pictures_are_counted(tmp_path: Path) -> None:
    make(tmp_path, {f"{number}.png": "a" for number in range(4)})
    make(tmp_path / "reg", {"r.png": "r"})
    reg = SubsetConfig(tmp_path / "reg" / "pictures", caption_extension=".txt", is_reg=True, flip_aug=True)
    one = SubsetConfig(tmp_path / "pictures", caption_extension=".txt", validation_split=0.25)
    page, summary, data = write(tmp_path, {"subsets": (one, reg)})
    assert "4 pictures; 6 showings with repeats; 6 batches" in page
    assert "1 of the pictures are for regularisation" in page
    assert "1 pictures are held out for validation" in page
    rows = page.split("held out</th>")[1].split("</table>")[0].split("</tr>")[1:3]
    assert [re.findall(r"<td class=number>(\d+)", row) for row in rows] == [["3", "1", "3", "1"], ["1", "1", "3", "0"]]
    assert "flip_aug, regularisation" in rows[1]
    assert summary == PageSummary(6, 6, 0)
    assert f">{data.validation_items[0].name}<" not in page


@pytest.mark.parametrize("broken", ["pictures", "masks"])
def test_with_cached_latents_nothing_is_cached_and_broken_files_are_shown(tmp_path: Path, broken: str) -> None:
    make(tmp_path, {"a.png": "a", "b.png": "b"})
    (tmp_path / "masks").mkdir()
    for name in ("a.png", "b.png"):
        noise_image(64, 64, mode="L").save(tmp_path / "masks" / name)
    whole = (tmp_path / broken / "a.png").read_bytes()
    (tmp_path / broken / "a.png").write_bytes(whole[: len(whole) // 2])
    page, summary, data = write(tmp_path, conditioning_data_dir=tmp_path / "masks", cached=True)
    assert summary == PageSummary(2, 2, 1)
    assert missing_latents(data, "ae-1") == 2
    assert f"{broken}/a.png" in next(figure for figure in figures(page) if "read (" in figure)
    assert torch.equal(*(data.showings.read_mask(data.draw(1, 1, 0)) for _ in range(2)))  # type: ignore[arg-type]
