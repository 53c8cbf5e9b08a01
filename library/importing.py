"""Imports of large packages without the garbage collector's looking through them again and again.

Importing torch, diffusers and transformers makes about a million objects that stay. Python's collector looks through all
of them several times meanwhile, which is a quarter of the time that the imports take, and again at every full collection
later, each time 0.15 s: between two training steps, too.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected_imports() -> Iterator[None]:
    """Turns the garbage collector off while the block runs, and has it leave alone for good what is there at its end.

    For imports and what lasts as long as the program: whatever else is there by then, also from before the block, is never
    freed where it is part of a reference cycle. Where everything was imported already, nothing is left alone.
    """
    was_enabled, num_modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > num_modules:
            # An import that failed on its way holds the frames of all callers, in a cycle: frozen, it would keep for good
            # whatever they go on to make, such as a model. What the block made is young, so no more is looked at.
            gc.collect(0)
            gc.freeze()
        if was_enabled:
            gc.enable()
