"""4-bit weights: how exact they are, what autograd keeps, and that they compile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from quantisation_helpers import realistic_gradient, realistic_tokens, realistic_weight, relative_error
from torch import Tensor

pytest.importorskip("bitsandbytes")

from library.memory.nf4 import Nf4Linear

OUT, IN, TOKENS = 96, 192, 37
# 16 levels for weights that are normally distributed within a block of 64; heavy tails make it a little more.
ROUNDING = 0.11


def test_weights_are_as_near_as_four_bits_allow() -> None:
    weight = realistic_weight(OUT, IN)
    linear = Nf4Linear.of(weight)
    assert (linear.weight.dtype, linear.absmax.dtype) == (torch.uint8, torch.float32)
    assert linear.weight.numel() + 4 * linear.absmax.numel() == OUT * IN * 4.5 / 8  # bytes
    assert relative_error(linear.dequantised(torch.float32), weight) < ROUNDING
    # The widest gap between two of the 16 levels is 0.304 of the block's largest magnitude.
    largest = weight.view(-1, 64).abs().amax(1, keepdim=True)
    error = (linear.dequantised(torch.float32) - weight).view(-1, 64).abs()
    assert bool((error <= 0.153 * largest).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_what_a_linear_with_the_dequantised_weight_computes(dtype: torch.dtype) -> None:
    linear = Nf4Linear.of(realistic_weight(OUT, IN).to(dtype))
    weight = linear.dequantised(dtype)
    x = realistic_tokens(TOKENS, IN).view(1, TOKENS, IN).to(dtype).requires_grad_()
    gradient = realistic_gradient(TOKENS, OUT).view(1, TOKENS, OUT).to(dtype)
    expected = F.linear(x, weight)
    (expected_gradient,) = torch.autograd.grad(expected, x, gradient)
    y = linear(x)
    (x_gradient,) = torch.autograd.grad(y, x, gradient)
    assert torch.equal(y, expected)
    # The same product through one or two matrix dimensions.
    torch.testing.assert_close(
        x_gradient, expected_gradient, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-7
    )


def test_autograd_keeps_the_buffers_and_nothing_else() -> None:
    linear = Nf4Linear.of(realistic_weight(OUT, IN))
    kept: list[Tensor] = []
    x = realistic_tokens(TOKENS, IN).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        linear(x)
    assert {tensor.data_ptr() for tensor in kept} == {linear.weight.data_ptr(), linear.absmax.data_ptr()}
    assert set(linear.state_dict()) == {"weight", "absmax"}


def test_it_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    linear = Nf4Linear.of(realistic_weight(OUT, IN))
    results = []
    for forward in (linear, torch.compile(linear, fullgraph=True, backend="aot_eager")):
        x = realistic_tokens(TOKENS, IN).requires_grad_()
        y = forward(x)
        y.backward(realistic_gradient(TOKENS, OUT))
        results.append((y.detach(), x.grad))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_moving_keeps_codes_and_scales_as_they_are() -> None:
    linear = Nf4Linear.of(realistic_weight(OUT, IN))
    before = linear.dequantised(torch.float32)
    linear.to("cpu", torch.bfloat16)
    assert torch.equal(linear.dequantised(torch.float32), before)
