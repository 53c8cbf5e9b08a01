"""Whether norms, rotation and SwiGLU run as Triton kernels on a GPU: tried once, compared with what a CPU computes.

What may be missing stands in ``library.kernel_trial``. torch's operations do the work then: the same results up to
rounding, more slowly.

A program asks at its start (:func:`announce_kernels`), where what comes out is logged. Where it did not, the first tensor
asks. The answer is a fact about the machine and is remembered.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from library.kernel_trial import has_triton, tried

__all__ = ["HALVES", "announce_kernels", "kernels_on"]

logger = logging.getLogger(__name__)

HALVES = (torch.bfloat16, torch.float16)
_BATCH, _TOKENS = 2, 3
_WIDTH, _HEADS, _HEAD_DIM = 2304, (24, 8, 8), 96  # the model's: what is compiled here need not be in the first step


def announce_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Tries the kernels on the device of a run, and logs what does the work there; nothing where no kernels are meant for.

    Args:
        device: where the model computes.
        dtype: of its activations.
    """
    if device.type != "cuda" or dtype not in HALVES:
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    if kernels_on(index, dtype) is not None:
        logger.info("Norms, rotation and SwiGLU: Triton kernels")
    elif not has_triton():
        logger.info("Norms, rotation and SwiGLU: torch's operations; with the package triton steps would be faster")


@functools.cache
def kernels_on(index: int, dtype: torch.dtype) -> ModuleType | None:
    """Returns the module ``elementwise_launches`` if it works on a CUDA device, else None.

    A failed trial is warned about; that triton is not installed is none.

    Args:
        index: of the device.
        dtype: bfloat16 or float16.
    """
    device = torch.device("cuda", index)
    return tried(
        "library.lumina.elementwise_launches",
        "Norms, rotation and SwiGLU",
        lambda kernels: failure_of(kernels, device, dtype),
    )


def failure_of(kernels: ModuleType, device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns what is wrong with the kernels' results and gradients; None = nothing.

    Args:
        kernels: the module ``elementwise_launches``.
        device: where to try them.
        dtype: bfloat16 or float16.
    """
    # Rounding moves a result by a third of this at most, and by half where it is done twice; what is wrong is off by more.
    bound = torch.finfo(dtype).eps
    for case in _cases(kernels, dtype):
        upstream = _numbers(*case.inputs[0].shape).to(dtype)
        # Twice, as a kernel is launched in another way as soon as it is compiled.
        found = [result for _ in range(2) for result in _results(case.kernel, case, device, dtype, upstream)]
        expected = _results(case.plain, case, torch.device("cpu"), torch.float32, upstream)
        for ours, exact in zip(found, expected * 2, strict=True):
            off = float((ours.cpu().float() - exact).norm() / exact.norm())
            if not off <= bound:  # NaN as well
                return f"a try of {case.name} gave wrong results (off by {off:.1%})"
    return None


class _Case(NamedTuple):
    """What a step computes: by a kernel, by the plain function, of what, and how many of the inputs are trained."""

    name: str
    kernel: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    inputs: list[Tensor]
    num_trained: int


def _cases(kernels: ModuleType, dtype: torch.dtype) -> list[_Case]:
    from library.lumina.elementwise import queries_keys_values, scaled_norm, swiglu

    x, other = (_numbers(_BATCH, _TOKENS, _WIDTH).to(dtype) for _ in range(2))
    modulation, weight = _numbers(_BATCH, 1, _WIDTH), _numbers(_WIDTH)
    angles = _numbers(1, _TOKENS, 1, _HEAD_DIM // 2)
    rope = torch.stack([angles.cos(), angles.sin()], dim=-1)
    qkv = _numbers(_BATCH, _TOKENS, sum(_HEADS), _HEAD_DIM).to(dtype)
    weights = [_numbers(_HEAD_DIM).to(dtype), _numbers(_HEAD_DIM).flip(0).to(dtype)]
    norm = kernels.ScaledNorm.apply

    def heads(function: Callable[..., tuple[Tensor, ...]], qkv: Tensor) -> Tensor:
        of_device = (value.to(qkv.device) for value in (*weights, rope))
        return torch.cat(function(qkv, _HEADS[0], *of_device, 1e-6), dim=2)

    return [
        _Case("a norm", lambda a, f: norm(a, f, 1e-5, None), lambda a, f: scaled_norm(a, f, 1e-5), [x, modulation], 2),
        _Case(
            "a norm with a residual",
            lambda a, r, f: norm(a, f, 1e-5, r),
            lambda a, r, f: scaled_norm(a, f, 1e-5, r),
            [x, other, weight],
            2,
        ),
        _Case(
            "a rotation", partial(heads, kernels.QueriesKeysValues.apply), partial(heads, queries_keys_values), [qkv], 1
        ),
        _Case("SwiGLU", kernels.SwiGLU.apply, swiglu, [x, other], 2),
    ]


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _results(
    function: Callable[..., Tensor], case: _Case, device: torch.device, dtype: torch.dtype, upstream: Tensor
) -> list[Tensor]:
    """Returns the result and the gradients of what is trained; halves among the inputs become ``dtype``."""
    inputs = [value.to(device, dtype if value.dtype in HALVES else value.dtype).detach() for value in case.inputs]
    trained = [value.requires_grad_() for value in inputs[: case.num_trained]]
    result = function(*inputs)
    return [result.detach(), *torch.autograd.grad(result, trained, upstream.to(device, dtype))]
