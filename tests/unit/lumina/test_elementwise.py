"""Functions with gradients written by hand, against their formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from library.lumina import elementwise
from library.lumina.elementwise import queries_keys_values, scaled_norm, swiglu

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


def turned(x: Tensor, weight: Tensor, rope: Tensor) -> Tensor:
    """Returns heads normalised, weighted and turned, by torch's own functions."""
    pairs = torch.view_as_complex(F.rms_norm(x, x.shape[-1:], weight, EPS).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(rope)).flatten(-2)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.usefixtures("way")
def test_queries_keys_values_and_their_gradients(batch: int) -> None:
    qkv, rope = numbers(2, 3, 4, 6).requires_grad_(), angles(batch, 3, 3)  # two heads, and one of keys and of values
    q_weight, k_weight = (numbers(6, seed=seed).requires_grad_() for seed in (1, 2))
    q, k, v = queries_keys_values(qkv, 2, q_weight, k_weight, rope, EPS)
    torch.testing.assert_close(q, turned(qkv[:, :, :2], q_weight, rope))
    torch.testing.assert_close(k, turned(qkv[:, :, 2:3], k_weight, rope))
    assert torch.equal(v, qkv[:, :, 3:])
    assert q.is_contiguous()
    assert k.is_contiguous()

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        # Not a leaf, as in the model: what is returned in part must not lose its own node.
        return queries_keys_values(given[0] * 2, 2, given[1], given[2], rope, EPS)

    assert torch.autograd.gradcheck(function, (qkv, q_weight, k_weight))
    for index, frozen in enumerate([qkv, q_weight, k_weight]):
        frozen.requires_grad_(False)
        assert torch.autograd.gradcheck(function, (qkv, q_weight, k_weight)), index
        frozen.requires_grad_()


@pytest.mark.usefixtures("way")
def test_values_are_a_part_of_what_they_are_taken_from() -> None:
    qkv = numbers(2, 3, 4, 6).requires_grad_()
    *_, v = queries_keys_values(qkv, 2, numbers(6), numbers(6), angles(1, 3, 3), EPS)
    assert v.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    (gradient,) = torch.autograd.grad(v.sum(), qkv)
    assert torch.equal(gradient, torch.ones_like(qkv).index_fill(2, torch.arange(3), 0))


@pytest.mark.usefixtures("way")
def test_one_tensor_takes_all_gradients() -> None:
    """What comes from attention goes to the projection's backward in one piece."""
    qkv = numbers(1, 3, 4, 6).requires_grad_()
    given: list[Tensor] = []
    product = qkv * 1
    product.register_hook(given.append)
    results = queries_keys_values(product, 2, numbers(6), numbers(6), angles(1, 3, 3), EPS)
    torch.autograd.backward(
        results, [torch.ones_like(result).transpose(1, 2).contiguous().transpose(1, 2) for result in results]
    )
    assert len(given) == 1
    assert given[0].is_contiguous()


@pytest.mark.usefixtures("way")
def test_rows_that_are_no_neighbours_are_rotated_too() -> None:
    qkv, weight, rope = numbers(2, 3, 4, 6), numbers(6, seed=1), angles(1, 3, 3)
    strided = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    for found, expected in zip(
        queries_keys_values(strided, 2, weight, weight, rope, EPS),
        queries_keys_values(qkv, 2, weight, weight, rope, EPS),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.usefixtures("way")
def test_without_gradients_results_are_the_same_and_nothing_is_kept() -> None:
    qkv, weight, rope = numbers(2, 3, 4, 6).requires_grad_(), numbers(6).requires_grad_(), angles(1, 3, 3)

    def results() -> list[Tensor]:
        heads = queries_keys_values(qkv, 2, weight, weight, rope, EPS)
        return [*heads, scaled_norm(qkv, weight, EPS, qkv), swiglu(qkv, qkv * 2)]

    expected = results()
    with torch.no_grad():
        found = results()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.grad_fn is None
        assert torch.equal(ours, theirs)


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
            lambda qkv, *others: torch.cat(queries_keys_values(qkv, 3, *others, EPS), dim=2),
            [
                numbers(2, 5, 5, 24, dtype=dtype),
                *(numbers(24, seed=seed, dtype=dtype) for seed in (1, 2)),
                angles(2, 5, 12).float(),
            ],
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
    qkv, weight, rope = numbers(2, 5, 5, 24).requires_grad_(), numbers(24), angles(1, 5, 12)
    inputs = qkv.numel() + weight.numel() + rope.numel()
    factors = 2 * 5 * (3 + 1)
    kept = kept_by(lambda: queries_keys_values(qkv, 3, weight, weight, rope, EPS)[0])
    assert kept == inputs + factors
    assert kept_by(lambda: swiglu(x, x * 2)) == 2 * x.numel()
