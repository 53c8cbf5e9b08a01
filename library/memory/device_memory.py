"""How PyTorch hands out an NVIDIA card's memory: in segments that grow, set up before torch is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

# The newer name first. torch reads both (2.11 to 2.13, in this order: CUDA's, then the general one).
_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_GROWING = "expandable_segments:True"
# Made by NVIDIA's own driver. There is neither with AMD's, nor under WSL, whose driver is Windows'.
_NVIDIA = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"))


def let_segments_grow(environment: MutableMapping[str, str] | None = None) -> bool:
    """Has PyTorch map a GPU's memory page by page instead of in blocks of fixed sizes that fall to pieces.

    Between the phases of a run (encoding pictures, encoding captions, training, drawing) sizes differ so much that little of
    what one phase leaves in such blocks fits the next: on an H100 a run held 1.6 times what its tensors needed. It is an
    environment variable, because torch reads its settings once, at the latest when CUDA starts; processes that this one
    starts find it too. Whoever sets the variable, under either name, is left alone, and so are machines where PyTorch would
    say that it cannot do it: only Linux with NVIDIA's driver is known to.

    Args:
        environment: of the process, unless given.

    Returns:
        Whether it was set.
    """
    environment = os.environ if environment is None else environment
    if any(name in environment for name in _VARIABLES) or not sys.platform.startswith("linux"):
        return False
    if not any(path.exists() for path in _NVIDIA):
        return False
    environment[_VARIABLES[0]] = _GROWING
    return True
