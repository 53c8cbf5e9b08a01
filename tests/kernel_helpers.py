"""Triton's kernels compiled for GPUs that are not there: as they are launched, by a driver that only takes notes.

Nothing is computed: results are whatever memory holds.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import elementwise_helpers
import torch

STREAM = 5
_DEVICES = itertools.count(1000)  # numbers that no real device has: Triton keeps kernels by them


class Launch(NamedTuple):
    """What a driver is told."""

    grid: tuple[int, int, int]
    stream: int
    function: object
    metadata: Any
    arguments: tuple[Any, ...]


class Driver:
    """Stands for Triton's driver of an NVIDIA GPU.

    Attributes:
        launches: what it was told.
        device: number of the GPU that it says is there.
    """

    def __init__(self, capability: int = 90) -> None:
        """Takes the GPU's compute capability, such as 86 for 8.6."""
        self.launches: list[Launch] = []
        self.utils = self
        self.device = next(_DEVICES)
        self._capability = capability

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return STREAM

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**20}

    def load_binary(self, *_: Any) -> tuple[Any, ...]:
        return object(), object(), 32, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launcher(x: int, y: int, z: int, stream: int, function: object, packed: Any, *rest: Any) -> None:
            self.launches.append(Launch((x, y, z), stream, function, packed, rest[3:]))

        return launcher


@contextlib.contextmanager
def driver_of(capability: int) -> Iterator[Driver]:
    """Has all launches go Triton's own way to a GPU of this compute capability."""
    import triton

    from library import kernel_launch

    driver = Driver(capability)
    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(kernel_launch, "_IS_KNOWN", False),  # what is kept is kept for a tensor's device: here a CPU
    ):
        yield driver


def compiled_for(driver: Driver, module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Yields name and compiled kernel of all kernels of a module that were launched by a driver."""
    from triton.runtime.jit import JITFunction

    for name, kernel in vars(module).items():
        if isinstance(kernel, JITFunction) and driver.device in kernel.device_caches:
            for compiled in kernel.device_caches[driver.device][0].values():
                yield name, compiled


def launch_elementwise(*cases: elementwise_helpers.Case) -> None:
    """Launches forward and backward what a case needs, each."""
    for case in cases:
        upstream = torch.zeros_like(case.inputs[0])  # a result is of the size of its first input
        elementwise_helpers.results(elementwise_helpers.by_kernel(case), case, case.inputs, upstream)


def model_cases(dtype: torch.dtype) -> list[elementwise_helpers.Case]:
    """Returns cases of one token that need all code of a step of the real model, for its batches of any size."""
    sizes = (1, 1, 2304, "of a sample", False, dtype), (1, 8200, 2304, "of a sample", True, dtype)
    norms = [elementwise_helpers.norm(*size) for size in sizes]  # the factor's gradient: of few and of many tokens
    rotation = elementwise_helpers.rotation(1, 1, 24, 8, 96, 1, dtype)
    frozen = [case._replace(num_trained=1) for case in (norms[0], rotation)]
    return [*norms, *frozen, elementwise_helpers.gated(dtype, 1, 1, 9216)]


def launch_fp8() -> None:
    """Launches all that products in fp8 need in the real model."""
    from library.memory import fp8_kernels

    for width in (2304, 3840, 9216):
        tokens = torch.zeros(1, width, dtype=torch.bfloat16)
        fp8_kernels.quantise_rows(tokens)
        fp8_kernels.quantise_rows(tokens, torch.ones(width))
    fp8_kernels.transpose(torch.zeros(208, 400, dtype=torch.float8_e4m3fn))
