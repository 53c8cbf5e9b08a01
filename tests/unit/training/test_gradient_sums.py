"""Gradients added up over processes: in buckets, in one order on every process, and begun in backward."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

from library.errors import UserError
from library.training.gradient_sums import GradientSums, in_buckets
from library.training.processes import Processes

VALUES = torch.tensor([5.0, 7.0])


class Recorder:
    """One of two processes, of which the other has the same gradients; notes what is exchanged when."""

    def __init__(self) -> None:
        self.count = 2
        self.events: list[str] = []
        self.flats: list[Tensor] = []

    def add_up(self, flat: Tensor) -> Any:
        self.events.append(f"begin {len(self.flats)}")
        number = len(self.flats)
        self.flats.append(flat.clone())
        flat *= 2
        return SimpleNamespace(wait=lambda: self.events.append(f"end {number}"))


def chain(sizes: tuple[int, ...] = (8, 8, 8, 8, 8)) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(size, size, bias=False) for size in sizes))


def sums_of(model: nn.Module, processes: Any) -> GradientSums:
    return GradientSums(list(model.parameters()), processes, small=0)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([1] * 10, [0, 0, 0, 0, 1, 1, 1, 2, 2, 3]),
        ([3], [0]),
        ([10, 1], [0, 1]),
        ([1, 10], [0, 0]),
    ],
)
def test_buckets_grow_smaller(sizes: list[int], expected: list[int]) -> None:
    assert in_buckets(sizes, (0.4, 0.3, 0.2, 0.1)) == expected
    assert in_buckets(sizes, (1.0,)) == [0] * len(sizes)


def test_buckets_begin_while_backward_goes_on() -> None:
    processes, model, plain = Recorder(), chain(), chain()
    sums = sums_of(model, processes)
    model[0].weight.register_post_accumulate_grad_hook(lambda _: processes.events.append("last gradient"))
    sums.last_backward_follows()
    model(torch.ones(2, 8)).sum().backward()
    total = sums.finish(VALUES)
    # Five equal gradients make buckets of two, two and one; the last bucket goes with the values.
    ends = ["end 0", "end 1", "end 2"]
    assert processes.events == ["begin 0", "begin 1", "last gradient", "begin 2", *ends]
    assert total.tolist() == [10.0, 14.0]
    plain(torch.ones(2, 8)).sum().backward()
    for parameter, alone in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter.grad, 2 * alone.grad)  # type: ignore[arg-type,operator]


def test_only_the_last_backward_of_a_step_begins_anything() -> None:
    processes, model = Recorder(), chain()
    sums = sums_of(model, processes)
    for _ in range(2):  # steps
        processes.flats.clear()
        for parameter in model.parameters():
            parameter.grad = None
        for number in range(3):
            if number == 2:
                assert not processes.flats
                sums.last_backward_follows()
            model(torch.ones(2, 8)).sum().backward()
        sums.finish(VALUES)
        three = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad(set_to_none=True)
        model(torch.ones(2, 8)).sum().backward()
        for parameter, found in zip(model.parameters(), three, strict=True):
            torch.testing.assert_close(found, parameter.grad * 6, rtol=1e-6, atol=0)  # sums of three round differently


def test_the_order_of_gradients_does_not_change_the_order_of_exchanges() -> None:
    """Two processes whose backward completes gradients in opposite orders begin the same buckets."""
    recorders = Recorder(), Recorder()
    for recorder, turned in zip(recorders, (False, True), strict=True):
        model = chain()
        parameters = list(model.parameters())
        sums = GradientSums(parameters, recorder, small=0)  # type: ignore[arg-type]
        sums.last_backward_follows()
        x = torch.ones(2, 8)
        for layer in reversed(model) if turned else model:
            x = layer(x)
        x.sum().backward()
        sums.finish(VALUES)
    sizes = [[flat.numel() for flat in recorder.flats] for recorder in recorders]
    assert sizes[0] == sizes[1]
    assert len(sizes[0]) > 2
    begins = [[event for event in recorder.events if event.startswith("begin")] for recorder in recorders]
    assert begins[0] == begins[1]


def test_a_parameter_without_a_gradient_hangs_nothing_and_gets_zeros() -> None:
    processes, model = Recorder(), chain()
    sums = sums_of(model, processes)
    sums.last_backward_follows()
    model[0](model[4](torch.ones(2, 8))).sum().backward()
    sums.finish(VALUES)
    assert [bool(parameter.grad.any()) for parameter in model.parameters()] == [True, False, False, False, True]  # type: ignore[union-attr]
    sums.finish(VALUES)  # a step without any backward
    assert len(processes.flats) % 2 == 0


def test_frozen_parameters_do_no_harm() -> None:
    processes, model = Recorder(), chain()
    model[2].weight.requires_grad_(False)
    sums = sums_of(model, processes)
    sums.last_backward_follows()
    model(torch.ones(2, 8)).sum().backward()
    assert sums.finish(VALUES).tolist() == [10.0, 14.0]


def test_bfloat16_gradients_are_added_up_in_float32() -> None:
    processes, model = Recorder(), chain().bfloat16()
    sums = sums_of(model, processes)
    sums.last_backward_follows()
    model(torch.ones(2, 8).bfloat16()).sum().backward()
    sums.finish(VALUES)
    assert {flat.dtype for flat in processes.flats} == {torch.float32}
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.bfloat16}  # type: ignore[union-attr]


@pytest.mark.parametrize("how", ["recomputed", "compiled"])
def test_recomputed_and_compiled_blocks_complete_each_gradient_once(how: str) -> None:
    found = []
    for special in (False, True):
        processes, model = Recorder(), chain()
        sums = sums_of(model, processes)
        blocks = list(model)
        if special and how == "compiled":
            blocks = [torch.compile(block, backend="aot_eager", fullgraph=True) for block in blocks]
        sums.last_backward_follows()
        x = torch.ones(2, 8)
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False) if special and how == "recomputed" else block(x)
        x.sum().backward()
        assert len(processes.flats) > 1  # begun in backward
        sums.finish(VALUES)
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(plain, other) for plain, other in zip(*found, strict=True))


def test_a_gradient_that_grows_after_it_was_sent_is_no_silent_error() -> None:
    processes, model = Recorder(), chain()
    sums = sums_of(model, processes)
    sums.last_backward_follows()
    model(torch.ones(2, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="to a gradient twice"):
        model(torch.ones(2, 8)).sum().backward()


@pytest.mark.parametrize(
    ("raised", "shown"),
    [
        (RuntimeError("Connection reset by peer\nmore"), UserError),
        (distributed.DistBackendError("timed out"), UserError),
        (torch.OutOfMemoryError("no memory"), torch.OutOfMemoryError),
    ],
)
def test_only_a_lost_process_is_told_as_one(raised: Exception, shown: type[Exception]) -> None:
    def fail() -> None:
        raise raised

    processes: Any = SimpleNamespace(count=2, add_up=lambda flat: SimpleNamespace(wait=fail))
    with pytest.raises(shown) as found:
        sums_of(chain(), processes).finish(VALUES)
    if shown is UserError:
        assert "another process of this run has ended" in str(found.value)
        assert "more" not in str(found.value)


def test_one_process_watches_nothing() -> None:
    model = chain()
    sums = GradientSums(list(model.parameters()), SimpleNamespace(count=1))  # type: ignore[arg-type]
    sums.last_backward_follows()
    model(torch.ones(2, 8)).sum().backward()
    assert sums.finish(VALUES) is VALUES
    assert not model[0].weight._post_accumulate_grad_hooks


def _steps(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    one: Any = SimpleNamespace(
        process_index=rank, num_processes=2, is_main_process=rank == 0, device=torch.device("cpu")
    )
    model = chain()
    sums = sums_of(model, Processes(one))
    found = []
    for backwards in ((2, 1), (1, 0), (0, 3), (0, 0), (1, 1)):  # of each process, in each step
        model.zero_grad(set_to_none=True)
        _backward(model, rank, backwards[rank], sums)
        values = sums.finish(torch.tensor([float(rank + 1)]))
        found.append([values.clone(), *(parameter.grad.clone() for parameter in model.parameters())])  # type: ignore[union-attr]
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.barrier()


def _backward(model: nn.Sequential, rank: int, times: int, sums: GradientSums | None) -> None:
    """Runs backwards that use layers in another order on each process; the second one leaves the middle one out."""
    for number in range(times):
        if sums is not None and number == times - 1:
            sums.last_backward_follows()
        x = torch.full((2, 8), 1.0 + number)
        for layer in model if rank == 0 else [model[4], model[3], model[1], model[0]]:
            x = layer(x)
        x.sum().backward()


def test_two_processes_add_up_what_each_has(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_steps, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for step, backwards in enumerate(((2, 1), (1, 0), (0, 3), (0, 0), (1, 1))):
        expected = [torch.zeros(8, 8) for _ in range(5)]
        for rank, times in enumerate(backwards):
            model = chain()
            _backward(model, rank, times, None)
            for total, parameter in zip(expected, model.parameters(), strict=True):
                total += 0 if parameter.grad is None else parameter.grad
        for rank in range(2):
            values, *gradients = found[rank][step]
            assert values.tolist() == [3.0]
            # Sums of two numbers are the same in any order.
            assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
