"""Frozen base weights in 16, 8 or 4 bits: what all kinds share, and how the large matrices of a block are replaced.

Applied from outside, block by block while a model is read: read a tensor, merge into it, quantise, place. So the model
in its full precision never has to fit: not on the device, and in host memory only as far as it is mapped from its file.

A quantised Linear computes with exactly the weight that its bits stand for, in the precision of its input; only what
was rounded away when it was made is lost. Or it multiplies in fp16 (``half_products``), its input being float32.
Autograd keeps the quantised bits and nothing else, and backward makes the full weight again. All data are registered
buffers without gradients, so whoever moves or streams a block's tensors finds them, and what autograd keeps are these
very tensors, so a saved-tensor hook can tell them.

It is no ``nn.Linear`` on purpose: code that takes an ``nn.Linear``'s ``weight`` for numbers would compute with bare
codes and say nothing. What can stand beside it goes by ``in_features`` and ``out_features``.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import SettingsError
from library.memory.half_products import HALF, bounds_of, half_product

if TYPE_CHECKING:
    from library.memory.settings import Quantisation


class QuantisedLinear(nn.Module, abc.ABC):
    """Stands in for a frozen ``nn.Linear`` without bias.

    Attributes:
        in_features: width of the input.
        out_features: width of the output.
        weight: the codes.
        bounds: of the lengths of the weight's rows and columns (2,) float32, where it multiplies in fp16; else None.
    """

    weight: Tensor
    bounds: Tensor | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("bounds", None)

    def multiply_in_halves(self, weight: Tensor) -> None:
        """Has products computed in fp16 from now on, of float32 inputs.

        Args:
            weight: (out,in), of which the codes were made; rounding may lengthen its longest rows and columns by half.
        """
        self.bounds = bounds_of(weight)

    @abc.abstractmethod
    def codes(self) -> tuple[Tensor, ...]:
        """Returns the tensors that the weight is made of, as they are now."""

    @abc.abstractmethod
    def weight_of(self, codes: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Returns the weight (out,in) that codes stand for, in ``dtype``."""

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight (out,in) that the codes stand for, in ``dtype``."""
        return self.weight_of(self.codes(), dtype)

    def operands(self) -> tuple[Tensor, ...]:
        """Returns what products are computed with, as it is now: the codes, and bounds where it multiplies in fp16."""
        return self.codes() if self.bounds is None else (*self.codes(), self.bounds)

    def product(self, x: Tensor, *operands: Tensor) -> Tensor:
        """Returns x W' (...,out) for ``x`` (...,in) and :meth:`operands`, in new memory; :meth:`forward` is for autograd."""
        if self.bounds is None:
            return F.linear(x, self.weight_of(operands, x.dtype))
        *codes, bounds = operands
        return half_product(x, self.weight_of(codes, HALF).t(), bounds[0])

    def input_gradient(self, gradient: Tensor, *operands: Tensor) -> Tensor:
        """Returns the gradient of the input (...,in) in new memory, for the output's (...,out) and :meth:`operands`."""
        if self.bounds is None:
            return gradient @ self.weight_of(operands, gradient.dtype)
        *codes, bounds = operands
        return half_product(gradient, self.weight_of(codes, HALF), bounds[1])

    def share_input(self, others: Sequence[QuantisedLinear]) -> None:
        """Is told of Linears that are given the same tensor right after it, in this order; most kinds gain nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns x W' (...,out) in the dtype of ``x`` (...,in)."""
        return _Product.apply(x, self, *self.operands())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        def keeping_dtype(tensor: Tensor) -> Tensor:
            # Codes and scales mean nothing in another dtype: model.to(bfloat16) moves them at most.
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keeping_dtype, recurse)
        return self

    def extra_repr(self) -> str:
        """Returns the sizes, for ``print``."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class _Product(torch.autograd.Function):
    """x W', whose backward makes W again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QuantisedLinear, *operands: Tensor) -> Tensor:
        ctx.save_for_backward(*operands)
        ctx.linear = linear
        return linear.product(x, *operands)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        operands = ctx.saved_tensors
        return ctx.linear.input_gradient(gradient, *operands), None, *[None] * len(operands)


def finish_of(
    kind: Quantisation | None, device: torch.device, place: torch.device, in_halves: bool = False
) -> Callable[[nn.Module, Sequence[str]], None] | None:
    """Returns what is done with a block as soon as it is read; None: nothing, because it is where it is to be.

    A block that computes on a device goes there at once. So of a file that is in another precision than the run (Gemma2's
    usual one is fp16) only one converted block is in host memory, and not the whole model.

    Args:
        kind: how it is quantised; None = not at all.
        device: where the arithmetic is done.
        place: where the block is in the end.
        in_halves: multiply in fp16.
    """
    if kind is not None or in_halves:
        return partial(quantise_block, kind=kind, device=device, place=place, in_halves=in_halves)
    if place.type == "cpu":
        return None
    return partial(_place_block, place=place)


def _place_block(block: nn.Module, paths: Sequence[str], place: torch.device) -> None:
    block.to(place)


def quantise_block(
    block: nn.Module,
    paths: Sequence[str],
    kind: Quantisation | None,
    device: torch.device | str,
    place: torch.device | str | None = None,
    in_halves: bool = False,
) -> None:
    """Replaces the large matrices of a block by quantised ones, one after the other, and places the block.

    Args:
        block: frozen, with its weights wherever they were read to; they are not written to.
        paths: of its large ``nn.Linear`` modules; all others keep their dtype.
        kind: how they are quantised; None = not at all, if they multiply in fp16.
        device: where the arithmetic is done.
        place: where the block is in the end; None = on ``device``.
        in_halves: whether their products are computed in fp16.
    """
    make = _maker(kind, in_halves)
    place = device if place is None else place
    for path in paths:
        linear = block.get_submodule(path)
        if not isinstance(linear, nn.Linear) or linear.bias is not None:
            raise TypeError(f"{path} is no nn.Linear without bias, so it cannot be quantised")
        with torch.no_grad():
            quantised = make(linear.weight.to(device)).to(place)
        parent, _, name = path.rpartition(".")
        setattr(block.get_submodule(parent), name, quantised.train(linear.training))
    _tell_of_same_inputs(block)
    block.to(place)


def _tell_of_same_inputs(block: nn.Module) -> None:
    """Tells the Linears that a module names in ``SAME_INPUT`` of each other."""
    for module in block.modules():
        named = [module.get_submodule(name) for name in getattr(module, "SAME_INPUT", ())]
        group = [linear for linear in named if isinstance(linear, QuantisedLinear)]
        if len(group) > 1:
            group[0].share_input(group[1:])


def require_quantisation(kind: Quantisation | None, device: torch.device) -> None:
    """Checks that a device can do what a kind of weights needs, by doing it once, before a model is read.

    Raises:
        SettingsError: it cannot.
    """
    if kind == "fp8_fast":
        from library.memory.fp8 import require_fp8_products

        require_fp8_products(device)
    if kind == "nf4":
        try:
            _maker(kind)(torch.ones(64, 64, device=device))(torch.ones(1, 64, device=device))
        except Exception as error:  # whatever bitsandbytes raises: that it cannot be used here is the answer
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise SettingsError(
                f"--nf4_base: bitsandbytes is installed but cannot be used on {device.type} ({reason}); install it anew in"
                f" a version for this torch ({torch.__version__}), or use --fp8_base"
            ) from error


def _maker(kind: Quantisation | None, in_halves: bool = False) -> Callable[[Tensor], QuantisedLinear]:
    if kind is None:
        from library.memory.half_linear import HalfLinear

        return HalfLinear
    if kind == "nf4":
        from library.memory.nf4 import Nf4Linear

        make: Callable[[Tensor], QuantisedLinear] = Nf4Linear.of
    else:
        from library.memory.fp8 import Fp8Linear

        make = partial(Fp8Linear.of, fast=kind == "fp8_fast")
    return partial(_in_halves, make) if in_halves else make


def _in_halves(make: Callable[[Tensor], QuantisedLinear], weight: Tensor) -> QuantisedLinear:
    linear = make(weight)
    linear.multiply_in_halves(weight)
    return linear
