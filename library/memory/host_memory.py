"""How the C library hands out memory, for models that are computed on the CPU."""

from __future__ import annotations

import ctypes
import logging
import sys

logger = logging.getLogger(__name__)

# glibc's names for its settings (malloc.h); values are C ints.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEPT = 2**31 - 1
_GROWN_BY = 64 * 2**20
_LARGE = 32 * 2**20


def keep_freed_memory(large_blocks: bool = True) -> bool:
    """Lets the process keep memory that it frees, instead of giving each large tensor back to the system.

    glibc maps every large block from the system and unmaps it when it is freed, so each intermediate result of a model
    is memory that the system must first fill with zeros, page by page: that takes longer than most of the arithmetic
    between matrix products. Measured in docs/benchmarks/log.md. Does nothing where the C library is another one.

    Args:
        large_blocks: keep those of 32 MiB and more too. It is the fastest, but where memory is scarce it falls to pieces
            between them that nothing large fits into.

    Returns:
        Whether it took effect.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    # Before 2.35 glibc takes no threshold above 32 MiB, and whoever sets any of these also ends its growing by itself:
    # refused, it would stay at 128 KiB, where nearly every tensor is mapped and unmapped.
    kept = (large_blocks and mallopt(_MMAP_THRESHOLD, _KEPT) == 1) or mallopt(_MMAP_THRESHOLD, _LARGE) == 1
    taken = kept and all(mallopt(name, value) == 1 for name, value in ((_TRIM_THRESHOLD, _KEPT), (_TOP_PAD, _GROWN_BY)))
    logger.debug("freed memory is %s", "kept" if taken else "given back to the system")
    return taken


def give_freed_memory_back() -> bool:
    """Gives the system all memory back that the process has freed and kept; for when a whole model was let go.

    Otherwise up to 2 GiB of it would stay for as long as the process lives, whatever it needs by then.

    Returns:
        Whether there is a way to.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # musl has none
        return False
    trim(ctypes.c_size_t(0))
    return True
