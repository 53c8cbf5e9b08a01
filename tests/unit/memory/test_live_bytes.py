"""Bytes are counted by the lifetimes of storages, on the meta device as in real memory."""

import pytest
import torch
from torch import nn

from library.memory.live_bytes import LiveBytes, Speed, bytes_of, rounded

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("device", [CPU, META], ids=str)
def test_a_storage_counts_from_its_first_tensor_to_its_last(device: torch.device) -> None:
    counter = LiveBytes(device)
    with counter:
        first = torch.empty(1024, device=device)
        view = first[10:].view(2, -1)  # the same storage
        assert counter.live == 4096
        second = first * 2
        assert counter.live == 8192
        del first, second
        assert counter.live == 4096  # the view keeps it
        del view
    assert (counter.live, counter.peak) == (0, 8192)


def test_the_peak_begins_anew() -> None:
    counter = LiveBytes(META)
    with counter:
        kept = torch.empty(256, device=META)
        torch.empty(4096, device=META)
        counter.reset_peak()
    assert counter.peak == counter.live == rounded(kept.nbytes)


def test_other_devices_do_not_count() -> None:
    counter = LiveBytes(META)
    with counter:
        kept = torch.ones(1000) + 1
    assert counter.peak == 0
    assert kept.device == CPU


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_needs_the_same_on_the_meta_device_as_in_memory(checkpointing: bool) -> None:
    """Forward, backward and optimizer: what autograd keeps and lets go is the same for tensors without memory."""

    def peak(device: torch.device) -> tuple[int, int]:
        model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        counter = LiveBytes(device)
        with counter:
            x = torch.ones(64, 32, device=device, requires_grad=True)
            out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False) if checkpointing else model(x)
            out.square().mean().backward()
            del out
            optimizer.step()
            optimizer.zero_grad()
        return counter.peak, counter.live

    assert peak(CPU) == peak(META)


def test_operations_take_their_arithmetic_or_their_bytes() -> None:
    counter = LiveBytes(META, Speed(flops=1e6, bytes_moved=1e3))
    with counter:
        a = torch.empty(10, 20, device=META)
        b = torch.empty(20, 30, device=META)
        assert counter.seconds == 0  # memory is taken, and nothing done
        a @ b
        assert counter.num_flops == 2 * 10 * 20 * 30
        assert counter.seconds == pytest.approx(4 * (200 + 600 + 300) / 1e3)
        before = counter.seconds
        counter.add_flops(500_000)
        assert counter.seconds == pytest.approx(before + 0.5)


def test_storages_of_several_tensors_count_once() -> None:
    weight = torch.empty(300, device=META)
    assert bytes_of([weight, weight[:10], torch.empty(1, device=META), torch.empty(9)], META) == 1536 + 512
