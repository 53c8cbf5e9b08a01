"""The short way to launch a kernel launches what Triton's own way does; without a GPU, by a driver that only takes notes.

The kernels are compiled in earnest, for a GPU that is not there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from kernel_helpers import STREAM, Driver, Launch
from torch import Tensor

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")

CONSTANTS = (2304, 256, True)
GRID = (3, 1, 1)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    import triton

    stand_in = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", stand_in)
    return stand_in


@pytest.fixture
def own_way(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Takes down each launch that goes Triton's own way."""
    from triton.runtime.jit import JITFunction

    taken: list[dict[str, Any]] = []
    run = JITFunction.run

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        taken.append(kwargs)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", noted)
    return taken


def tensors(dtype: torch.dtype = torch.bfloat16, factor: torch.dtype = torch.float32, shifted: int = 0) -> list[Tensor]:
    """Returns input, factor, residual and result of a norm; the first ``shifted`` numbers behind a multiple of 16 bytes."""
    x = torch.zeros(3 * 2304 + 8, dtype=dtype)[shifted : shifted + 3 * 2304].view(1, 3, 2304)
    return [x, torch.ones(2304, dtype=factor), torch.zeros_like(x), torch.zeros_like(x)]


def launched(driver: Driver, given: Sequence[Tensor], numbers: tuple[int | float, ...], launcher: Any) -> Launch:
    launcher(GRID, given, numbers, CONSTANTS, 4)
    return driver.launches[-1]


def test_the_second_launch_is_short_and_the_same(driver: Driver, own_way: list[dict[str, Any]]) -> None:
    from library import kernel_launch
    from library.lumina import elementwise_kernels

    launcher = kernel_launch.Launcher(elementwise_kernels.norm_forward)
    given = tensors()
    first = launched(driver, given, (0, 1e-5), launcher)
    assert len(own_way) == 1
    second = launched(driver, given, (0, 1e-5), launcher)
    assert len(own_way) == 1
    assert len(driver.launches) == 2
    assert second.grid == GRID
    assert second.stream == STREAM
    assert second.function is first.function
    assert second.metadata is first.metadata
    assert all(ours is theirs for ours, theirs in zip(second.arguments[:4], given, strict=True))
    assert second.arguments[4:] == (0, 1e-5, *CONSTANTS)


@pytest.mark.parametrize(
    ("given", "numbers", "short"),
    [
        ({}, (1, 1e-5), True),  # numbers are not compiled for
        ({}, (16, 1e-6), True),
        ({}, (17, 1e-6), True),
        ({}, (2**31, 1e-6), False),
        ({"shifted": 8}, (0, 1e-5), True),  # 16 bytes
        ({"shifted": 1}, (0, 1e-5), False),
        ({"dtype": torch.float16}, (0, 1e-5), False),
        ({"factor": torch.bfloat16}, (0, 1e-5), False),
    ],
)
def test_the_kernel_is_the_one_that_triton_takes(
    given: dict[str, Any], numbers: tuple[int, float], short: bool, driver: Driver, own_way: list[dict[str, Any]]
) -> None:
    from library import kernel_launch
    from library.lumina import elementwise_kernels

    kernel = elementwise_kernels.norm_forward
    launcher = kernel_launch.Launcher(kernel)
    launched(driver, tensors(), (0, 1e-5), launcher)
    others = tensors(**given)
    ours = launched(driver, others, numbers, launcher)
    assert (len(own_way) == 1) == short
    kernel[GRID](*others, *numbers, *CONSTANTS, num_warps=4)
    assert driver.launches[-1].function is ours.function
    assert launched(driver, others, numbers, launcher).function is ours.function


@pytest.mark.usefixtures("own_way")
def test_every_kernel_leaves_its_numbers_alone(driver: Driver) -> None:
    """A number that was compiled for would be wrong in the next launch."""
    from library.lumina import elementwise_launches
    from library.memory import fp8_kernels

    values = (*vars(elementwise_launches).values(), *vars(fp8_kernels).values())
    launchers = [value for value in values if isinstance(value, elementwise_launches.Launcher)]
    assert len(launchers) == 8
    for launcher in launchers:
        for parameter in launcher._kernel.params:
            # Floats are never compiled for; what is given to kernels as a number and not called eps is an integer.
            if parameter.name in ("own", "tokens", "units", "rows", "columns"):
                assert parameter.do_not_specialize, launcher._kernel


def test_unknown_versions_launch_by_tritons_way(
    driver: Driver, own_way: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from library import kernel_launch
    from library.lumina import elementwise_kernels

    monkeypatch.setattr(kernel_launch, "_IS_KNOWN", False)
    launcher = kernel_launch.Launcher(elementwise_kernels.norm_forward)
    for count in (1, 2, 3):
        launched(driver, tensors(), (0, 1e-5), launcher)
        assert len(own_way) == len(driver.launches) == count


@pytest.mark.parametrize(
    ("version", "is_amd", "known"),
    [
        ("3.6.0", False, True),
        ("3.9.1.post25", False, True),
        ("3.6.0+git1234", False, True),
        ("3.10.0", False, False),
        ("4.0.0", False, False),
        ("3.5.1", False, False),
        ("3.6.0", True, False),
    ],
)
def test_known_versions(version: str, is_amd: bool, known: bool) -> None:
    from library import kernel_launch

    assert kernel_launch._is_known(version, is_amd) == known


@pytest.mark.parametrize(
    ("width", "piece", "warps"),
    [(2304, 256, 1), (3840, 512, 2), (9216, 1024, 4), (2305, 512, 2), (101, 128, 1), (48, 64, 1), (1, 1, 1)],
)
def test_rows_are_taken_in_nine_pieces_at_most(width: int, piece: int, warps: int) -> None:
    from library import kernel_launch

    assert kernel_launch.pieces(width) == (piece, warps)
