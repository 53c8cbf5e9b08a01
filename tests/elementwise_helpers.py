"""What norms, rotation and SwiGLU are tried with, on a GPU and in Triton's interpreter, and what is expected of them.

As a program, with TRITON_INTERPRET=1 in the environment, it runs the kernels on the CPU and prints how far off they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from library.lumina.elementwise import queries_keys_values, scaled_norm, swiglu

NORM_EPS, HEAD_EPS = 1e-5, 1e-6


class Case(NamedTuple):
    """A function, its inputs on the CPU, and how many of these are trained, from the first on."""

    function: str
    inputs: list[Tensor]
    num_trained: int
    heads: int = 0


def numbers(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def norm(batch: int, tokens: int, width: int, factor: str, residual: bool, dtype: torch.dtype) -> Case:
    shape = {"of all": (width,), "of a sample": (batch, 1, width), "of one sample": (1, 1, width)}[factor]
    x, other = (numbers(batch, tokens, width, seed=seed, dtype=dtype) for seed in (0, 1))
    scale = numbers(*shape, seed=2, dtype=torch.float32)
    return Case("norm", [x, scale, other] if residual else [x, scale], 3)


def rotation(batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int, ropes: int, dtype: torch.dtype) -> Case:
    angles = numbers(ropes, tokens, 1, head_dim // 2, seed=3, dtype=torch.float32)
    rope = torch.stack([angles.cos(), angles.sin()], dim=-1)
    qkv = numbers(batch, tokens, heads + 2 * kv_heads, head_dim, seed=4, dtype=dtype)
    weights = [numbers(head_dim, seed=seed, dtype=dtype) for seed in (5, 6)]
    return Case("rotation", [qkv, *weights, rope], 3, heads)


def gated(dtype: torch.dtype, *shape: int) -> Case:
    return Case("swiglu", [numbers(*shape, seed=seed, dtype=dtype) for seed in (0, 1)], 2)


def cases(dtype: torch.dtype) -> dict[str, Case]:
    """The model's widths, odd numbers of tokens, widths that are no powers of two or narrower than a warp."""
    return {
        "norm": norm(2, 333, 2304, "of a sample", False, dtype),
        "norm, frozen": norm(2, 33, 2304, "of all", False, dtype)._replace(num_trained=1),
        "norm of all, residual": norm(2, 5, 2304, "of all", True, dtype),
        "norm of a sample, residual": norm(3, 37, 2304, "of a sample", True, dtype),
        "norm of one sample": norm(2, 9, 256, "of one sample", True, dtype),
        "norm, odd width": norm(2, 7, 101, "of a sample", True, dtype),
        "norm, narrow": norm(1, 3, 6, "of all", True, dtype),
        "norm, many tokens": norm(1, 5000, 2304, "of a sample", True, dtype),
        "rotation": rotation(2, 33, 24, 8, 96, 1, dtype),
        "rotation, own angles": rotation(2, 7, 24, 8, 96, 2, dtype),
        "rotation, frozen weights": rotation(2, 7, 8, 8, 96, 2, dtype)._replace(num_trained=1),
        "rotation, few heads": rotation(1, 3, 3, 1, 24, 1, dtype),
        "rotation, ten heads": rotation(2, 2, 10, 5, 6, 1, dtype),
        "swiglu": gated(dtype, 2, 5, 9216),
        "swiglu, odd": gated(dtype, 1, 3, 701),
    }


def public(case: Case) -> Callable[..., Tensor]:
    """Returns the function of ``elementwise``."""
    if case.function == "norm":
        return lambda x, factor, residual=None: scaled_norm(x, factor, NORM_EPS, residual)
    if case.function == "rotation":
        return lambda qkv, *others: torch.cat(queries_keys_values(qkv, case.heads, *others, HEAD_EPS), dim=2)
    return swiglu


def by_kernel(case: Case) -> Callable[..., Tensor]:
    """Returns the function of ``elementwise_launches``, which takes any tensors."""
    from library.lumina import elementwise_launches as kernels

    if case.function == "norm":
        return lambda x, factor, residual=None: kernels.ScaledNorm.apply(x, factor, NORM_EPS, residual)
    if case.function == "rotation":
        rotate = kernels.QueriesKeysValues.apply
        return lambda qkv, *others: torch.cat(rotate(qkv, case.heads, *others, HEAD_EPS), dim=2)
    return kernels.SwiGLU.apply


def results(function: Callable[..., Tensor], case: Case, inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Returns what ``function`` gives and the gradients of what is trained.

    Args:
        function: one of the two above.
        case: whose function it is.
        inputs: those of the case, on any device.
        upstream: the result's gradient.
    """
    leaves = [value.detach().requires_grad_(index < case.num_trained) for index, value in enumerate(inputs)]
    result = function(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves[: case.num_trained], upstream)]


def exact(case: Case, upstream: Tensor) -> list[Tensor]:
    """Returns the same in float64 on the CPU."""
    return results(public(case), case, [value.double() for value in case.inputs], upstream.double())


def upstream_of(case: Case) -> Tensor:
    result = public(case)(*case.inputs)
    return numbers(*result.shape, seed=6, dtype=result.dtype)


def distance(found: Tensor, expected: Tensor) -> float:
    """Returns how far a tensor is from another one, relative (L2)."""
    return float((found.cpu().double() - expected).norm() / expected.norm())


def bound(case: Case, found: Tensor) -> float:
    """Returns how far off a result may be.

    One rounding to nearest moves numbers by up to half an eps, a third of that in the mean; SwiGLU rounds twice or three
    times. Float32 sums of some thousand numbers are off by a few float32 eps.
    """
    if found.dtype == torch.float32:
        return 1e-6
    return torch.finfo(found.dtype).eps * (0.6 if case.function == "swiglu" else 0.3)


def main() -> None:
    """Prints, for each case in fp16, how far each result is off and how far it may be."""
    report = {}
    for name, case in cases(torch.float16).items():
        if name == "norm, many tokens":
            continue  # takes minutes in an interpreter
        upstream = upstream_of(case)
        found = results(by_kernel(case), case, case.inputs, upstream)
        expected = exact(case, upstream)
        report[name] = [
            [distance(ours, theirs), bound(case, ours)] for ours, theirs in zip(found, expected, strict=True)
        ]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
