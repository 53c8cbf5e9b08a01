"""Pinned host memory as CUDA's transport makes it, with a stand-in for what pins it."""

from __future__ import annotations

from types import SimpleNamespace

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


def test_what_is_laid_into_a_host_buffer_is_what_is_copied(pinned: list[tuple[int, int]]) -> None:
    buffer = CudaTransport(torch.device("cpu")).host_buffer(3 * 2**20 + 5)
    assert buffer.storage_offset() > 0  # or this shows nothing
    assert pinned == [(buffer.data_ptr(), 769 * 4096)]
    assert buffer.data_ptr() % 4096 == 0
    values = torch.randn(8, 4)
    View(torch.float32, 2, (8, 4), (4, 1)).into(buffer).copy_(values)
    assert torch.equal(buffer[8 : 8 + 128].view(torch.float32).view(8, 4), values)
    assert whole_storage(buffer).numel() > buffer.numel()


def test_a_place_that_cannot_be_counted_in_its_dtype_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="byte 2"):
        View(torch.float32, 0, (1,), (1,)).into(torch.zeros(16, dtype=torch.uint8)[2:])


@pytest.mark.usefixtures("pinned")
def test_memory_that_cannot_be_pinned_is_said() -> None:
    with pytest.raises(SettingsError, match=r"1.00 GiB of host memory cannot be pinned .*CUDA error 2"):
        CudaTransport(torch.device("cpu")).host_buffer(2**30)
