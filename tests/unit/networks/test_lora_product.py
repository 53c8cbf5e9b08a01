"""A Linear and its LoRA as one function: the same numbers and gradients as step by step, in fewer nodes and less memory."""

import pytest
import torch
import torch.nn.functional as F
from lora_helpers import fill
from torch import Tensor, nn

from library.memory.fp8 import Fp8Linear
from library.memory.nf4 import Nf4Linear
from networks.lora import LoRAModule, SplitLoRAModule
from networks.lora_product import LinearWithLoRA, frozen_product

IN, OUT, RANK = 64, 128, 4


def linear(dtype: torch.dtype = torch.float32, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias=bias).to(dtype).requires_grad_(False)


def attached(base: nn.Module, **settings: float) -> LoRAModule:
    lora = LoRAModule("lora_unet_x", base, rank=RANK, **settings)
    fill(lora, size=0.5)
    lora.apply_to()
    return lora


def step_by_step(lora: LoRAModule, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    down, up = lora.lora_down.weight.to(x.dtype), lora.lora_up.weight.to(x.dtype)
    return F.linear(x, weight, bias) + F.linear(F.linear(x, down) * (lora.multiplier * lora.scale), up)


def gradients(out: Tensor, lora: LoRAModule, x: Tensor) -> list[Tensor]:
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return list(torch.autograd.grad(out, [x, lora.lora_down.weight, lora.lora_up.weight], upstream))


def nodes(out: Tensor) -> int:
    """Returns the number of autograd nodes behind a tensor."""
    seen, todo = set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return len(seen)


@pytest.mark.parametrize("shape", [(3, 5, IN), (3, IN)], ids=["tokens", "time"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("alpha", [None, 1.5])
def test_numbers_and_gradients_are_those_of_single_steps(
    shape: tuple[int, ...], bias: bool, alpha: float | None
) -> None:
    base = linear(bias=bias)
    lora = attached(base, alpha=alpha)
    x = torch.randn(shape, requires_grad=True)
    out = base(x)
    expected = step_by_step(lora, base.weight, base.bias, x)
    # Default float32 tolerance: sums in another order.
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(gradients(out, lora, x), gradients(expected, lora, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert nodes(out) == 4  # itself, and what collects the gradients of x and both factors


@pytest.mark.parametrize("observed", [False, True])
def test_a_gradient_lies_as_its_parameter_does_where_products_of_columns_cost_nothing(
    observed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise autograd copies it, for each LoRA in each step of a GPU."""
    base = linear()
    lora = attached(base).to("meta")
    base.to("meta")
    x = torch.randn(3, 5, IN, device="meta", requires_grad=True)
    if observed:
        monkeypatch.setattr("networks.lora.is_observed", lambda: True)
        monkeypatch.setattr(lora, "_is_one_function", lambda: False)
    trained = [lora.lora_down.weight, lora.lora_up.weight]
    out = base(x)
    assert all(gradient.is_contiguous() for gradient in torch.autograd.grad(out, trained, torch.empty_like(out)))


@pytest.mark.parametrize("make", [Fp8Linear.of, Nf4Linear.of], ids=["fp8", "nf4"])
def test_beside_quantised_weights(make: type) -> None:
    base = make(linear().weight.detach())
    weight = base.dequantised(torch.float32)
    lora = attached(base)
    x = torch.randn(3, 5, IN, requires_grad=True)
    out, expected = base(x), step_by_step(lora, weight, None, x)
    torch.testing.assert_close(out, expected)  # as above
    for ours, theirs in zip(gradients(out, lora, x), gradients(expected, lora, x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert set(lora.state_dict()) == {"alpha", "lora_down.weight", "lora_up.weight"}  # the base is no part of the LoRA


def test_bf16_rounds_no_more_than_single_steps() -> None:
    base = linear(torch.bfloat16)
    lora = attached(base)
    x = torch.randn(4, 33, IN).bfloat16().requires_grad_()
    found = [base(x), *gradients(base(x), lora, x)]
    single = step_by_step(lora, base.weight, None, x)
    single = [single, *gradients(single, lora, x)]
    exact_x = x.detach().double().requires_grad_()
    exact = step_by_step(lora, base.weight.double(), None, exact_x)
    exact = [exact, *gradients(exact, lora, exact_x)]

    def error(ours: Tensor, wanted: Tensor) -> float:
        return float((ours.double() - wanted).norm() / wanted.norm())

    assert [tensor.dtype for tensor in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for ours, theirs, wanted in zip(found, single, exact, strict=True):
        assert error(ours, wanted) <= 1.05 * error(theirs, wanted)  # luck of single roundings


def test_the_function_has_the_gradients_of_its_formula() -> None:
    base = linear(torch.float64)
    frozen = frozen_product(base)
    assert frozen is not None
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, IN), (2, IN), (OUT, 2))]
    assert torch.autograd.gradcheck(
        lambda x, down, up: LinearWithLoRA.apply(x, down, up, 0.7, frozen, *frozen.operands()), tensors, fast_mode=True
    )


def test_an_input_without_a_gradient_costs_no_product() -> None:
    base = linear()
    lora = attached(base)

    def fails(gradient: Tensor, *operands: Tensor) -> Tensor:
        raise AssertionError("an input's gradient that nobody asked for")

    lora._frozen[0].input_gradient = fails
    base(torch.randn(2, 3, IN)).sum().backward()
    assert lora.lora_down.weight.grad is not None


def test_what_is_not_the_plain_case_goes_step_by_step() -> None:
    trained = linear().requires_grad_()
    assert frozen_product(trained) is None
    wrapped = linear()
    wrapped.forward = lambda x: nn.Linear.forward(wrapped, x)
    assert frozen_product(wrapped) is None
    assert frozen_product(nn.Conv2d(3, 3, 1).requires_grad_(False)) is None
    split = SplitLoRAModule("a", linear(), rows=(64, 32, 32), rank=2)
    split.apply_to()
    assert not split._is_one_function()
    with torch.no_grad():
        assert not attached(linear())._is_one_function()
    dropping = attached(linear(), dropout=0.5)
    assert not dropping._is_one_function()
    assert dropping.eval()._is_one_function()


def test_a_subclass_that_changes_a_step_is_asked() -> None:
    class Louder(LoRAModule):
        def _add_up(self, base: Tensor, hidden: Tensor) -> Tensor:
            return super()._add_up(base, 2 * hidden)

    class Quieter(LoRAModule):
        def _drop(self, hidden: Tensor) -> Tensor:
            return hidden / 2

    for kind, factor in ((LoRAModule, 1), (Louder, 2), (Quieter, 0.5)):
        base = linear()
        lora = kind("lora_unet_x", base, rank=RANK)
        fill(lora, size=0.5)
        lora.apply_to()
        x = torch.randn(3, IN)
        lora.multiplier = factor
        expected = step_by_step(lora, base.weight, None, x)
        lora.multiplier = 1
        torch.testing.assert_close(base(x), expected)  # as above
        with torch.no_grad():
            torch.testing.assert_close(base(x), expected)


def test_a_base_that_is_trained_later_gets_its_gradient() -> None:
    base = linear()
    lora = attached(base)
    base.requires_grad_()
    x = torch.randn(3, IN)
    base(x).sum().backward()
    expected = torch.ones(OUT, 3) @ x
    torch.testing.assert_close(base.weight.grad, expected)  # as above
    assert lora.lora_down.weight.grad is not None


def test_autocast_decides_of_single_operations() -> None:
    base = linear()
    lora = attached(base)
    x = torch.randn(3, 5, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = base(x), step_by_step(lora, base.weight, None, x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, atol=0.1, rtol=0.02)  # bf16, values of up to 8
    assert all(gradient.dtype == torch.float32 for gradient in gradients(out, lora, x))


@pytest.mark.parametrize(
    "trained", [(), ("down",), ("up",), ("down", "up")], ids=lambda names: " ".join(names) or "none"
)
@pytest.mark.parametrize("needs_x", [False, True])
def test_nothing_is_kept_that_no_gradient_needs(trained: tuple[str, ...], needs_x: bool) -> None:
    base = linear()
    lora = attached(base, alpha=1.5)
    factors = {"down": lora.lora_down.weight, "up": lora.lora_up.weight}
    for name, factor in factors.items():
        factor.requires_grad_(name in trained)
    x = torch.randn(7, IN).requires_grad_(needs_x)
    wanted = [*([x] if needs_x else []), *(factors[name] for name in trained)]
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tuple(tensor.shape)), tensor)[1], lambda t: t
    ):
        out = base(x)
    expected_shapes = {
        (7, IN): "down" in trained,
        (7, RANK): "up" in trained,
        (RANK, IN): needs_x,
        (OUT, RANK): needs_x or "down" in trained,
        (OUT, IN): needs_x,
    }
    assert kept == [shape for shape, is_needed in expected_shapes.items() if is_needed]
    if wanted:
        expected = step_by_step(lora, base.weight, None, x)
        for ours, theirs in zip(
            torch.autograd.grad(out.square().sum(), wanted),
            torch.autograd.grad(expected.square().sum(), wanted),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)  # as above


def test_two_networks_on_one_linear_add_up() -> None:
    base = linear()
    first, second = attached(base), attached(base)
    x = torch.randn(3, IN, requires_grad=True)
    parts = [step_by_step(lora, torch.zeros_like(base.weight), None, x) for lora in (first, second)]
    expected = F.linear(x, base.weight) + sum(parts)
    out = base(x)
    torch.testing.assert_close(out, expected)  # as above
    for lora in (first, second):
        for ours, theirs in zip(
            torch.autograd.grad(out.sum(), list(lora.parameters()), retain_graph=True),
            torch.autograd.grad(expected.sum(), list(lora.parameters()), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)
