"""Keeps the messages of other packages, about which a user can do nothing, out of what our own calls print."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

_LOGGERS = ("transformers", "diffusers", "bitsandbytes", "huggingface_hub", "accelerate")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Shows only errors of the model libraries while the block runs; afterwards everything is as it was."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
