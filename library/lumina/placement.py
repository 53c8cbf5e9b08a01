"""Copies from the host's memory to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def copied_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor on a device; a copy to CUDA is under way while the program goes on.

    The host's part of such a copy must be pinned memory; torch keeps it until the copy is done.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
