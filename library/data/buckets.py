"""Which size a picture is trained in: pure arithmetic on widths and heights, all in pixels.

With buckets, a picture is resized to cover the bucket whose aspect ratio is nearest to its own, and its centre is cut
out. The results equal sd-scripts', whose numbers are recorded in ``tests/golden/buckets.json``.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

from library.data.config import DatasetConfig

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Placement:
    """What happens to a picture: it is resized to ``resized_px``, then ``bucket_px`` is cut out of it.

    ``aspect_error`` is the bucket's width / height minus the picture's. ``offset_px`` is the left and upper edge of what
    is cut out; ``None``: its centre.
    """

    resized_px: Size
    bucket_px: Size
    aspect_error: float
    offset_px: Size | None = None

    @property
    def left_top_px(self) -> Size:
        """The left and upper edge of what is cut out of the resized picture."""
        if self.offset_px is not None:
            return self.offset_px
        return (self.resized_px[0] - self.bucket_px[0]) // 2, (self.resized_px[1] - self.bucket_px[1]) // 2


def bucket_sizes(resolution: Size, min_side: int, max_side: int, step: int) -> list[Size]:
    """Returns the (width, height) of all buckets of about the area of ``resolution``, sorted.

    Args:
        resolution: width and height whose product is the largest area of a bucket.
        min_side: shortest side; rounded down to a multiple of ``step``.
        max_side: longest side; rounded up to a multiple of ``step``.
        step: sides are multiples of it.
    """
    area = resolution[0] * resolution[1]
    low = min_side // step * step
    high = -(-max_side // step) * step
    square = math.isqrt(area) // step * step
    sizes = {(square, square)}
    for width in range(max(low, step), high + 1, step):
        height = min(high, area // width // step * step)
        if height >= max(low, step):
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


class BucketChooser:
    """Gives each picture of one dataset its bucket."""

    def __init__(self, config: DatasetConfig) -> None:
        self._area = config.resolution[0] * config.resolution[1]
        self._step = config.bucket_reso_steps
        self._by_size = config.enable_bucket and config.bucket_no_upscale
        if self._by_size:
            self.sizes: list[Size] = []
        elif config.enable_bucket:
            self.sizes = bucket_sizes(config.resolution, config.min_bucket_reso, config.max_bucket_reso, self._step)
        else:
            self.sizes = [config.resolution]
        # Ties go to the first in sorted order; equal ratios keep only their first size.
        ratios: dict[float, Size] = {}
        for size in self.sizes:
            ratios.setdefault(size[0] / size[1], size)
        self._ratios = sorted(ratios)
        self._size_of_ratio = ratios

    def place(self, width: int, height: int) -> Placement | None:
        """Returns where a picture of this size goes, or ``None`` where it is too small for any bucket.

        Only with ``bucket_no_upscale`` can a picture be too small: when a side is shorter than the bucket step.
        """
        if self._by_size:
            return self._place_by_size(width, height)
        bucket = (width, height) if (width, height) in self.sizes else self._nearest(width / height)
        error = bucket[0] / bucket[1] - width / height
        if width / height > bucket[0] / bucket[1]:
            scale = bucket[1] / height
        else:
            scale = bucket[0] / width
        return Placement((int(width * scale + 0.5), int(height * scale + 0.5)), bucket, error)

    def _nearest(self, ratio: float) -> Size:
        place = bisect.bisect_left(self._ratios, ratio)
        around = self._ratios[max(0, place - 1) : place + 1]
        candidates = [(abs(other - ratio), self._size_of_ratio[other]) for other in around]
        return min(candidates)[1]

    def _place_by_size(self, width: int, height: int) -> Placement | None:
        ratio = width / height
        resized = (width, height)
        if width * height > self._area:
            exact_width = math.sqrt(self._area * ratio)
            by_width = self._floor(exact_width)
            by_height = self._floor(self._area / exact_width)
            if by_width and by_height:
                resized = self._closer(ratio, by_width, by_height)
            else:
                resized = (int(exact_width + 0.5), int(self._area / exact_width + 0.5))
        bucket = (resized[0] // self._step * self._step, resized[1] // self._step * self._step)
        if not all(bucket):
            return None
        return Placement(resized, bucket, bucket[0] / bucket[1] - ratio)

    def _closer(self, ratio: float, by_width: int, by_height: int) -> Size:
        """Returns the resized size that keeps the aspect ratio better: one fixes the width, the other the height."""
        fixed_width = (by_width, int(by_width / ratio + 0.5))
        fixed_height = (int(by_height * ratio + 0.5), by_height)
        width_error = abs(by_width / self._floor(fixed_width[1], 1) - ratio)
        height_error = abs(self._floor(fixed_height[0], 1) / by_height - ratio)
        return fixed_width if width_error < height_error else fixed_height

    def _floor(self, side: float, least: int = 0) -> int:
        return max(int(side + 0.5) // self._step * self._step, least)
