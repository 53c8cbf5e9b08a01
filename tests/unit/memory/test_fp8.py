"""e4m3 weights with a scale for each output channel: how exact they are, what autograd keeps, and products in fp8."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from quantisation_helpers import (
    E4M3,
    E5M2,
    channel_error,
    emulated_product,
    needs_cpu_products,
    realistic_gradient,
    realistic_tokens,
    realistic_weight,
    relative_error,
)
from torch import Tensor

from library.errors import SettingsError
from library.memory import fp8
from library.memory.fp8 import Fp8Linear, power_of_two_scale, quantise_rows, require_fp8_products

OUT, IN, TOKENS = 96, 192, 37
DTYPES = [torch.float32, torch.bfloat16]
# Rounding to 4 significant bits: a uniform error of half a step of 1/8 to 1/16 is 2.6 % of a value in the mean square.
ROUNDING = 0.028


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast product by its definition, so that these tests do not hang on what a CPU build of torch can do."""
    monkeypatch.setattr(fp8, "scaled_product", emulated_product)


def forward_and_backward(linear: Fp8Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns output (2,T,out) and input gradient (2,T,in) on realistic data."""
    x = realistic_tokens(2 * TOKENS, IN).view(2, TOKENS, IN).to(dtype).requires_grad_()
    y = linear(x)
    y.backward(realistic_gradient(2 * TOKENS, OUT).view_as(y).to(dtype))
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("largest", [448.0, 449.0, 1.0, 3e-5, 1e20, 0.0])
def test_scales_are_the_smallest_powers_of_two_that_fit(largest: float) -> None:
    scale = float(power_of_two_scale(torch.tensor(largest)))
    assert math.frexp(scale)[0] == 0.5
    assert largest / scale <= 448
    assert largest == 0 or largest / (scale / 2) > 448


def test_every_weight_is_as_near_as_four_bits_allow() -> None:
    weight = realistic_weight(OUT, IN)
    linear = Fp8Linear.of(weight)
    assert (linear.weight.dtype, linear.weight_scale.dtype) == (E4M3, torch.float32)
    assert (tuple(linear.weight.shape), tuple(linear.weight_scale.shape)) == ((OUT, IN), (OUT,))
    error = (linear.dequantised(torch.float32) - weight).abs()
    # Half a step: 2^-4 of the value; below e4m3's smallest normal number half of its fixed step 2^-9.
    assert bool((error <= weight.abs() * 2**-4 + linear.weight_scale[:, None] * 2**-10).all())
    assert relative_error(linear.dequantised(torch.float32), weight) < ROUNDING
    # Exact in bfloat16 too: nothing more is lost in the precision that is trained in.
    assert torch.equal(linear.dequantised(torch.bfloat16).float(), linear.dequantised(torch.float32))


def test_weights_and_outputs_are_better_than_those_of_an_unscaled_cast() -> None:
    weight, x = realistic_weight(OUT, IN), realistic_tokens(TOKENS, IN)
    linear, cast = Fp8Linear.of(weight), weight.to(E4M3).float()
    exact = F.linear(x, weight)
    scaled = linear.dequantised(torch.float32)
    ours = channel_error(scaled, weight), channel_error(linear(x).t(), exact.t())
    theirs = channel_error(cast, weight), channel_error(F.linear(x, cast).t(), exact.t())
    assert max(ours) < 1.1 * ROUNDING  # outputs are sums of few large terms: outlier channels
    # 2.6 against 3.7 % here; how much is gained depends on how many rows are small.
    assert ours[0] < 0.8 * theirs[0]
    assert ours[1] < 0.8 * theirs[1]
    assert relative_error(scaled, weight) < relative_error(cast, weight)
    # The small rows are what a cast loses: below 2^-6 its steps are fixed.
    small = weight.square().mean(1).sqrt() < 0.01
    assert int(small.sum()) > 3
    assert relative_error(scaled[small], weight[small]) < ROUNDING
    assert relative_error(cast[small], weight[small]) > 2 * ROUNDING


def test_a_file_of_plain_e4m3_weights_loses_nothing() -> None:
    weight = realistic_weight(OUT, IN).to(E4M3).bfloat16()
    assert torch.equal(Fp8Linear.of(weight).dequantised(torch.bfloat16), weight)


def test_rows_of_zeros_and_odd_numbers() -> None:
    weight = realistic_weight(4, IN)
    weight[1], weight[2], weight[3, 5] = 0.0, weight[2] * 1e-30, math.nan
    found = Fp8Linear.of(weight).dequantised(torch.float32)
    assert torch.equal(found[1], weight[1])
    assert float(found[2].abs().max()) <= 2 * float(weight[2].abs().max())
    assert bool(found[3].isnan().any())  # a broken file must not turn into a quiet number
    assert not bool(found[:3].isnan().any())


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_computes_what_a_linear_with_the_dequantised_weight_computes(dtype: torch.dtype) -> None:
    linear = Fp8Linear.of(realistic_weight(OUT, IN))
    weight = linear.dequantised(dtype)
    x = realistic_tokens(TOKENS, IN).to(dtype).requires_grad_()
    gradient = realistic_gradient(TOKENS, OUT).to(dtype)
    expected = F.linear(x, weight)
    (expected_gradient,) = torch.autograd.grad(expected, x, gradient)
    y = linear(x)
    (x_gradient,) = torch.autograd.grad(y, x, gradient)
    assert torch.equal(y, expected)
    assert torch.equal(x_gradient, expected_gradient)


@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=needs_cpu_products)])
def test_autograd_keeps_the_buffers_and_nothing_else(fast: bool) -> None:
    linear = Fp8Linear.of(realistic_weight(OUT, IN), fast)
    kept: list[Tensor] = []
    x = realistic_tokens(TOKENS, IN).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        linear(x)
    assert {tensor.data_ptr() for tensor in kept} == {linear.weight.data_ptr(), linear.weight_scale.data_ptr()}
    assert set(linear.state_dict()) == {"weight", "weight_scale"}
    assert not list(linear.parameters())


def test_what_a_hook_gives_back_is_what_backward_uses() -> None:
    """Block streaming packs a weight as a handle and brings another copy of it."""
    linear = Fp8Linear.of(realistic_weight(OUT, IN))
    x = realistic_tokens(TOKENS, IN).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        y = linear(x)
    expected = torch.ones_like(y) @ linear.dequantised(torch.float32)
    linear.weight.copy_(torch.zeros(OUT, IN).to(E4M3))  # the ring buffer holds another block now
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert torch.equal(x.grad, expected)


@pytest.mark.usefixtures("emulated")
def test_fast_products_are_bounded() -> None:
    weight = realistic_weight(OUT, IN)
    x, gradient = realistic_tokens(2 * TOKENS, IN), realistic_gradient(2 * TOKENS, OUT)
    y, x_gradient = forward_and_backward(Fp8Linear.of(weight.bfloat16(), fast=True), torch.bfloat16)
    assert y.dtype == x_gradient.dtype == torch.bfloat16
    # Two operands with an independent rounding error each: its root of two, and a sum of few large terms on top.
    bound = 2**0.5 * ROUNDING * 1.15
    assert relative_error(y.view(-1, OUT), x @ weight.t()) < bound
    assert relative_error(x_gradient.view(-1, IN), gradient @ weight) < bound
    # Each token has its own scale: the gradient of the smallest one is as exact as that of the largest.
    errors = [relative_error(x_gradient.view(-1, IN)[token], gradient[token] @ weight) for token in range(2 * TOKENS)]
    assert max(errors) < 2 * bound


@pytest.mark.usefixtures("emulated")
def test_a_third_mantissa_bit_makes_better_gradients_than_a_wider_range(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gradient = realistic_weight(OUT, IN), realistic_gradient(2 * TOKENS, OUT)
    linear = Fp8Linear.of(weight, fast=True)
    _, e4m3 = forward_and_backward(linear, torch.bfloat16)
    quantised = quantise_rows

    def as_e5m2(matrix: Tensor) -> tuple[Tensor, Tensor]:
        scale = quantised(matrix)[1]
        return (matrix / scale.to(matrix.dtype)).to(E5M2), scale

    monkeypatch.setattr(fp8, "quantise_rows", as_e5m2)
    _, e5m2 = forward_and_backward(linear, torch.bfloat16)
    exact = gradient @ weight
    errors = relative_error(e4m3.view(-1, IN), exact), relative_error(e5m2.view(-1, IN), exact)
    assert errors[0] < 0.8 * errors[1]


@needs_cpu_products
def test_the_processors_product_is_the_defined_one() -> None:
    a, scale_a = quantise_rows(realistic_tokens(TOKENS, IN))  # a number of tokens that is no multiple of anything
    b, scale_b = quantise_rows(realistic_weight(OUT, IN))
    try:
        found = fp8.scaled_product(a, b, scale_a, scale_b.t().contiguous(), torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"this build of torch has no fp8 products on a CPU: {error}")
    expected = emulated_product(a, b, scale_a, scale_b.t(), torch.bfloat16)
    # One rounding to bfloat16's 8 bits of sums in another order.
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-3 * float(expected.abs().max()))


def test_matrices_that_the_hardware_cannot_take_are_dequantised() -> None:
    assert Fp8Linear.of(realistic_weight(32, 48), fast=True).fast
    assert not Fp8Linear.of(realistic_weight(32, 40), fast=True).fast
    assert not Fp8Linear.of(realistic_weight(33, 48), fast=True).fast


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.usefixtures("emulated")
def test_it_compiles_as_one_graph(fast: bool) -> None:
    torch._dynamo.reset()
    linear = Fp8Linear.of(realistic_weight(OUT, IN), fast)
    eager = forward_and_backward(linear, torch.bfloat16)
    linear.forward = torch.compile(linear.forward, fullgraph=True, backend="aot_eager")  # type: ignore[method-assign]
    compiled = forward_and_backward(linear, torch.bfloat16)
    assert all(torch.equal(*pair) for pair in zip(eager, compiled, strict=True))


def test_moving_keeps_codes_and_scales_as_they_are() -> None:
    linear = Fp8Linear.of(realistic_weight(OUT, IN))
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    for move in (lambda: linear.to(torch.bfloat16), lambda: linear.to("cpu", torch.float64), linear.half):
        move()
        after = linear.state_dict()
        assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())
        assert all(torch.equal(after[name].float(), tensor.float()) for name, tensor in before.items())
    assert linear.to("meta").weight.device.type == "meta"


@pytest.mark.parametrize(
    ("capability", "hip", "says"),
    [((8, 6), None, "compute capability 8.6"), ((9, 4), "6.0", "no NVIDIA"), ((9, 0), None, "cannot multiply in fp8")],
)
def test_gpus_without_fp8_products_are_named(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None, says: str
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")

    def fails(*args: object, **keywords: object) -> Tensor:
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setattr(torch, "ones", fails)
    with pytest.raises(SettingsError, match=says) as caught:
        require_fp8_products(torch.device("cuda"))
    assert str(caught.value).startswith("--fp8_fast")
    assert "leave --fp8_fast out" in str(caught.value)


def test_a_cpu_has_no_fp8_products_for_a_run() -> None:
    with pytest.raises(SettingsError, match="computes on cpu; leave --fp8_fast out"):
        require_fp8_products(torch.device("cpu"))
