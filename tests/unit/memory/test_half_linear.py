"""Linears that multiply in fp16, with whole and with quantised weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from quantisation_helpers import realistic_gradient, realistic_tokens, realistic_weight, relative_error
from torch import Tensor, nn

from library.memory.fp8 import Fp8Linear
from library.memory.half_linear import HalfLinear
from library.memory.quantised import QuantisedLinear, quantise_block

OUT, IN, TOKENS = 96, 192, 37
ROUNDING = 2**-11  # as in test_half_products


def fp8(weight: Tensor) -> QuantisedLinear:
    linear = Fp8Linear.of(weight)
    linear.multiply_in_halves(weight)
    return linear


def nf4(weight: Tensor) -> QuantisedLinear:
    pytest.importorskip("bitsandbytes")
    from library.memory.nf4 import Nf4Linear

    linear = Nf4Linear.of(weight)
    linear.multiply_in_halves(weight)
    return linear


KINDS = pytest.mark.parametrize("make", [HalfLinear, fp8, nf4])


@KINDS
def test_products_and_gradients_are_those_of_its_weight(make: Callable[[Tensor], QuantisedLinear]) -> None:
    linear = make(realistic_weight(OUT, IN))
    x = (1e5 * realistic_tokens(TOKENS, IN).view(1, TOKENS, IN)).requires_grad_()
    gradient = 1e-6 * realistic_gradient(TOKENS, OUT).view(1, TOKENS, OUT)  # smaller than fp16 holds
    y = linear(x)
    (of_x,) = torch.autograd.grad(y, x, gradient)
    weight = linear.dequantised(torch.float32)
    assert (y.dtype, of_x.dtype) == (torch.float32, torch.float32)
    assert relative_error(y, x @ weight.t()) < ROUNDING
    # Rows of a gradient are summed over few large terms: less averaging.
    assert relative_error(of_x * 1e9, gradient @ weight * 1e9) < 2 * ROUNDING


@KINDS
def test_rows_and_columns_have_bounds_of_their_own(make: Callable[[Tensor], QuantisedLinear]) -> None:
    weight = torch.zeros(OUT, IN)
    weight[3] = 50.0  # a row that is longer than any column, and in the other matrix the reverse
    for matrix in (weight, weight.t().contiguous()):
        linear = make(matrix)
        x = torch.ones(1, linear.in_features, requires_grad=True)
        gradient = torch.ones(1, linear.out_features)
        y = linear(x)
        (of_x,) = torch.autograd.grad(y, x, gradient)
        exact = linear.dequantised(torch.float32)
        # Numbers are all alike, and so is what is rounded.
        assert relative_error(y, x @ exact.t()) < 2 * ROUNDING
        assert relative_error(of_x, gradient @ exact) < 2 * ROUNDING


@KINDS
def test_autograd_keeps_its_buffers_and_nothing_else(make: Callable[[Tensor], QuantisedLinear]) -> None:
    linear = make(realistic_weight(OUT, IN))
    kept: list[Tensor] = []
    x = realistic_tokens(TOKENS, IN).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        linear(x)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in linear.buffers()}


@KINDS
def test_it_compiles_as_one_graph(make: Callable[[Tensor], QuantisedLinear]) -> None:
    torch._dynamo.reset()
    linear = make(realistic_weight(OUT, IN))
    x = realistic_tokens(TOKENS, IN).requires_grad_()
    expected = linear(x)
    (of_x,) = torch.autograd.grad(expected.sum(), x)
    found = torch.compile(linear, backend="aot_eager", fullgraph=True)(x)
    (ours,) = torch.autograd.grad(found.sum(), x)
    # The same operations; a quotient is made before it is rounded to fp16, not while.
    assert relative_error(found, expected) < 2**-11
    assert relative_error(ours, of_x) < 2**-11


def test_weights_of_bf16_files_stay_what_they_are() -> None:
    weight = realistic_weight(OUT, IN).to(torch.bfloat16)
    linear = HalfLinear(weight)
    # Below 2^-14 fp16 has steps of 2^-24.
    assert bool(((linear.weight.float() - weight.float()).abs() <= 2**-25).all())
    large = weight.abs() >= 2**-14
    assert torch.equal(linear.weight.float()[large], weight.float()[large])
    assert 0.5 < float(large.float().mean()) < 1


def test_casting_a_model_leaves_weight_and_bounds_as_they_are() -> None:
    linear = HalfLinear(realistic_weight(OUT, IN))
    nn.Sequential(linear).to(torch.bfloat16)
    assert [tensor.dtype for tensor in linear.buffers()] == [torch.float32, torch.float16]


@pytest.mark.parametrize("kind", [None, "fp8"])
def test_blocks_take_it_for_their_large_matrices(kind: str | None) -> None:
    block = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 64)).requires_grad_(False)
    x = torch.randn(5, 64)
    expected = block(x)
    quantise_block(block, ["0"], kind, "cpu", in_halves=True)  # type: ignore[arg-type]
    assert isinstance(block[0], Fp8Linear if kind else HalfLinear)
    assert block[0].bounds is not None
    assert type(block[1]) is nn.Linear
    # e4m3 has three bits of a weight: 2.7 % of it on average.
    assert 0 < relative_error(block(x), expected) < (0.04 if kind else ROUNDING)
