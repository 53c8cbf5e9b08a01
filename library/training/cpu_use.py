"""Training on a CPU: its memory and its threads."""

from __future__ import annotations

import logging
import os

import torch

from library.memory.host_memory import keep_freed_memory
from library.memory.settings import MemorySettings

logger = logging.getLogger(__name__)


def use_cpu_well(settings: MemorySettings, device: torch.device, num_processes: int) -> None:
    """Keeps freed host memory where that is faster, and says so where cores are left idle; only for a run on the CPU."""
    if device.type != "cpu":
        return
    saves_most = settings.gradient_checkpointing and settings.gradient_checkpointing_level == "full"
    keep_freed_memory(large_blocks=not saves_most)
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    if threads * num_processes < cores:
        logger.info(
            "Each process computes with %d of the CPU's %d threads; more are given by the launcher's"
            " --num_cpu_threads_per_process or the environment variable OMP_NUM_THREADS",
            threads,
            cores,
        )
