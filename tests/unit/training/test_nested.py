"""Nested values of tensors and plain values survive a file."""

import json
import math
from collections import OrderedDict
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.files import write_safetensors
from library.training.nested import CannotBeKept, flatten, unflatten, unshared


def through_files(value: object, folder: Path) -> object:
    tensors, plain = flatten(value, "x")
    write_safetensors(folder / "t.safetensors", unshared(tensors), None)
    return unflatten(json.loads(json.dumps(plain)), load_file(folder / "t.safetensors"))


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


ODD = [
    None,
    True,
    3,
    10**30,
    0.1,
    -0.0,
    5e-324,
    math.inf,
    -math.inf,
    math.nan,
    "",
    "a\0b 猫",
    (),
    [],
    {},
    (1, (2, [3, ()])),
    {1: "int", "1": "text", None: 0, 2.5: 1, math.inf: 2},
    {False: 0, True: 7},
    {"$tensor": "no tensor", "$tuple": [1]},
    {"$dict": 1},
    [{"a.b": {"c": 1}, "a": {"b.c": 2}}],
    {"step": torch.tensor(3.0), "empty": torch.zeros(0, 3)},
    {1: {"t": torch.ones(2)}, "1": {"t": torch.zeros(2)}},
    [torch.arange(5, dtype=torch.uint8), torch.tensor(True), torch.tensor([1.5], dtype=torch.bfloat16)],
    (torch.tensor(7, dtype=torch.int64), torch.randn(3, 4).T),
]


@pytest.mark.parametrize("value", ODD)
def test_it_comes_back_as_it_was(tmp_path: Path, value: object) -> None:
    assert same(through_files(value, tmp_path), value)


def test_kinds_that_become_plain(tmp_path: Path) -> None:
    assert through_files(OrderedDict(a=1), tmp_path) == {"a": 1}
    assert through_files([numpy.float64(0.5), numpy.int64(3), numpy.bool_(True)], tmp_path) == [0.5, 3, True]


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    value = [whole, whole, whole[2:4], whole.view(2, 3)]
    assert same(through_files(value, tmp_path), value)


@pytest.mark.parametrize(
    "value",
    [{1, 2}, object(), b"bytes", torch.float32, {(1, 2): 3}, {"f": same}],
    ids=lambda value: type(value).__name__,
)
def test_what_no_file_can_hold_is_named(value: object) -> None:
    with pytest.raises(CannotBeKept, match=r"x\.1\.a"):
        flatten([0, {"a": value}], "x")


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad", "Adafactor", "NAdam", "ASGD", "Rprop"])
def test_optimizers_go_on_bit_for_bit(tmp_path: Path, name: str) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: object, number: int) -> None:
        model(torch.full((2, 4), 1.0 + number)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()  # type: ignore[attr-defined]

    first = made()
    for number in range(3):
        step(*first, number)
    kept = through_files([part.state_dict() for part in first], tmp_path)
    second = made()
    for part, state in zip(second, kept, strict=True):  # type: ignore[call-overload]
        part.load_state_dict(state)
    for number in range(3, 6):
        step(*first, number)
        step(*second, number)
    assert all(map(torch.equal, first[0].parameters(), second[0].parameters()))
