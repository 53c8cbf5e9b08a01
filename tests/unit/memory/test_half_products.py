"""Products in fp16: as exact as its 11 bits allow, whatever the sizes of the numbers are, and never beyond its range."""

from __future__ import annotations

import pytest
import torch
from quantisation_helpers import channel_error, realistic_tokens, realistic_weight, relative_error
from torch import Tensor

from library.memory import half_products
from library.memory.half_products import HALF, bounds_of, half_product

OUT, IN, TOKENS = 96, 192, 37
# Operand and result are rounded by up to 2^-12 of a number, 0.6 of that on average; the sum of 192 products averages.
ROUNDING = 2**-11


def product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns x W' in fp16, and in float64 with the weight as fp16 holds it."""
    halves = weight.to(HALF)
    return half_product(x, halves.t(), bounds_of(weight)[0]), x.double() @ halves.double().t()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The largest numbers of operands and results in fp16."""
    found: list[float] = []
    multiply = half_products._multiplied

    def noted(halves: Tensor, matrix: Tensor) -> Tensor:
        made = multiply(halves, matrix)
        found.extend(float(each.abs().max()) for each in (halves, made))
        return made

    monkeypatch.setattr(half_products, "_multiplied", noted)
    return found


@pytest.mark.parametrize("size", [1e-17, 1e-10, 1e-4, 1.0, 1e6, 1e16])
def test_numbers_of_any_size_are_multiplied_exactly(size: float, seen: list[float]) -> None:
    x = realistic_tokens(TOKENS, IN) * size
    x[3] *= 1e-4  # rows have units of their own
    x[5] = 0
    ours, wanted = product(x, realistic_weight(OUT, IN))
    assert ours.dtype == torch.float32
    assert relative_error(ours / size, wanted / size) < ROUNDING
    assert relative_error(ours[3] / size, wanted[3] / size) < 2 * ROUNDING
    assert not ours[5].any()
    assert max(seen) <= 2**15


def test_the_bound_is_reached_and_not_passed(seen: list[float]) -> None:
    weight = realistic_weight(OUT, IN) * 50
    longest = weight.norm(dim=1).argmax()
    ours, wanted = product(1e5 * weight[longest][None], weight)  # the direction in which a product is largest
    assert relative_error(ours, wanted) < ROUNDING
    assert 0.99 * 2**15 < seen[1] <= 2**15


def test_small_weights_do_not_make_operands_overflow(seen: list[float]) -> None:
    x, weight = torch.zeros(2, IN), realistic_weight(OUT, IN) * 1e-3  # rows shorter than 1
    x[:, 7] = 1e4
    ours, wanted = product(x, weight)
    assert relative_error(ours, wanted) < ROUNDING
    assert max(seen) <= 2**15


def test_a_channel_of_huge_numbers_leaves_the_others_their_digits() -> None:
    x, weight = realistic_tokens(TOKENS, IN), realistic_weight(OUT, IN)
    x[:, 11] = 3e5  # as in the feed-forward layers of the released model
    weight[: OUT // 2, 11] = 0  # half of the outputs do not see it
    ours, wanted = product(x, weight)
    assert channel_error(ours[:, : OUT // 2].t(), wanted[:, : OUT // 2].t()) < ROUNDING
    assert not (x.to(HALF) @ weight.to(HALF).t()).isfinite().all()  # without a unit


def test_rows_that_are_not_finite_give_nan_and_others_do_not() -> None:
    x = realistic_tokens(TOKENS, IN)
    x[2, 5], x[4, 6] = float("inf"), float("nan")
    ours, wanted = product(x, realistic_weight(OUT, IN))
    broken = torch.zeros(TOKENS, dtype=torch.bool)
    broken[[2, 4]] = True
    assert ours[broken].isnan().all()
    assert relative_error(ours[~broken], wanted[~broken]) < ROUNDING


def test_bounds_are_the_longest_row_and_column_and_1_at_least() -> None:
    weight = torch.zeros(3, 4)
    weight[1] = torch.tensor([1.0, 2.0, 2.0, 4.0])
    weight[2, 3] = 3.0
    assert bounds_of(weight).tolist() == [5.0, 5.0]
    assert bounds_of(weight.to(torch.bfloat16) / 64).tolist() == [1.0, 1.0]
