"""Picture files -> sizes and pixels, with Pillow alone.

Sizes are (width, height) in pixels after EXIF orientation. Colour profiles are not applied, as in sd-scripts.
"""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from library.data.buckets import Placement, Size

# A picture whose resized form has this many times the bucket's area is resized in its middle only.
_MOSTLY_CUT_OFF = 16

# Part of every cached latent's key: raise it when pixels of the same file would come out differently.
PIXELS_VERSION = 1

# Pillow refuses pictures above 179 million pixels as a possible attack; these are the user's own scans and panoramas.
# Above this limit (a header that claims a 32768 x 32768 picture needs 3 GiB) it stays on guard.
Image.MAX_IMAGE_PIXELS = 2**30

# What Pillow's decoders raise for files that are broken or no pictures.
BROKEN_PICTURE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

_ORIENTATION_TAG = 0x0112
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Averaging over areas is what Pillow calls BOX.
_SYNONYMS = {"area": "box", "linear": "bilinear", "cubic": "bicubic"}


def read_size(path: Path) -> Size:
    """Returns (width, height) from the file's header, without decoding it.

    Raises:
        BROKEN_PICTURE: the file is no picture, or its header is broken.
    """
    with Image.open(path) as image:
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def check_decodable(path: Path) -> None:
    """Decodes the picture and throws the result away.

    Raises:
        BROKEN_PICTURE: it cannot be decoded, for example because it is truncated.
    """
    with Image.open(path) as image:
        # JPEG decoders can leave most of the arithmetic out and still read every byte.
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()


def resize_method(name: str | None, size: Size, resized: Size) -> str:
    """Returns the filter that is really used: ``"none"`` where the size stays, else a key of Pillow's filters.

    Args:
        name: the user's ``resize_interpolation``; ``None``: area where neither side grows, else lanczos.
        size: the picture's size.
        resized: the size that it is to have.
    """
    if size == resized:
        return "none"
    if name is None:
        return "lanczos" if resized[0] > size[0] or resized[1] > size[1] else "box"
    return _SYNONYMS.get(name, name)


def load_pixels(path: Path, placement: Placement, interpolation: str | None) -> torch.Tensor:
    """Returns a picture as the model trains on it: upright, on white, resized, and cut out of that.

    Args:
        path: the file.
        placement: the size to resize to, and what to cut out.
        interpolation: the user's ``resize_interpolation``.

    Returns:
        (3, H, W) float32 in [-1, 1], RGB.

    Raises:
        BROKEN_PICTURE: it cannot be decoded.
    """
    image = open_rgb(path)
    image = placed(image, placement, resize_method(interpolation, image.size, placement.resized_px))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.to(torch.float32).div_(127.5).sub_(1.0).contiguous()


def placed(image: Image.Image, placement: Placement, method: str) -> Image.Image:
    """Returns the part of a picture, or of its mask, that lies in the bucket.

    Args:
        image: upright, of any size: it is stretched to ``placement.resized_px``.
        placement: the size to resize to, and what to cut out.
        method: from :func:`resize_method`.

    Raises:
        ValueError: what is to be cut out does not lie inside the picture.
    """
    width, height = placement.bucket_px
    left, top = placement.left_top_px
    if method != "none" and math.prod(placement.resized_px) > _MOSTLY_CUT_OFF * width * height:
        # Very long pictures would become gigabytes before most of them is cut off: resize that part alone.
        return image.resize((width, height), _FILTERS[method], box=_part(image.size, placement))
    if method != "none":
        image = image.resize(placement.resized_px, _FILTERS[method])
    if min(left, top) < 0 or left + width > image.width or top + height > image.height:
        raise ValueError(f"its size is {image.width} x {image.height} now, less than the bucket: it has changed")
    return image.crop((left, top, left + width, top + height))


def _part(size: Size, placement: Placement) -> tuple[float, float, float, float]:
    """Returns the part of a picture, in its own pixels, that lies in the bucket once it is resized."""
    edges = []
    sizes = zip(size, placement.resized_px, placement.bucket_px, placement.left_top_px, strict=True)
    for side, resized, bucket, start in sizes:
        edges.append((start * side / resized, (start + bucket) * side / resized))
    (left, right), (top, bottom) = edges
    return left, top, right, bottom


def open_rgb(path: Path) -> Image.Image:
    """Returns the upright picture in mode RGB, transparent parts on white.

    Raises:
        BROKEN_PICTURE: it cannot be decoded.
    """
    with Image.open(path) as image:
        orientation = _orientation(image)
        return _upright(_to_rgb(image), orientation)


def open_mask(path: Path) -> Image.Image:
    """Returns the upright picture's brightness, or its red where it has colours, in mode L; transparency is ignored.

    Raises:
        BROKEN_PICTURE: it cannot be decoded.
    """
    with Image.open(path) as image:
        orientation = _orientation(image)
        if _is_16_bit(image):
            grey = _to_8_bit(image)
        elif image.mode in ("1", "L", "LA"):
            grey = image.convert("L")
        else:
            grey = image.convert("RGBA").getchannel("R")
        return _upright(grey, orientation)


def open_alpha(path: Path) -> Image.Image | None:
    """Returns the upright picture's alpha channel in mode L (255: opaque), or ``None`` where it has none.

    Raises:
        BROKEN_PICTURE: it cannot be decoded.
    """
    with Image.open(path) as image:
        if _is_16_bit(image) or not _has_alpha(image):
            return None
        orientation = _orientation(image)
        return _upright(image.convert("RGBA").getchannel("A"), orientation)


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """Returns a decoded picture turned upright; the orientation is read before, as sizes are, and not from its end."""
    return image.transpose(_TO_UPRIGHT[orientation]) if orientation in _TO_UPRIGHT else image


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8.

    Pillow's PNG class decodes the whole picture to look for EXIF data behind the pixels; the base class reads what
    stands before them, so that sizes of large folders are known quickly.
    """
    try:
        value = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except (*BROKEN_PICTURE, AttributeError):
        return 1  # unreadable EXIF data says nothing of the picture
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if _is_16_bit(image):
        return _to_8_bit(image).convert("RGB")
    if _has_alpha(image):
        with_alpha = image.convert("RGBA")
        white = Image.new("RGBA", with_alpha.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, with_alpha).convert("RGB")
    return image.convert("RGB")


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def _is_16_bit(image: Image.Image) -> bool:
    return image.mode == "I" or image.mode.startswith("I;16")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Returns sixteen bits of grey as eight; Pillow's own conversion would clip at 255."""
    grey = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
    return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))


def reason(error: BaseException) -> str:
    """Returns in a few words why a picture cannot be read."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture, or an empty or broken file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
