"""Imports of large packages without the garbage collector's looking through them again and again.

Importing torch, diffusers and transformers makes about a million objects that stay. Python's collector looks through all
of them several times meanwhile, which is a quarter of the time that the imports take, and again at every full collection
later, each time 0.15 s: between two training steps, too.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected_imports() -> Iterator[None]:
    """Turns the garbage collector off while the block runs, and has it leave alone for good what is there at its end.

    For imports and what lasts as long as the program: whatever else the block makes is never freed where it is part of a
    reference cycle.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
