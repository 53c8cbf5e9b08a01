"""Losses by noise level: four bands of sigma, [0, 0.25), [0.25, 0.5), [0.5, 0.75) and [0.75, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NUM_BANDS = 4
NAMES = tuple(f"sigma_{band / NUM_BANDS:.2f}-{(band + 1) / NUM_BANDS:.2f}" for band in range(NUM_BANDS))


def band_of(sigma: float) -> int:
    """Returns the number of the band that a noise level lies in."""
    return min(int(sigma * NUM_BANDS), NUM_BANDS - 1)


def sums(losses: Tensor, sigma: Tensor) -> Tensor:
    """Returns the sum of the losses in each band and then how many there are, (2 * NUM_BANDS,) float32.

    Nothing here waits for the device.

    Args:
        losses: (B,), one a sample.
        sigma: (B,), its noise level.
    """
    bands = (sigma * NUM_BANDS).long().clamp(max=NUM_BANDS - 1)
    inside = bands == torch.arange(NUM_BANDS, device=bands.device).unsqueeze(1)  # (NUM_BANDS,B)
    # Not a product with 0 and 1: one loss that is no number would spoil all bands.
    of_bands = torch.where(inside, losses.detach().float(), 0).sum(dim=1)
    return torch.cat([of_bands, inside.sum(dim=1).float()])


def means(band_sums: Sequence[float], prefix: str) -> dict[str, float]:
    """Returns the mean loss of each band that has losses, by name; ``band_sums`` as :func:`sums` gives them."""
    totals, counts = band_sums[:NUM_BANDS], band_sums[NUM_BANDS:]
    return {prefix + name: total / count for name, total, count in zip(NAMES, totals, counts, strict=True) if count > 0}
