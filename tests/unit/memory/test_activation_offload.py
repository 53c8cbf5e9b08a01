"""Activation offload on a hostile stand-in for a device: what leaves, what stays, and when memory is free again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transport_helpers import LateTransport

from library.memory import activation_offload
from library.memory.activation_offload import ActivationOffload, _Copy, _Group
from library.memory.recompute import recompute_in_backward
from library.memory.saved_tensors import SavedTensors
from library.memory.transport import Lane

NUM_BLOCKS, WIDTH = 6, 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        q, k, v = self.linear(x).chunk(3, dim=-1)  # views of one storage, all of them saved
        return x + torch.tanh(q) * torch.sigmoid(k) * v * shared


class Offloaded:
    def __init__(self, recompute: bool) -> None:
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(NUM_BLOCKS))
        self.transport = LateTransport()
        if recompute:
            recompute_in_backward(self.blocks, preserve_rng_state=False)
        self.plain_forwards = [block.forward for block in self.blocks]
        self.offload = ActivationOffload(self.transport, self.blocks.parameters(), min_bytes=256, page_bytes=512)
        SavedTensors(None, self.offload).attach(self.blocks)

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, shared)
        return x

    def gradients(self, x: Tensor, shared: Tensor) -> list[Tensor]:
        self.blocks.zero_grad()
        self.forward(x, shared).square().mean().backward()
        return [parameter.grad.clone() for parameter in self.blocks.parameters()]

    def plain_gradients(self, x: Tensor, shared: Tensor) -> list[Tensor]:
        wrapped = [block.forward for block in self.blocks]
        for block, forward in zip(self.blocks, self.plain_forwards, strict=True):
            block.forward = forward
        found = self.gradients(x, shared)
        for block, forward in zip(self.blocks, wrapped, strict=True):
            block.forward = forward
        return found


@pytest.fixture(params=[False, True], ids=["plain", "recomputed"])
def parts(request: pytest.FixtureRequest) -> Iterator[Offloaded]:
    made = Offloaded(request.param)
    yield made
    made.transport.finish()


def inputs(tokens: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(2, tokens, WIDTH, generator=generator), torch.rand(1, tokens, WIDTH, generator=generator)


def test_gradients_are_the_same_bit_for_bit(parts: Offloaded) -> None:
    # Sizes that grow, shrink and come again: pages are used for other storages.
    for tokens in (9, 23, 4, 23, 9):
        x, shared = inputs(tokens)
        expected = parts.plain_gradients(x, shared)
        with parts.transport.watched():
            found = parts.gradients(x, shared)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert parts.transport.num_copies[Lane.OUT] > 0
    assert parts.transport.num_copies[Lane.BACK] > 0


def test_a_storage_is_copied_once() -> None:
    for recompute, per_block in ((True, 1), (False, 5)):
        parts = Offloaded(recompute)
        parts.gradients(*inputs())
        # A block's input (the one before's output); without recomputation its q, k and v together, tanh, sigmoid and two
        # products as well. What all blocks share is copied once.
        assert parts.transport.num_copies[Lane.OUT] == per_block * NUM_BLOCKS + 1
        # The last two blocks' have not left when the backward pass begins, nor has what they share.
        assert parts.transport.num_copies[Lane.BACK] <= per_block * (NUM_BLOCKS - 2) + 1


def test_the_device_keeps_two_blocks(parts: Offloaded) -> None:
    alive: list[StorageWeakRef] = []
    most = 0

    def count(block: nn.Module, arguments: tuple[Tensor, Tensor]) -> None:
        nonlocal most
        alive.append(StorageWeakRef(arguments[0].untyped_storage()))
        gc.collect()  # an import that fails in a forward pass leaves its callers' frames in a cycle
        # The first one the test's own frame may hold: with torch._dynamo's way of running frames it does.
        most = max(most, sum(not reference.expired() for reference in alive[1:]))

    for block in parts.blocks:
        block.register_forward_pre_hook(count)
    x, shared = inputs()
    out = parts.forward(x + 0, shared)
    # The inputs of this block and of the two before it, whose copies are only now waited for.
    assert most <= 3
    out.sum().backward()
    del out
    assert all(reference.expired() for reference in alive)


def test_host_memory_is_used_again(parts: Offloaded) -> None:
    parts.gradients(*inputs(20))
    taken = parts.offload.num_host_bytes
    for tokens in (20, 5, 13, 20):
        parts.gradients(*inputs(tokens))
        parts.forward(*inputs(tokens))  # never goes back
    assert parts.offload.num_host_bytes == taken > 0


def test_small_tensors_and_weights_stay() -> None:
    parts = Offloaded(recompute=False)
    x, shared = inputs(1)
    parts.gradients(x[:1].clone(), shared)
    # One row of 3 * 32 float32 is large enough (384 bytes), rows of 32 (128 bytes) are not; weights are 12 KiB.
    assert parts.transport.num_copies[Lane.OUT] == NUM_BLOCKS


def test_a_graph_that_is_dropped_or_fails_leaves_nothing(parts: Offloaded) -> None:
    x, shared = inputs()
    expected = parts.plain_gradients(x, shared)

    def fail(gradient: Tensor) -> None:
        raise ArithmeticError("as the test wants")

    with parts.transport.watched():
        parts.forward(x, shared)
        hidden = parts.blocks[0](x, shared)
        hidden.register_hook(fail)
        for block in parts.blocks[1:]:
            hidden = block(hidden, shared)
        with pytest.raises(ArithmeticError):
            hidden.sum().backward()
        del hidden
        gc.collect()
        found = parts.gradients(x, shared)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    parts.offload.begin_block()
    assert not parts.offload._known
    assert sum(page.numel() for page in parts.offload._pages._free) == parts.offload.num_host_bytes


def test_a_graph_can_be_used_twice() -> None:
    parts = Offloaded(recompute=False)
    x, shared = inputs()
    expected = [2 * gradient for gradient in parts.plain_gradients(x, shared)]
    parts.blocks.zero_grad()
    with parts.transport.watched():
        loss = parts.forward(x, shared).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
    for ours, theirs in zip(parts.blocks.parameters(), expected, strict=True):
        assert torch.equal(ours.grad, theirs)


def no_wait(group: _Group, transport: LateTransport) -> None:
    for reference in group._copies:
        if (copy := reference()) is not None:
            copy.original = None


def no_care(copy: _Copy) -> None:
    copy._owner._pages.give_back(copy._pages)


@pytest.mark.parametrize(
    ("what", "name", "broken", "says"),
    [
        (_Group, "let_go", no_wait, "let go before"),
        (_Copy, "__del__", no_care, "let go before|in no order"),
    ],
    ids=["memory is let go without waiting", "dropped copies are not waited for"],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_neglected_duties_are_found(
    monkeypatch: pytest.MonkeyPatch, what: type, name: str, broken: Callable, says: str, recompute: bool
) -> None:
    monkeypatch.setattr(what, name, broken)
    parts = Offloaded(recompute)
    with pytest.raises(AssertionError, match=says), parts.transport.watched():
        parts.gradients(*inputs())


def test_coming_back_needs_the_end_of_going_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def bring_back(copy: _Copy) -> None:
        copy.out, out = copy._owner._transport.mark(), copy.out
        original(copy)
        copy.out = out

    original = _Copy.bring_back
    monkeypatch.setattr(_Copy, "bring_back", bring_back)
    monkeypatch.setattr(_Group, "let_go", lambda group, transport: no_wait(group, transport))
    parts = Offloaded(recompute=True)
    with pytest.raises(AssertionError, match=r"in no order|let go before"), parts.transport.watched():
        parts.gradients(*inputs())


def test_pages_cover_any_size() -> None:
    pages = activation_offload._Pages(LateTransport(), page_bytes=100)
    assert [len(pages.take(size)) for size in (1, 100, 101, 1700)] == [1, 1, 2, 17]
    assert pages.num_bytes == 2 * 1600
