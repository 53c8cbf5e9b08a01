"""What a run says of its device, and does for it: a CPU's memory and threads."""

from __future__ import annotations

import logging
import os

import torch

from library.memory.host_memory import keep_freed_memory
from library.memory.prepare import warn_where_useless
from library.memory.settings import MemorySettings

logger = logging.getLogger(__name__)


def use_device(settings: MemorySettings, device: torch.device, num_processes: int, seed: int) -> None:
    """Says where a run computes, and warns of flags that do nothing there.

    On a CPU it keeps freed host memory where that is faster, and says so where cores are left idle.
    """
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    logger.info("Device: %s, %d process%s; seed %d", where, num_processes, "es" if num_processes > 1 else "", seed)
    warn_where_useless(settings, device)
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
