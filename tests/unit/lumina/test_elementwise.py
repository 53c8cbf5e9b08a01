"""Functions with gradients written by hand, against their formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from library.lumina import elementwise
from library.lumina.elementwise import normalise_and_rotate, scaled_norm, swiglu

EPS = 1e-5


@pytest.fixture(params=["float32 intermediates", "as on GPUs"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test both ways: the operations for halves on a GPU have a CPU's kernels too, but one."""
    if request.param == "as on GPUs":
        take_the_way_of_gpus(monkeypatch)
    return request.param


def take_the_way_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "_is_half_on_gpu", lambda x: True)
    backward = torch._decomp.get_decompositions([torch.ops.aten._fused_rms_norm_backward])
    written_out = backward[torch.ops.aten._fused_rms_norm_backward.default]  # torch's own, for compilers
    monkeypatch.setattr(elementwise, "_fused_rms_norm_backward", written_out)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def angles(batch: int, tokens: int, pairs: int) -> Tensor:
    turned = numbers(batch, tokens, 1, pairs, seed=3)
    return torch.stack([turned.cos(), turned.sin()], dim=-1)


@pytest.mark.parametrize("factor_shape", [(6,), (2, 1, 6)])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.usefixtures("way")
def test_scaled_norm_and_its_gradients(factor_shape: tuple[int, ...], with_residual: bool) -> None:
    x, factor = numbers(2, 5, 6).requires_grad_(), numbers(*factor_shape, seed=1).requires_grad_()
    residual = numbers(2, 5, 6, seed=2).requires_grad_() if with_residual else None
    expected = F.rms_norm(x, (6,), None, EPS) * factor + (0 if residual is None else residual)
    torch.testing.assert_close(scaled_norm(x, factor, EPS, residual), expected)  # float64
    assert torch.autograd.gradcheck(lambda *given: scaled_norm(given[0], given[1], EPS, residual), (x, factor))
    if residual is not None:
        assert torch.autograd.gradcheck(lambda given: scaled_norm(x, factor, EPS, given), residual)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.usefixtures("way")
def test_normalise_and_rotate_and_its_gradients(batch: int) -> None:
    x, weight = numbers(2, 3, 2, 6).requires_grad_(), numbers(6, seed=1).requires_grad_()
    rope = angles(batch, 3, 3)
    pairs = torch.view_as_complex(F.rms_norm(x, (6,), weight, EPS).unflatten(-1, (-1, 2)))
    expected = torch.view_as_real(pairs * torch.view_as_complex(rope)).flatten(-2)
    torch.testing.assert_close(normalise_and_rotate(x, weight, rope, EPS), expected)
    assert torch.autograd.gradcheck(lambda *given: normalise_and_rotate(*given, rope, EPS), (x, weight))


@pytest.mark.usefixtures("way")
def test_heads_that_are_a_part_of_wider_rows_are_rotated_too() -> None:
    whole, rope = numbers(2, 3, 4, 6), angles(1, 3, 3)
    part, weight = whole[:, :, 1:3], numbers(6, seed=1)
    assert torch.equal(
        normalise_and_rotate(part, weight, rope, EPS), normalise_and_rotate(part.contiguous(), weight, rope, EPS)
    )


def test_swiglu_and_its_gradients() -> None:
    gate, value = numbers(2, 3, 4).requires_grad_(), numbers(2, 3, 4, seed=1).requires_grad_()
    torch.testing.assert_close(swiglu(gate, value), F.silu(gate) * value)
    assert torch.autograd.gradcheck(swiglu, (gate, value))


def inputs_of(case: str, dtype: torch.dtype) -> tuple[Callable[..., Tensor], list[Tensor]]:
    wide, other = numbers(2, 5, 64, dtype=dtype), numbers(2, 5, 64, seed=1, dtype=dtype)
    return {
        "norm": (lambda *given: scaled_norm(*given, EPS), [wide, numbers(2, 1, 64, seed=1).float()]),
        "residual": (lambda x, f, r: scaled_norm(x, f, EPS, r), [wide, numbers(64, seed=1).float(), other]),
        "rotation": (
            lambda *given: normalise_and_rotate(*given, EPS),
            [numbers(2, 5, 3, 24, dtype=dtype), numbers(24, seed=1, dtype=dtype), angles(2, 5, 12).float()],
        ),
        "swiglu": (swiglu, [wide, other]),
    }[case]


@pytest.mark.parametrize("case", ["norm", "residual", "rotation", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_compiler_gets_the_same_formula(case: str, dtype: torch.dtype) -> None:
    function, inputs = inputs_of(case, dtype)
    eager, compiled = function(*inputs), torch.compile(function, fullgraph=True, backend="eager")(*inputs)
    assert eager.dtype == compiled.dtype == dtype
    # Sums in another order, and swiglu rounds twice in bf16: one unit of the last place.
    torch.testing.assert_close(eager, compiled, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_bf16_is_rounded_once() -> None:
    x, factor = numbers(2, 50, 64, dtype=torch.bfloat16), numbers(2, 1, 64, seed=1).float()
    residual = numbers(2, 50, 64, seed=2, dtype=torch.bfloat16)
    exact = F.rms_norm(x.double(), (64,), None, EPS) * factor + residual
    found = scaled_norm(x, factor, EPS, residual)
    # Float32 arithmetic may turn a tie the other way, no more.
    assert (found != exact.to(torch.bfloat16)).float().mean() < 1e-3


@pytest.mark.parametrize("case", ["norm", "residual", "rotation"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_on_gpus_are_rounded_once_more_at_most(
    case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, inputs = inputs_of(case, dtype)
    trained = [value.requires_grad_() for value in inputs if value.dtype == dtype and value.dim() > 1]
    upstream = numbers(*function(*inputs).shape, seed=7, dtype=dtype)

    def results() -> list[Tensor]:
        result = function(*inputs)
        return [result.detach(), *torch.autograd.grad(result, trained, upstream)]

    wanted = results()
    take_the_way_of_gpus(monkeypatch)
    # What is rounded in between is one factor or summand of the result, up to a few times as large as that.
    step = torch.finfo(dtype).eps
    for found, expected in zip(results(), wanted, strict=True):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=step, atol=4 * step)
        assert (found - expected).float().norm() < step * expected.float().norm()


def kept_by(work: Callable[[], Tensor]) -> int:
    """Returns how many numbers autograd keeps of what was not there before."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    del result
    return sum(kept.values())


@pytest.mark.usefixtures("way")
def test_only_inputs_and_a_factor_a_row_are_kept() -> None:
    x, factor = numbers(2, 5, 64).requires_grad_(), numbers(2, 1, 64).requires_grad_()
    assert kept_by(lambda: scaled_norm(x, factor, EPS, x)) == x.numel() + factor.numel() + 2 * 5
    heads, weight, rope = numbers(2, 5, 3, 24).requires_grad_(), numbers(24), angles(1, 5, 12)
    inputs = heads.numel() + weight.numel() + rope.numel()
    assert kept_by(lambda: normalise_and_rotate(heads, weight, rope, EPS)) == inputs + 2 * 5 * 3
    assert kept_by(lambda: swiglu(x, x * 2)) == 2 * x.numel()
