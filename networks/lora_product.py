"""A frozen Linear and the LoRA beside it as one function with a gradient of its own.

Step by step, autograd would make ten nodes of it, and add up the gradients of the two ways in a tensor of the input's
size. As one function, the LoRA's part is added inside its own matrix product, forward and backward: nothing of the
output's or the input's size is read or written but by a product, and each sum is rounded once. That matters most where
the host is slower than the device: small pictures on a fast GPU.

A Linear in another form, such as quantised, takes part by offering what :class:`FrozenProduct` says.

Shapes: M rows (samples times tokens), r rank, ``in`` and ``out`` features.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FrozenProduct(Protocol):
    """x W' (+ bias) with a weight that is not trained.

    The tensors are given each time, because those that are there in backward may be others than in forward: weights that
    are streamed from host memory.
    """

    def operands(self) -> tuple[Tensor, ...]:
        """Returns the tensors that the weight is made of, as they are now; none requires a gradient."""

    def product(self, x: Tensor, *operands: Tensor) -> Tensor:
        """Returns x W' (...,out) for ``x`` (...,in), in new memory."""

    def input_gradient(self, gradient: Tensor, *operands: Tensor) -> Tensor:
        """Returns ``gradient`` W (...,in) for the output's gradient (...,out), in new memory."""


class _PlainProduct:
    """Of an ``nn.Linear``."""

    def __init__(self, linear: nn.Linear) -> None:
        self._linear = linear

    def operands(self) -> tuple[Tensor, ...]:
        weight, bias = self._linear.weight, self._linear.bias
        return (weight,) if bias is None else (weight, bias)

    def product(self, x: Tensor, *operands: Tensor) -> Tensor:
        return F.linear(x, *operands)

    def input_gradient(self, gradient: Tensor, *operands: Tensor) -> Tensor:
        return gradient @ operands[0]


def frozen_product(linear: nn.Module) -> FrozenProduct | None:
    """Returns what a module computes, or None where it is no frozen Linear or something has changed its ``forward``."""
    if "forward" in vars(linear) or any(parameter.requires_grad for parameter in linear.parameters()):
        return None
    if type(linear) is nn.Linear:
        return _PlainProduct(linear)
    return linear if hasattr(linear, "input_gradient") else None  # type: ignore[return-value]


def is_observed() -> bool:
    """Whether somebody besides a function may hold the results of its operations, such as selective checkpointing."""
    return torch._C._len_torch_dispatch_stack() > 0


class LinearWithLoRA(torch.autograd.Function):
    """x W' (+ bias) + strength * (x down') up'."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, strength: float, base: FrozenProduct, *operands: Tensor
    ) -> Tensor:
        """Returns (...,out) in the dtype of ``x`` (...,in); ``down`` (r,in) and ``up`` (out,r) are float32 or that."""
        low_down, low_up = down.to(x.dtype), up.to(x.dtype)
        hidden = x.reshape(-1, x.shape[-1]) @ low_down.t()  # (M,r); first, so that the product finds x in a GPU's cache
        if strength != 1:
            hidden = hidden * strength  # the smallest tensor there is
        out = base.product(x, *operands)
        needs_x, needs_down, needs_up, *_ = ctx.needs_input_grad
        ctx.save_for_backward(  # what gradients need: a LoRA may be frozen, and so may be all that made the input
            x if needs_down else None,
            hidden if needs_up else None,
            low_down if needs_x else None,
            low_up if needs_x or needs_down else None,
            *(operands if needs_x else ()),
        )
        ctx.strength, ctx.base, ctx.dtypes, ctx.num_operands = strength, base, (down.dtype, up.dtype), len(operands)
        rows = out.view(-1, out.shape[-1])
        if is_observed():  # what it keeps of the product must not be written over
            return torch.addmm(rows, hidden, low_up.t()).view(out.shape)
        rows.addmm_(hidden, low_up.t())
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of ``x``, ``down`` and ``up``."""
        (gradient,) = gradients
        x, hidden, down, up, *operands = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])  # (M,out)
        of_x, of_down, of_up = None, None, None
        of_hidden: Any = None
        if up is not None:
            of_hidden = rows @ up  # (M,r)
            if ctx.strength != 1:
                of_hidden = of_hidden * ctx.strength
        if ctx.needs_input_grad[1]:
            of_down = _product_in(ctx.dtypes[0], of_hidden.t(), x.reshape(-1, x.shape[-1]))
        if ctx.needs_input_grad[2]:
            of_up = _product_in(ctx.dtypes[1], rows.t(), hidden)
        if ctx.needs_input_grad[0]:
            of_x = ctx.base.input_gradient(gradient, *operands)
            of_x.view(-1, of_x.shape[-1]).addmm_(of_hidden, down)
        return of_x, of_down, of_up, *[None] * (2 + ctx.num_operands)


def _product_in(dtype: torch.dtype, a: Tensor, b: Tensor) -> Tensor:
    """Returns a b in ``dtype``; on GPUs that can, float32 sums of halves are never rounded to halves."""
    if dtype == torch.float32 != a.dtype and a.is_cuda and _keeps_sums(a.device, a.dtype):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(dtype)


@functools.cache
def _keeps_sums(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GPU multiplies halves into float32."""
    halves = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(halves, halves, out_dtype=torch.float32)
    except RuntimeError:  # AMD's, and what torch's library has no such product for
        return False
    return True
