"""Seconds of work on a device, and the most that the device gives."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_CEILING_SIDE = {"cpu": 3072, "cuda": 8192}
_PRODUCTS = {"cpu": 1, "cuda": 10}
_NUM_GAPS = 8
_NAME_LENGTH = 120  # of a kernel; C++ templates have names of pages


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Returns how many seconds a piece of work takes, on the device too."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


class Ceiling:
    """A large matrix product of random numbers: zeros or equal numbers would let a processor clock higher."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._side, self._products = _CEILING_SIDE[device.type], _PRODUCTS[device.type]
        self._device = device
        if (device.type, dtype) == ("cpu", torch.float16):
            dtype = torch.float32  # that is what the program multiplies in there
        self._a, self._b = (torch.randn(self._side, self._side, device=device).to(dtype) for _ in range(2))
        self._out = self._a @ self._b

    def measure(self) -> float:
        """Returns TFLOP/s of this moment."""

        def work() -> None:
            for _ in range(self._products):
                torch.mm(self._a, self._b, out=self._out)

        return self._products * 2 * self._side**3 / timed(work, self._device) / 1e12


def longest(work: Callable[[], object], device: torch.device, count: int) -> dict[str, object]:
    """Returns what a piece of work spends its time on: ``busy_s`` and ``kernels``, [name, calls, milliseconds] each.

    Of a GPU also ``idle``: where it waits for the host, [milliseconds, kernel before, kernel behind], the longest first.

    Args:
        work: run once, with the profiler on.
        device: where it computes; of a GPU its kernels and copies are listed, of a CPU torch's operations.
        count: how many are listed, the longest first.
    """
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        timed(work, device)
    if not on_gpu:
        events = sorted(found.key_averages(), key=lambda event: event.self_cpu_time_total, reverse=True)
        rows = [[event.key, event.count, round(event.self_cpu_time_total / 1e3, 3)] for event in events[:count]]
        return {"busy_s": round(sum(event.self_cpu_time_total for event in events) / 1e6, 4), "kernels": rows}
    spans = [event for event in found.events() if event.device_type == DeviceType.CUDA]
    times: dict[str, list[float]] = defaultdict(list)
    for event in spans:
        times[event.name[:_NAME_LENGTH]].append(event.time_range.elapsed_us() / 1e3)
    rows = sorted(([name, len(each), round(sum(each), 3)] for name, each in times.items()), key=lambda row: -row[2])
    idle = _gaps([(event.time_range.start, event.time_range.end, event.name) for event in spans])
    whole = max(event.time_range.end for event in spans) - min(event.time_range.start for event in spans)
    return {
        "busy_s": round((whole - sum(length for length, _, _ in idle)) / 1e6, 4),
        "kernels": rows[:count],
        "idle": [[round(length / 1e3, 3), before[:40], behind[:40]] for length, before, behind in idle[:_NUM_GAPS]],
    }


def _gaps(spans: list[tuple[float, float, str]]) -> list[tuple[float, str, str]]:
    """Returns (length, name before, name behind) of every gap between spans (begin, end, name), the longest first."""
    gaps: list[tuple[float, str, str]] = []
    reached, last = float("inf"), ""
    for begin, end, name in sorted(spans):
        if begin > reached:
            gaps.append((begin - reached, last, name))
        if end > reached or not last:
            reached, last = end, name
    return sorted(gaps, reverse=True)
