"""What all modules of Triton kernels share: a trial before they are used, and the device that they are launched on.

Triton comes with torch's CUDA build for Linux. It compiles a kernel when it is first launched, and needs a C compiler for
that, which a machine may lack; and it may not know the GPU. Both show in a trial, after which torch's operations do the
work. The answer is a fact about the machine, so who asks remembers it. That memory is full is no such fact.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from library.errors import SettingsError
from library.shortage import is_out_of_memory

__all__ = ["has_triton", "on_device_of", "tried"]

logger = logging.getLogger(__name__)

_NO_GUARD = contextlib.nullcontext()


def has_triton() -> bool:
    """Whether the package triton is installed."""
    return importlib.util.find_spec("triton") is not None


def tried(name: str, what: str, failure_of: Callable[[ModuleType], str | None]) -> ModuleType | None:
    """Returns a module of kernels if it works, else None.

    A failed trial is warned about; that triton is not installed is none.

    Args:
        name: of the module.
        what: its kernels compute, for the warning.
        failure_of: runs the kernels and returns what is wrong with their results; None = nothing.

    Raises:
        SettingsError: the GPU's memory is full.
    """
    if not has_triton():
        return None
    try:
        kernels = importlib.import_module(name)
        logger.info("%s: trying Triton's kernels, which takes a while where they have to be compiled", what)
        reason = _in_a_thread(failure_of, kernels)
    except Exception as error:  # whatever a compiler or a driver raises: that it cannot run is the answer
        if is_out_of_memory(error):  # a trial takes less than a MiB: torch's operations would find none either
            raise SettingsError(
                f"{what}: the GPU's memory is full, so that not even a trial of Triton's kernels fits; end what else uses it"
                " (nvidia-smi shows that), or have the run need less (docs/memory.md)"
            ) from error
        first_line = next(iter(str(error).strip().splitlines()), "")
        reason = (
            f"a try ended with an error ({type(error).__name__}: {first_line}). Triton needs a C compiler (gcc), Python's"
            " header files, and a folder for compiled code that can be written"
        )
    if reason is None:
        return kernels
    logger.warning(
        "%s: Triton's kernels cannot be used: %s. torch's operations stand in, which takes longer", what, reason
    )
    return None


def _in_a_thread(failure_of: Callable[[ModuleType], str | None], kernels: ModuleType) -> str | None:
    """Returns what a trial finds in a thread of its own.

    Who looks at the operations of the forward pass that asks, to compute them again or to keep something else than is saved,
    must not see these. Nobody waits for the thread who is interrupted: a compiler that hangs must not hold the program.
    """
    found: Future[str | None] = Future()

    def run() -> None:
        try:
            found.set_result(failure_of(kernels))
        except BaseException as error:  # raised where the result is waited for
            found.set_exception(error)

    threading.Thread(target=run, name="trial of kernels", daemon=True).start()
    return found.result()


def on_device_of(x: Tensor) -> Any:
    """Returns the context to launch in: Triton takes the current device, whatever it is given."""
    index = x.get_device()
    return _NO_GUARD if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)
