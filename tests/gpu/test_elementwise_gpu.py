"""Norms, rotation and SwiGLU on CUDA in half precision: what the CPU computes in float32, and the host never waits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from library.lumina.elementwise import normalise_and_rotate, scaled_norm, swiglu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

WIDTH, HEADS, HEAD_DIM, TOKENS = 2304, 6, 96, 333


def numbers(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def case_of(name: str, dtype: torch.dtype) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Returns a function and its inputs on the CPU; those of ``dtype`` with more than one axis are trained."""
    x, residual = numbers(2, TOKENS, WIDTH, seed=0, dtype=dtype), numbers(2, TOKENS, WIDTH, seed=1, dtype=dtype)
    factor = numbers(2, 1, WIDTH, seed=2, dtype=torch.float32)
    angles = numbers(2, TOKENS, 1, HEAD_DIM // 2, seed=3, dtype=torch.float32)
    rope = torch.stack([angles.cos(), angles.sin()], dim=-1)
    # Queries are a part of wider rows.
    heads = numbers(2, TOKENS, HEADS + 4, HEAD_DIM, seed=4, dtype=dtype)
    weight = numbers(HEAD_DIM, seed=5, dtype=dtype)
    return {
        "norm": (lambda *given: scaled_norm(*given, 1e-5), [x, factor]),
        "residual": (lambda a, b, c: scaled_norm(a, b, 1e-5, c), [x, factor, residual]),
        "rotation": (
            lambda whole, *given: normalise_and_rotate(whole[:, :, :HEADS], *given, 1e-6),
            [heads, weight, rope],
        ),
        "swiglu": (swiglu, [x, residual]),
    }[name]


def results(function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    trained = [value.requires_grad_() for value in inputs if value.dtype == upstream.dtype and value.dim() > 1]
    result = function(*inputs)
    return [result.detach(), *torch.autograd.grad(result, trained, upstream)]


@pytest.mark.parametrize("name", ["norm", "residual", "rotation", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_equal_the_cpu_without_waiting(name: str, dtype: torch.dtype) -> None:
    function, inputs = case_of(name, dtype)
    upstream = numbers(*function(*inputs).shape, seed=6, dtype=dtype)
    wanted = results(function, [value.clone() for value in inputs], upstream)
    on_cuda, upstream = [value.cuda() for value in inputs], upstream.cuda()
    results(function, [value.clone() for value in on_cuda], upstream)  # loads kernels
    leaves = [value.clone() for value in on_cuda]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = results(function, leaves, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    step = torch.finfo(dtype).eps
    for ours, expected in zip(found, wanted, strict=True):
        # Rounded once more than on the CPU, at a size up to a few times the result's.
        assert ours.dtype == dtype
        assert (ours.cpu().float() - expected.float()).norm() < step * expected.float().norm()


def test_norms_take_no_float32_memory() -> None:
    x = torch.randn(1, 4096, WIDTH, device="cuda", dtype=torch.bfloat16).requires_grad_()
    factor = torch.ones(WIDTH, device="cuda")
    upstream = torch.ones_like(x)
    scaled_norm(x, factor, 1e-5, x).backward(upstream)
    x.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    scaled_norm(x, factor, 1e-5, x).backward(upstream)
    # At once at most: the result, the gradients of both inputs and their sum, the gradient of the norm; as bfloat16.
    assert torch.cuda.max_memory_allocated() - before < 5.5 * x.nbytes
