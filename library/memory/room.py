"""How much of a device's memory is to spare."""

from __future__ import annotations

import torch


def never_needed_bytes(device: torch.device) -> float:
    """Returns how much device memory this program could have and has never needed so far; infinite without a device.

    What torch holds ready counts as to be had, and what it once held at most counts as needed, whatever for.
    """
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_reserved(device)
