"""Showings of one picture that differ: other places that are cut out, other colours; pure functions of the draw.

The rules about mirroring and captions are elsewhere; all that is here gives other pixels, so it never goes together with
cached latents (``augment_rules.py``). Held-out pictures (epoch 0) are never varied.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath
from random import Random

import torch

from library import keyed_random
from library.data.buckets import Placement, Size
from library.data.items import Draw, Item
from library.errors import some

logger = logging.getLogger(__name__)

# A third of the showings has other colours, half of them another hue and half another brightness curve.
_COLOUR_SHARE = 1 / 3
_MAX_HUE_DEGREES = 16.0  # 8 of the 180 steps in which sd-scripts counts the circle of hues
_MIN_GAMMA, _MAX_GAMMA = 0.95, 1.05


@dataclass(frozen=True, slots=True)
class ColourChange:
    """How the colours of a showing differ from the file's: hues turned, brightness in [0, 1] raised to ``gamma``."""

    hue_degrees: float = 0.0
    gamma: float = 1.0


@dataclass(frozen=True, slots=True)
class Face:
    """A face's centre and size in pixels of the whole picture."""

    centre_x: int
    centre_y: int
    width: int
    height: int


def is_varied(draw: Draw) -> bool:
    """Tells whether this showing may differ from the others; held-out pictures are always shown alike."""
    return draw.epoch > 0


def colour_change(draw: Draw) -> ColourChange | None:
    """Returns what ``color_aug`` does to this showing; ``None``: nothing."""
    if not draw.item.subset.color_aug or not is_varied(draw):
        return None
    rng = keyed_random.python_random("colour", draw.key)
    if rng.random() >= _COLOUR_SHARE:
        return None
    if rng.random() < 0.5:
        return ColourChange(hue_degrees=rng.uniform(-_MAX_HUE_DEGREES, _MAX_HUE_DEGREES))
    return ColourChange(gamma=rng.uniform(_MIN_GAMMA, _MAX_GAMMA))


def with_colours(pixels: torch.Tensor, change: ColourChange) -> torch.Tensor:
    """Returns pixels (3, H, W) in [-1, 1] with other colours; lightest and darkest channel keep a turned hue's range."""
    rgb = (pixels + 1) / 2
    if change.hue_degrees:
        rgb = _turned(rgb, change.hue_degrees)
    if change.gamma != 1.0:
        rgb = rgb.clamp(0, 1) ** change.gamma
    return rgb * 2 - 1


def _turned(rgb: torch.Tensor, degrees: float) -> torch.Tensor:
    """Returns RGB (3, H, W) in [0, 1] with every hue turned; value and saturation (of HSV) stay."""
    value, brightest = rgb.max(dim=0)
    chroma = value - rgb.min(dim=0).values
    red, green, blue = rgb
    safe = chroma.clamp_min(1e-6)  # grey has no hue, and its chroma of 0 hides whatever is computed for it
    towards = torch.stack([(green - blue) / safe, (blue - red) / safe + 2, (red - green) / safe + 4])
    sixth = towards.gather(0, brightest[None])[0] + degrees / 60  # hue in sixths of the circle
    channels = []
    for start in (5, 3, 1):
        place = (sixth + start).remainder(6)
        channels.append(value - chroma * torch.minimum(place, 4 - place).clamp(0, 1))
    return torch.stack(channels)


def placement_of(draw: Draw, enable_bucket: bool) -> Placement:
    """Returns how this showing is resized and cut out.

    Args:
        draw: the showing.
        enable_bucket: whether its dataset has buckets; only without them does a crop change the scale.
    """
    item, subset = draw.item, draw.item.subset
    if not is_varied(draw):
        return item.placement
    if subset.face_crop_aug_range is not None and not enable_bucket:
        face = face_of(item.name)
        if face is not None:
            return _around_face(draw, face, subset.face_crop_aug_range)
    if not subset.random_crop:
        return item.placement
    rng = keyed_random.python_random("crop", draw.key)
    resized, bucket = item.resized_px, item.bucket_px
    if not enable_bucket and _covers(item.size_px, bucket):
        resized = item.size_px  # a crop of the picture as it is; a smaller one is enlarged until it covers
    left, top = (rng.randint(0, side - part) for side, part in zip(resized, bucket, strict=True))
    return Placement(resized, bucket, item.placement.aspect_error, (left, top))


def _covers(size: Size, bucket: Size) -> bool:
    return size[0] >= bucket[0] and size[1] >= bucket[1]


def face_of(name: str) -> Face | None:
    """Returns the face that a file name ``..._cx_cy_w_h`` tells of, or ``None``."""
    parts = PurePath(name).stem.split("_")
    if len(parts) < 5 or not all(part.isascii() and part.isdigit() for part in parts[-4:]):
        return None
    centre_x, centre_y, width, height = (int(part) for part in parts[-4:])
    return Face(centre_x, centre_y, width, height) if max(width, height) > 0 else None


def _around_face(draw: Draw, face: Face, factors: tuple[float, float]) -> Placement:
    """Returns a crop in which the shorter side is a random factor of the face's size, as far as the picture allows.

    The picture is never made smaller than the crop, and enlarged only where it has to cover it.
    """
    item = draw.item
    rng = keyed_random.python_random("face crop", draw.key)
    (width, height), bucket = item.size_px, item.bucket_px
    covering = max(bucket[0] / width, bucket[1] / height)
    wanted = min(bucket) / (max(face.width, face.height) * rng.uniform(*factors))
    scale = max(covering, min(1.0, wanted))
    # Not below the bucket, where rounding would miss it by a pixel.
    resized = (max(bucket[0], int(width * scale + 0.5)), max(bucket[1], int(height * scale + 0.5)))
    sides = zip(
        (face.centre_x, face.centre_y),
        (face.width, face.height),
        item.size_px,
        resized,
        bucket,
        strict=True,
    )
    left, top = (
        _start(rng, centre * to / side, extent * to / side, to, part, draw.item.subset.random_crop)
        for centre, extent, side, to, part in sides
    )
    return Placement(resized, bucket, item.placement.aspect_error, (left, top))


def _start(rng: Random, centre: float, extent: float, length: int, part: int, anywhere: bool) -> int:
    """Returns where a crop begins on one axis: the face in its middle, or ``anywhere`` as long as it holds the face."""
    if anywhere and extent < part:
        start = rng.uniform(centre + extent / 2 - part, centre - extent / 2)
    else:
        start = centre - part / 2
    return min(max(int(start + 0.5), 0), length - part)


def warn_of_missing_faces(items: Iterable[Item]) -> None:
    """Warns once of pictures that are to be cut out around a face that their names do not tell of."""
    without = [item.path.name for item in items if item.subset.face_crop_aug_range and face_of(item.name) is None]
    if without:
        logger.warning(
            "face_crop_aug_range: %d pictures are cut as without it, because their names do not end in the face's"
            " place (name_cx_cy_w_h.png, in pixels): %s",
            len(without),
            some(without),
        )
