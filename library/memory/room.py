"""How much of a device's memory is to spare, and what the most of it was needed for."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class Peak:
    """The most device memory that tensors took so far, and what the program was doing then.

    Attributes:
        num_bytes: 0 without a device.
        doing: what it was; empty at first.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self.doing = ""

    def note(self, device: torch.device, doing: str) -> None:
        """Says what has been done since the last note.

        torch's own peak is only read: others go by it, such as :func:`never_needed_bytes`.
        """
        if device.type != "cuda":
            return
        import torch

        num_bytes = torch.cuda.max_memory_allocated(device)
        if num_bytes > self.num_bytes:
            self.num_bytes, self.doing = num_bytes, doing

    def report(self, device: torch.device) -> None:
        """Logs the peaks of a GPU, and what was done then; nothing without one."""
        if device.type != "cuda":
            return
        import torch

        logger.info(
            "Peak GPU memory: %.2f GiB reserved, %.2f GiB in tensors, while %s",
            torch.cuda.max_memory_reserved(device) / 2**30,
            self.num_bytes / 2**30,
            self.doing,
        )


def never_needed_bytes(device: torch.device) -> float:
    """Returns how much device memory this program could have and has never needed so far; infinite without a device.

    What torch holds ready counts as to be had, and what it once held at most counts as needed, whatever for.
    """
    if device.type != "cuda":
        return float("inf")
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_reserved(device)
