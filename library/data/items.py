"""The records that pass through the data rooms: a picture, one showing of it, and a batch of showings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from library.data.buckets import Placement, Size
from library.data.config import SubsetConfig


@dataclass(frozen=True, slots=True)
class Item:
    """A picture with its caption, as one dataset uses it.

    Kept small, because a folder may hold 100,000 pictures: the folder's path and all settings are in the shared subset.

    Attributes:
        index: place among all pictures of the run, the identity that random draws are keyed by.
        name: file name inside ``subset.image_dir``; from a metadata file also a path below it, or an absolute one.
        size_px: (width, height) of the upright picture.
        placement: what it is resized to and which bucket is cut out.
        caption: text of the caption or metadata file, else the class tokens, else empty; not yet the final caption.
        subset: the folder's settings.
        dataset_index: which dataset it belongs to.
        num_repeats: showings in an epoch: the subset's, or what regularisation pictures need to match the others.
    """

    index: int
    name: str
    size_px: Size
    placement: Placement
    caption: str
    subset: SubsetConfig
    dataset_index: int
    num_repeats: int = 1

    @property
    def path(self) -> Path:
        return self.subset.image_dir / self.name

    @property
    def bucket_px(self) -> Size:
        return self.placement.bucket_px

    @property
    def resized_px(self) -> Size:
        return self.placement.resized_px


@dataclass(frozen=True, slots=True)
class Draw:
    """One showing of a picture.

    Attributes:
        item: the picture.
        epoch: counted from 1.
        repeat: which showing of this picture in the epoch, from 0.
        caption: the final text, without a system prompt; ``""`` where it was dropped.
        flip: mirrored left to right.
        key: identity of this showing, for draws of noise, sigma and dropout.
    """

    item: Item
    epoch: int
    repeat: int
    caption: str
    flip: bool
    key: int


@dataclass
class Batch:
    """What one process trains on in one step; empty (no draws) where the epoch's last batch is too small for all.

    Attributes:
        draws: the showings, B of them.
        latents: (B, C, h, w) bfloat16 from the cache, or ``None``.
        pixels: (B, 3, H, W) float32 in [-1, 1], or ``None`` where latents are given.
        text: per sample (L_i, D) bfloat16 from the cache, or ``None`` where captions are to be encoded.
        loss_weights: (B,) float32.
        masks: (B, h, w) float32 in [0, 1], the loss masks at the latents' size, or ``None`` where no picture has one.
        num_global: samples of the whole global batch, over all processes.
    """

    draws: tuple[Draw, ...]
    latents: torch.Tensor | None
    pixels: torch.Tensor | None
    text: tuple[torch.Tensor, ...] | None
    loss_weights: torch.Tensor
    num_global: int
    masks: torch.Tensor | None = None

    @property
    def preserves_output(self) -> list[bool]:
        """Which samples are trained towards the base model's own prediction."""
        return [draw.item.subset.preserves_output for draw in self.draws]

    @property
    def captions(self) -> list[str]:
        return [draw.caption for draw in self.draws]
