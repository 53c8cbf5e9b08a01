"""Block streaming on a hostile stand-in for a device: order and lifetime, in every kind of pass."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transport_helpers import ContractError, LateTransport

from library.memory.activation_offload import ActivationOffload
from library.memory.block_stream import BlockStream
from library.memory.recompute import recompute_in_backward
from library.memory.saved_tensors import SavedTensors
from library.memory.transport import Lane

NUM_BLOCKS = 5
WIDTH = 16


class MixedBlock(nn.Module):
    """A block whose frozen tensors have all the dtypes there are, and a trained one beside them."""

    def __init__(self, number: int) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.norm = nn.Parameter(torch.rand(WIDTH) + 0.5, requires_grad=False)
        self.linear = nn.Linear(WIDTH, 2 * WIDTH).requires_grad_(False)
        self.narrow = nn.Linear(WIDTH, WIDTH + number % 2, bias=False).bfloat16().requires_grad_(False)
        self.quantised = nn.Parameter(torch.randn(WIDTH, WIDTH).to(torch.float8_e4m3fn), requires_grad=False)
        self.columns = nn.Parameter(torch.randn(WIDTH, 2 * WIDTH).t(), requires_grad=False)
        self.register_buffer("scale", torch.rand(WIDTH, 1))
        self.register_buffer("codes", torch.randint(0, 16, (WIDTH,), dtype=torch.uint8))
        self.register_buffer("one", torch.tensor(1.0), persistent=False)
        self.lora = nn.Parameter(torch.randn(WIDTH, 2 * WIDTH) * 0.1)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x, (WIDTH,), self.norm)
        hidden = torch.tanh(self.linear(normed)) * self.one
        if self.fails:
            raise ArithmeticError("as the test wants")
        hidden = hidden + hidden @ self.columns @ self.columns.t()
        update = F.linear(hidden, self.lora) * (self.codes.float() / 16)
        halves = self.narrow(update.bfloat16()).float()[..., :WIDTH]
        return x + halves + F.linear(update, self.quantised.float() * self.scale)


class Streamed:
    """Blocks on the stand-in, beside the same blocks as they are."""

    def __init__(
        self,
        chosen: Sequence[int] = range(NUM_BLOCKS),
        recompute: bool = False,
        offload: bool = False,
        num_blocks: int = NUM_BLOCKS,
    ) -> None:
        self.plain = [MixedBlock(number) for number in range(num_blocks)]
        self.blocks = copy.deepcopy(self.plain)
        self.transport = LateTransport()
        self.stream = BlockStream([self.blocks[index] for index in chosen], torch.device("cpu"), self.transport)
        self.stream.attach()
        if recompute:
            recompute_in_backward(self.plain, preserve_rng_state=False)
            recompute_in_backward(self.blocks, preserve_rng_state=False)
        self.offload = None
        if offload:
            weights = [tensor for block in self.blocks for tensor in (*block.parameters(), *block.buffers())]
            self.offload = ActivationOffload(self.transport, weights, min_bytes=64, page_bytes=512)
        SavedTensors(self.stream, self.offload).attach(self.blocks)

    def check(self, script: Callable[[Sequence[nn.Module], Tensor], list[Tensor]]) -> None:
        """Runs a script on both and compares what it returns and the gradients, bit for bit."""
        x = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(0))
        expected = script(self.plain, x)
        with self.transport.watched():
            found = script(self.blocks, x)
        assert len(expected) == len(found)
        for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(ours, theirs), f"result {index}"
        for index, (ours, theirs) in enumerate(zip(self.blocks, self.plain, strict=True)):
            assert (ours.lora.grad is None) == (theirs.lora.grad is None)
            if theirs.lora.grad is not None:
                assert torch.equal(ours.lora.grad, theirs.lora.grad), f"gradient of block {index}"
                assert theirs.lora.grad.abs().sum() > 0


def run(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def steps(blocks: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Two steps of which the second adds up to the first, as with accumulated gradients."""
    losses = []
    for factor in (1.0, 2.0):
        loss = run(blocks, x * factor).square().mean()
        loss.backward()
        losses.append(loss.detach())
    return losses


def steps_with_other_passes(blocks: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """A pass without gradients before, between forward and backward, and behind."""
    results = []
    for _ in range(2):
        with torch.no_grad():
            results.append(run(blocks, x * 3))
        loss = run(blocks, x).square().mean()
        with torch.no_grad():
            results += [run(blocks, x / 2), run(blocks, x / 4)]
        loss.backward()
        results.append(loss.detach())
        with torch.no_grad():
            results.append(run(blocks[:2], x))
    return results


def two_graphs(blocks: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Two forward passes before a backward pass through both, and one that is dropped."""
    first, second = run(blocks, x), run(blocks, x * 2)
    run(blocks, x * 3)
    (first.sum() * second.square().mean()).backward()
    return [first.detach(), second.detach()]


def trained_input(blocks: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    run(blocks, x).square().mean().backward()
    assert x.grad is not None
    return [x.grad]


def interrupted(blocks: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Errors in the middle of a forward, of a recomputation and of a backward pass; then an ordinary step."""
    blocks[2].fails = True
    with pytest.raises(ArithmeticError):
        run(blocks, x)
    with torch.no_grad(), pytest.raises(ArithmeticError):
        run(blocks, x)
    blocks[2].fails = False

    def fail(gradient: Tensor) -> None:
        raise ArithmeticError("as the test wants")

    hidden = run(blocks[:2], x)
    hidden.register_hook(fail)
    with pytest.raises(ArithmeticError):
        run(blocks[2:], hidden).sum().backward()
    loss = run(blocks, x).square().mean()
    blocks[2].fails = True
    with contextlib.suppress(ArithmeticError):  # where it is computed again
        loss.backward()
    blocks[2].fails = False
    for block in blocks:
        block.lora.grad = None
    return steps(blocks, x)


SCRIPTS = [steps, steps_with_other_passes, two_graphs, trained_input, interrupted]
CHOICES = [[0], [4], [1, 3], [0, 2, 4], [0, 1, 2, 3, 4]]
MODES = {
    "plain": {},
    "recomputed": {"recompute": True},
    "offloaded": {"offload": True},
    "recomputed and offloaded": {"recompute": True, "offload": True},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("chosen", CHOICES, ids=str)
@pytest.mark.parametrize("script", SCRIPTS)
def test_results_are_the_same_bit_for_bit(script: Callable, chosen: list[int], mode: dict[str, bool]) -> None:
    Streamed(chosen, **mode).check(script)


class StoppedTransport(LateTransport):
    """Raises, as Ctrl+C would, before one of the calls, or behind it where it orders a copy."""

    is_late = False

    def __init__(self) -> None:
        super().__init__()
        self.calls_left = -1

    def _call(self) -> None:
        self.calls_left -= 1
        if self.calls_left == 0:
            raise KeyboardInterrupt

    def mark(self) -> Any:
        self._call()
        return super().mark()

    def copy(self, *arguments: Any, **named: Any) -> Any:
        if not self.is_late:
            self._call()
        order = super().copy(*arguments, **named)
        if self.is_late:
            self._call()
        return order

    def wait(self, token: Any) -> None:
        self._call()
        super().wait(token)


@pytest.mark.parametrize(
    ("mode", "is_late"),
    # Training steps are not interrupted; previews, of which nothing is offloaded, are.
    [*((mode, False) for mode in MODES), ("plain", True), ("recomputed", True)],
)
def test_the_next_pass_starts_clean_wherever_the_last_one_stopped(
    monkeypatch: pytest.MonkeyPatch, mode: str, is_late: bool
) -> None:
    monkeypatch.setitem(globals(), "LateTransport", StoppedTransport)
    monkeypatch.setattr(StoppedTransport, "is_late", is_late)
    parts = Streamed(**MODES[mode])
    x = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(0))
    expected = run(parts.plain, x).square().mean()
    expected.backward()
    stopped, was_stopped = 0, True
    while was_stopped:  # at every call that a step makes, one after the other
        stopped += 1
        parts.transport.calls_left = stopped
        was_stopped = False
        try:
            run(parts.blocks, x).square().mean().backward()
        except KeyboardInterrupt:
            was_stopped = True
        parts.transport.calls_left = -1
        for block in parts.blocks:
            block.lora.grad = None
        with parts.transport.watched():
            loss = run(parts.blocks, x).square().mean()
            loss.backward()
        assert torch.equal(loss, expected), stopped
        for ours, theirs in zip(parts.blocks, parts.plain, strict=True):
            assert torch.equal(ours.lora.grad, theirs.lora.grad), stopped
            ours.lora.grad = None
    assert stopped > 20


def broken(message: str) -> pytest.RaisesExc[AssertionError]:
    """Expects a test's own comparison, or the stand-in, to find the fault."""
    return pytest.raises(AssertionError, match=message)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_without_waits_the_results_are_not_the_same(monkeypatch: pytest.MonkeyPatch, mode: dict[str, bool]) -> None:
    monkeypatch.setattr(LateTransport, "wait", lambda self, token: None)
    with broken("not waited for"):
        Streamed(**mode).check(steps)
    # Without the stand-in's clock, the numbers show it.
    monkeypatch.setattr(LateTransport, "note_operation", lambda self, function, tensors, written: None)
    with broken("result 0|let go before"):
        Streamed(**mode).check(steps)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_without_marks_memory_is_overwritten_too_early(monkeypatch: pytest.MonkeyPatch, mode: dict[str, bool]) -> None:
    old = LateTransport().mark()
    monkeypatch.setattr(LateTransport, "mark", lambda self: old)
    with broken("may still"):
        Streamed(**mode).check(steps)


def test_without_a_mark_behind_the_last_use_of_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    def release_early(stream: BlockStream) -> None:
        slot = stream._slot_of(stream._current) if stream._current is not None else None
        token = None if slot is None else slot.ready
        release(stream)
        if slot is not None:
            slot.released = token

    release = BlockStream._release
    monkeypatch.setattr(BlockStream, "_release", release_early)
    with broken("overwritten while"):
        Streamed().check(steps)


def test_without_handles_gradients_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockStream, "pack", lambda self, tensor: None)
    with broken("host memory"):
        Streamed().check(steps)
    monkeypatch.setattr(LateTransport, "note_operation", lambda self, function, tensors, written: None)
    with broken("gradient of block 0"):
        Streamed().check(steps)


def test_a_recomputed_block_must_stay_until_its_backward_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("library.memory.block_stream._in_backward", lambda: False)
    with broken("host memory"):
        Streamed(recompute=True).check(steps)


def test_each_step_copies_only_what_is_not_there() -> None:
    parts = Streamed(recompute=True)
    run(parts.blocks, torch.ones(1, 2, WIDTH)).sum().backward()
    copies = parts.transport.num_copies
    # Two slots: a forward pass brings each block, the backward pass all but the two that are left in the ring, and the
    # next forward pass finds the first two.
    assert copies[Lane.WEIGHTS] == NUM_BLOCKS + NUM_BLOCKS - 2
    run(parts.blocks, torch.ones(1, 2, WIDTH)).sum().backward()
    assert copies[Lane.WEIGHTS] == NUM_BLOCKS + 3 * (NUM_BLOCKS - 2)


def test_the_next_block_is_ordered_before_this_one_computes() -> None:
    parts = Streamed()
    seen: list[tuple[int, set[int | None]]] = []
    for index, block in enumerate(parts.blocks):
        block.linear.register_forward_hook(
            lambda *_, index=index: seen.append((index, {slot.block for slot in parts.stream._slots}))
        )
    with torch.no_grad():
        run(parts.blocks, torch.ones(1, 2, WIDTH))
    assert seen == [(index, {index, (index + 1) % NUM_BLOCKS}) for index in range(NUM_BLOCKS)]


def test_weights_outside_of_a_pass_are_those_in_host_memory() -> None:
    parts = Streamed()
    before = {name: value.clone() for name, value in parts.plain[2].state_dict().items()}
    parts.check(steps)
    for _ in range(2):
        state = parts.blocks[2].state_dict()
        assert state.keys() == before.keys()
        assert all(
            state[name].dtype == value.dtype and torch.equal(state[name], value) for name, value in before.items()
        )
        parts.stream.free()
    assert parts.blocks[2].columns.stride() == (1, 2 * WIDTH)
    assert parts.blocks[2].quantised.dtype == torch.float8_e4m3fn


def test_the_ring_can_be_let_go_and_taken_again() -> None:
    parts = Streamed(recompute=True, offload=True)
    parts.check(steps)
    parts.stream.free()
    assert not parts.stream._slots
    for block in (*parts.blocks, *parts.plain):
        block.lora.grad = None
    parts.check(steps)
    assert parts.stream.num_ring_bytes < parts.stream.num_host_bytes * 2 / NUM_BLOCKS * 1.1


def test_replaced_weights_are_an_error() -> None:
    parts = Streamed()
    parts.blocks[1].linear.weight = nn.Parameter(torch.zeros(2 * WIDTH, WIDTH), requires_grad=False)
    with pytest.raises(RuntimeError, match=r"linear\.weight of a streamed block was replaced"):
        run(parts.blocks, torch.ones(1, 2, WIDTH))
    parts = Streamed()
    parts.blocks[1].double()
    with pytest.raises(RuntimeError, match="cast"):
        run(parts.blocks, torch.ones(1, 2, WIDTH))


def test_what_cannot_be_streamed_is_refused() -> None:
    first, second = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4).requires_grad_(False)
    second.weight = first.weight
    with pytest.raises(ValueError, match="weight belongs to two blocks"):
        BlockStream([first, second], torch.device("cpu"), LateTransport())
    with torch.device("meta"):
        nowhere = nn.Linear(4, 4).requires_grad_(False)
    with pytest.raises(TypeError, match="weight is a Parameter on meta"):
        BlockStream([nowhere], torch.device("cpu"), LateTransport())


def test_the_stand_in_itself_finds_faults() -> None:
    transport = LateTransport()
    host, slot = transport.host_buffer(8), transport.device_buffer(8)
    host.zero_()
    with pytest.raises(ContractError, match="overwritten"):
        transport.copy(Lane.WEIGHTS, [(slot, host)], after=[])
    token = transport.copy(Lane.WEIGHTS, [(slot, host)], after=[transport.mark()])
    assert slot.tolist() == [255] * 8
    with pytest.raises(ContractError, match="in no order"):
        transport.copy(Lane.BACK, [(slot, host)], after=[transport.mark()])
    with pytest.raises(ContractError, match="not waited for"), transport.watched():
        slot.add_(1)
    token = transport.copy(Lane.WEIGHTS, [(slot, host)], after=[transport.mark()])
    transport.wait(token)
    with pytest.raises(ContractError, match="host memory"), transport.watched():
        host.add_(1)
    with transport.watched():
        slot.add_(1)
    assert slot.tolist() == [1] * 8
    with pytest.raises(ContractError, match="still use it"):
        transport.copy(Lane.WEIGHTS, [(slot, host)], after=[token])
    transport.copy(Lane.WEIGHTS, [(slot, host)], after=[transport.mark()])
    del slot
    with pytest.raises(ContractError, match="let go before"):
        transport.finish()
