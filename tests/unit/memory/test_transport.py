"""Pinned host memory as CUDA's transport makes it, with a stand-in for what pins it."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.errors import SettingsError
from library.memory.transport import CudaTransport
from library.memory.views import View, whole_storage


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Addresses and sizes of what was pinned, in the order of the calls."""
    calls: list[tuple[int, int]] = []

    def register(address: int, num_bytes: int, flags: int) -> int:
        calls.append((address, num_bytes))
        return 0 if num_bytes < 2**30 else 2  # cudaErrorMemoryAllocation

    cudart = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda address: 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return calls


@pytest.mark.parametrize("begins_at", [0, 64, 4032])
def test_what_is_laid_into_a_host_buffer_is_what_is_copied(
    pinned: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, begins_at: int
) -> None:
    """``begins_at``: the byte of a page that the C library's memory begins at."""
    empty = torch.empty

    def placed(*size: int, **given: Any) -> torch.Tensor:
        if size != (770 * 4096,):
            return empty(*size, **given)
        memory = empty(772 * 4096, **given)
        begin = (begins_at - memory.data_ptr()) % 4096
        return memory[begin : begin + 770 * 4096]

    monkeypatch.setattr(torch, "empty", placed)
    buffer = CudaTransport(torch.device("cpu")).host_buffer(3 * 2**20 + 5)
    assert pinned == [(buffer.data_ptr(), 769 * 4096)]
    assert buffer.data_ptr() % 4096 == 0
    # PyTorch looks at a storage's first byte to tell whether memory is pinned.
    assert (buffer.storage_offset(), buffer.untyped_storage().data_ptr()) == (0, buffer.data_ptr())
    assert whole_storage(buffer).numel() == 769 * 4096
    values = torch.randn(8, 4)
    View(torch.float32, 2, (8, 4), (4, 1)).into(buffer).copy_(values)
    assert torch.equal(buffer[8 : 8 + 128].view(torch.float32).view(8, 4), values)


def test_a_buffer_outlives_the_transport(pinned: list[tuple[int, int]]) -> None:
    transport = CudaTransport(torch.device("cpu"))
    buffer = transport.host_buffer(2**26)  # so large that the system takes it back at once
    del transport
    gc.collect()
    assert len(pinned) == 1
    buffer.fill_(7)
    assert int(buffer[-1]) == 7


def test_a_view_in_a_buffer_is_counted_from_the_buffers_begin() -> None:
    buffer = torch.zeros(256, dtype=torch.uint8)[64:]
    values = torch.randn(8, 4)
    View(torch.float32, 2, (8, 4), (4, 1)).into(buffer).copy_(values)
    assert torch.equal(buffer[8 : 8 + 128].view(torch.float32).view(8, 4), values)


def test_a_place_that_cannot_be_counted_in_its_dtype_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="byte 2"):
        View(torch.float32, 0, (1,), (1,)).into(torch.zeros(16, dtype=torch.uint8)[2:])


@pytest.mark.usefixtures("pinned")
def test_memory_that_cannot_be_pinned_is_said() -> None:
    with pytest.raises(SettingsError, match=r"1.00 GiB of host memory cannot be pinned .*CUDA error 2"):
        CudaTransport(torch.device("cpu")).host_buffer(2**30)
