"""``--debug_dataset``: one HTML page that shows what the model will see in the first epoch.

Pictures, masks and captions come from the very functions that feed training; only the size of the pictures is another.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from library import files
from library.data import augment
from library.data.buckets import Size
from library.data.config import SubsetConfig
from library.data.dataset import TrainingData
from library.data.html_parts import bars, page, picture, table, text
from library.data.items import Draw
from library.data.prefetch import prefetch
from library.data.summary import tag_frequency
from library.errors import DatasetError

EPOCH = 1
_MOST_IN_A_BUCKET = 60
_MOST_ON_THE_PAGE = 1500  # about 15 MB
_LEAST_IN_A_BUCKET = 4
_MOST_TAGS = 50
_LENGTH_BINS = 16

_THUMBNAIL_AREA_PX = 200 * 200
_THUMBNAIL_SIDE_PX = 440
_NARROWEST_CARD_PX = 176

_TINT_RGB = (255, 0, 90)
_TINT_SHARE = 0.6


class CaptionTokens(NamedTuple):
    """What the text encoder takes of a caption."""

    kept: str
    """The beginning that it reads."""
    cut: str
    """The end that is cut off."""
    num_tokens: int
    """Tokens of the whole text, with what is put in front of the caption."""
    limit: int
    """Tokens that are read."""


CountTokens = Callable[[str], CaptionTokens]


class PageSummary(NamedTuple):
    """What is on the page."""

    num_showings: int
    """Showings of the epoch."""
    num_shown: int
    """Those that the page has pictures of."""
    num_broken: int
    """Those whose picture or mask cannot be read."""


@dataclass
class _Sheet:
    """The showings of one bucket: all are counted, some are kept, each picture's first before any picture's repeats."""

    most: int
    num_showings: int = 0
    num_pictures: int = 0
    _first: list[Draw] = field(default_factory=list)
    _repeats: list[Draw] = field(default_factory=list)

    def add(self, draw: Draw) -> None:
        self.num_showings += 1
        self.num_pictures += draw.repeat == 0
        kept = self._repeats if draw.repeat else self._first
        if len(kept) < self.most:
            kept.append(draw)

    @property
    def draws(self) -> list[Draw]:
        """What is shown, the showings of a picture side by side."""
        kept = (self._first + self._repeats)[: self.most]
        return sorted(kept, key=lambda draw: (draw.item.index, draw.repeat))


class _Card(NamedTuple):
    html: str
    is_broken: bool


def write_debug_page(
    path: Path, data: TrainingData, count_tokens: CountTokens, num_processes: int, show_progress: bool = True
) -> PageSummary:
    """Writes the page and returns what is on it.

    Args:
        path: of the page.
        data: the datasets of the run.
        count_tokens: tells what the text encoder takes of a final caption.
        num_processes: of the run, for the number of steps.
        show_progress: with a progress bar.

    Raises:
        OSError: the page cannot be written.
    """
    plan = data.plan_epoch(EPOCH, num_processes)
    groups = sorted({(item.dataset_index, item.bucket_px) for item in data.items})
    most = max(_LEAST_IN_A_BUCKET, min(_MOST_IN_A_BUCKET, _MOST_ON_THE_PAGE // max(1, len(groups))))
    sheets = {group: _Sheet(most) for group in groups}
    lengths: Counter[int] = Counter()
    limit, num_empty = 0, 0
    bar = tqdm(total=plan.num_draws, desc="Reading captions", unit="caption", disable=not show_progress)
    for batch in plan.batches:
        for draw in batch.draws:
            sheets[draw.item.dataset_index, draw.item.bucket_px].add(draw)
            if draw.repeat == 0:
                tokens = count_tokens(draw.caption)
                lengths[tokens.num_tokens] += 1
                limit = tokens.limit
                num_empty += not draw.caption
            bar.update()
    bar.close()
    cards = _cards(data, [draw for group in groups for draw in sheets[group].draws], count_tokens, show_progress)
    num_broken = sum(card.is_broken for card in cards.values())
    parts = [_head(data, len(plan), plan.num_draws, lengths, limit, num_empty, num_broken)]
    parts += ['<div class="columns">', _length_section(lengths, limit), _tag_section(data), "</div>"]
    for index in range(len(data.datasets)):
        parts.append(_dataset_section(data, index, sheets))
        for group in groups:
            if group[0] == index:
                parts.append(_sheet_section(group[1], sheets[group], cards))
    files.write_text(path, page("What the model sees", parts))
    return PageSummary(plan.num_draws, len(cards), num_broken)


# ---- the parts of the page ----


def _head(
    data: TrainingData,
    num_steps: int,
    num_showings: int,
    lengths: Counter[int],
    limit: int,
    num_empty: int,
    num_broken: int,
) -> str:
    held_out = len(data.validation_items)
    num_reg = sum(bool(item.subset.is_reg) for item in data.items)
    facts = [f"{len(data.items)} pictures", f"{num_showings} showings with repeats", f"{num_steps} batches"]
    facts += [f"{num_reg} of the pictures are for regularisation"] if num_reg else []
    facts += [f"{held_out} pictures are held out for validation"] if held_out else []
    num_cut = sum(count for length, count in lengths.items() if length > limit)
    notes = []
    if num_cut:
        notes.append(f"{num_cut} captions are longer than {limit} tokens; what is struck through is not read")
    if num_empty:
        notes.append(f"{num_empty} pictures have an empty caption in this epoch")
    if num_broken:
        notes.append(f"{num_broken} of the pictures or masks below cannot be read")
    listed = "".join(f"<li>{text(note)}</li>" for note in notes)
    return (
        f"<h1>What the model sees in epoch {EPOCH}</h1>"
        f'<p class="quiet">{text("; ".join(facts))}. Pictures are shown smaller than they are trained; where a mask'
        " keeps parts out of the loss, they are tinted red.</p>" + (f'<ul class="notes">{listed}</ul>' if notes else "")
    )


def _length_section(lengths: Counter[int], limit: int) -> str:
    width = max(1, -(-limit // _LENGTH_BINS))
    counts: Counter[int] = Counter()
    for length, count in lengths.items():
        counts[(length - 1) // width if length <= limit else _LENGTH_BINS] += count
    last = max((number for number in counts if number < _LENGTH_BINS), default=0)
    rows = [
        (f"{number * width + 1} to {min(limit, (number + 1) * width)}", counts[number], False)
        for number in range(last + 1)
    ]
    if counts[_LENGTH_BINS]:
        rows.append((f"more than {limit}", counts[_LENGTH_BINS], True))
    quiet = f"tokens with system prompt, one caption a picture; {limit} are read"
    return f'<section><h2>Caption lengths <span class="quiet">({quiet})</span></h2>{bars(rows)}</section>'


def _tag_section(data: TrainingData) -> str:
    tags: Counter[str] = Counter()
    for counts in tag_frequency(data.items).values():
        tags.update(counts)
    which = f"the {_MOST_TAGS} most frequent of {len(tags)}" if len(tags) > _MOST_TAGS else "all"
    rows = [(tag, count, False) for tag, count in sorted(tags.items(), key=lambda pair: (-pair[1], pair[0]))]
    return (
        f'<section><h2>Tags <span class="quiet">({which}; pictures that have them in their caption)</span></h2>'
        f"{bars(rows[:_MOST_TAGS])}</section>"
    )


def _dataset_section(data: TrainingData, index: int, sheets: dict[tuple[int, Size], _Sheet]) -> str:
    config = data.datasets[index]
    counts: Counter[int] = Counter()
    showings: Counter[int] = Counter()
    for item in data.items:
        if item.dataset_index == index:
            counts[id(item.subset)] += 1
            showings[id(item.subset)] += item.num_repeats
    held_out = Counter(_source(item.subset) for item in data.validation_items if item.dataset_index == index)
    rows = [
        (
            subset.image_dir,
            counts[id(subset)],
            subset.num_repeats,
            showings[id(subset)],
            held_out[_source(subset)],
            _settings_of(subset),
        )
        for subset in config.subsets
    ]
    head = ("folder", "pictures", "repeats", "showings", "held out", "settings")
    width, height = config.resolution
    sizes = [
        (f"{bucket[0]} x {bucket[1]}", sheet.num_showings, False)
        for (dataset, bucket), sheet in sheets.items()
        if dataset == index
    ]
    kind = "with buckets" if config.enable_bucket else "one size"
    return (
        f'<h2>Dataset {index + 1} <span class="quiet">({width} x {height}, {kind}, batch size'
        f" {config.batch_size})</span></h2>{table(head, rows)}<h3>Showings in each size</h3>{bars(sizes)}"
    )


def _source(subset: SubsetConfig) -> tuple[Path | None, ...]:
    """Returns what tells the subsets of a dataset apart; held-out pictures have settings of their own."""
    return subset.metadata_file, subset.image_dir, subset.conditioning_data_dir


def _settings_of(subset: SubsetConfig) -> str:
    found = [
        name
        for name in (
            "flip_aug",
            "color_aug",
            "random_crop",
            "alpha_mask",
            "shuffle_caption",
            "enable_wildcard",
            "join_caption_lines",
        )
        if getattr(subset, name)
    ]
    if subset.face_crop_aug_range:
        found.append("face_crop_aug_range {:g} to {:g}".format(*subset.face_crop_aug_range))
    if subset.conditioning_data_dir:
        found.append(f"masks in {subset.conditioning_data_dir}")
    if subset.is_reg:
        found.append("regularisation")
    if subset.preserves_output:
        found.append("difference output preservation")
    return ", ".join(found)


def _sheet_section(bucket: Size, sheet: _Sheet, cards: dict[tuple[int, int], _Card]) -> str:
    shown = "".join(cards[draw.item.index, draw.repeat].html for draw in sheet.draws)
    num_more = sheet.num_showings - len(sheet.draws)
    more = f'<p class="quiet">and {num_more} more</p>' if num_more else ""
    counted = f"{sheet.num_pictures} pictures, {sheet.num_showings} showings"
    return f'<h3>{bucket[0]} x {bucket[1]} <span class="quiet">({counted})</span></h3><div class="sheet">{shown}</div>{more}'


# ---- one showing ----


def _cards(
    data: TrainingData, draws: list[Draw], count_tokens: CountTokens, show_progress: bool
) -> dict[tuple[int, int], _Card]:
    results = prefetch(draws, lambda draw: _card(data, draw, count_tokens(draw.caption)), data.num_workers)
    bar = tqdm(results, total=len(draws), desc="Drawing the page", unit="picture", disable=not show_progress)
    return {(draw.item.index, draw.repeat): card for draw, card in zip(draws, bar, strict=True)}


def _card(data: TrainingData, draw: Draw, tokens: CaptionTokens) -> _Card:
    mask = None
    try:
        pixels = data.showings.pixels(draw)
        mask = data.showings.read_mask(draw)
        image = _thumbnail(pixels, mask)
        width, shown, is_broken = image.width, picture(image, draw.item.name), False
    except DatasetError as error:
        width, shown, is_broken = _NARROWEST_CARD_PX, f'<p class="alarm">{text(error)}</p>', True
    badges = "".join(f'<span class="badge">{text(badge)}</span>' for badge in _badges(data, draw, mask))
    cut = f"<del>{text(tokens.cut)}</del>" if tokens.cut else ""
    caption = f"{text(tokens.kept)}{cut}" if draw.caption else '<span class="quiet">(empty)</span>'
    num_cut = tokens.num_tokens - tokens.limit
    over = f', <span class="alarm">{num_cut} cut off</span>' if num_cut > 0 else ""
    html = (
        f'<figure style="width:{max(width, _NARROWEST_CARD_PX) + 18}px" title="{text(draw.item.path)}">{shown}'
        f'<figcaption><div class="name">{text(draw.item.name)}</div>{badges}<div class="caption">{caption}</div>'
        f'<div class="quiet">{tokens.num_tokens} tokens{over}</div></figcaption></figure>'
    )
    return _Card(html, is_broken)


def _badges(data: TrainingData, draw: Draw, mask: torch.Tensor | None) -> list[str]:
    item = draw.item
    placement, colours = data.showings.placement(draw), augment.colour_change(draw)
    badges = [_way(item.size_px, placement.resized_px, placement.bucket_px)]
    if placement.offset_px is not None and placement.resized_px != placement.bucket_px:
        badges.append(f"cut out at {placement.offset_px[0]}, {placement.offset_px[1]}")
    if draw.flip:
        badges.append("mirrored")
    if colours is not None:
        hue = colours.hue_degrees
        badges.append(f"hue {hue:+.1f}°" if hue else f"gamma {colours.gamma:.3f}")
    if mask is not None:
        badges.append(f"mask {100 * float(mask.mean()):.0f} %")
    if item.subset.is_reg:
        badges.append("regularisation")
    if item.num_repeats > 1:
        badges.append(f"repeat {draw.repeat + 1} of {item.num_repeats}")
    return badges


def _way(*sizes: Size) -> str:
    """Returns the sizes that a picture goes through, each once."""
    return " → ".join(f"{width} x {height}" for width, height in dict.fromkeys(sizes))


def _thumbnail(pixels: torch.Tensor, mask: torch.Tensor | None) -> Image.Image:
    """Returns pixels (3, H, W) in [-1, 1] as a small picture; what the mask (h, w) leaves out is tinted."""
    rgb = (pixels.permute(1, 2, 0).numpy() + 1) * 127.5
    if mask is not None:
        cell = rgb.shape[0] // mask.shape[0]
        left_out = 1 - np.kron(mask.numpy(), np.ones((cell, cell), np.float32))[..., None]
        share = _TINT_SHARE * left_out
        rgb = rgb * (1 - share) + np.array(_TINT_RGB, np.float32) * share
    image = Image.fromarray(rgb.round().clip(0, 255).astype(np.uint8))
    scale = min(1.0, math.sqrt(_THUMBNAIL_AREA_PX / (image.width * image.height)))
    scale = min(scale, _THUMBNAIL_SIDE_PX / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image if size == image.size else image.resize(size, Image.Resampling.BOX)
