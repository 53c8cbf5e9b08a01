"""Frozen weights as float8 e4m3 with one scale for each output channel, and matrix products in fp8.

Every scale is a power of two. e4m3 is a floating-point format, so a finer scale makes its error hardly smaller (2.61
instead of 2.66 % of a weight), and multiplying by a power of two is exact in every floating-point dtype. So a
dequantised weight is exact in bfloat16 (four significant bits), a scale can be moved from one operand of a product to
the other without rounding, and no float32 copy of an activation is needed to scale it. A file that holds plain e4m3
weights loses nothing by it.

``Fp8Linear`` computes in one of two ways:

* **dequantising**: the codes are cast, the cast weight is scaled in place, and the product is the ordinary one in the
  input's dtype, bit for bit what a Linear with the dequantised weight gives. Scaling the weight and not the output
  takes no further memory either, and is the cheaper pass where there are more tokens than input channels.
* **fast** (compute capability 8.9 and above): the product itself is in fp8. The input is quantised for each token,
  forward and, for the input gradient, backward. There the weight's scales lie on the axis that is summed over, where
  the hardware takes none: they are multiplied into the incoming gradient before that is quantised. The gradient is
  e4m3 too: with a scale for each token its range of 2^17 below the token's largest value is ample, and a third
  mantissa bit halves the rounding error against e5m2. Hopper multiplies only matrices whose summed axis is the
  contiguous one, so backward needs the transposed codes; they are transposed each time (one byte read and written for
  a weight) because keeping them would take as much memory as bfloat16 weights do. Sums are taken in the tensor
  cores' fast accumulators, whose error is far below that of three mantissa bits.

Quantising and transposing move bytes and nothing else, and take a good part of what the products save. So they are Triton
kernels (``fp8_kernels``) where Triton can compile (``fp8_trial``): 3 bytes of traffic for a number, where torch's operations
take 9, and 13 for a gradient. ``torch.compile`` fuses torch's operations itself. Linears that are given one tensor
quantise it once (:class:`TokensOnce`).

Shapes: M tokens of all samples, ``in`` and ``out`` features.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from library.errors import SettingsError
from library.kernel_trial import has_triton
from library.memory.fp8_trial import kernels_on
from library.memory.quantised import QuantisedLinear

logger = logging.getLogger(__name__)

E4M3 = torch.float8_e4m3fn
_LARGEST = 448.0  # of e4m3
_SMALLEST_SCALE = 2.0**-100  # of rows of zeros; its inverse is still a number in bfloat16
_CAPABILITY = (8, 9)
_MULTIPLE = 16  # of both sides of a weight, for the hardware's loads


def power_of_two_scale(largest: Tensor) -> Tensor:
    """Returns the smallest powers of two by which magnitudes divided are within e4m3; float32, same shape.

    Args:
        largest: magnitudes of any float dtype, 0 or more; an infinite one gives an infinite scale.
    """
    wanted = (largest.float() / _LARGEST).clamp(min=_SMALLEST_SCALE)
    # Rounded up to a power of two: a carry out of the mantissa steps the exponent up, then the mantissa is cut off.
    return ((wanted.view(torch.int32) + 0x007FFFFF) & 0x7F800000).view(torch.float32)


def quantise_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a matrix (R,C) as e4m3 codes (R,C), and each row's scale (R,1) float32."""
    largest = torch.linalg.vector_norm(matrix, math.inf, dim=1, keepdim=True)
    scale = power_of_two_scale(largest)
    return (matrix * scale.reciprocal().to(matrix.dtype)).to(E4M3), scale


def scaled_product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns (a * scale_a) (b * scale_b)' in ``dtype``, multiplied in fp8 and summed in float32.

    Args:
        a: (M,K) e4m3 codes, contiguous.
        b: (N,K) e4m3 codes, contiguous.
        scale_a: (M,1) float32.
        scale_b: (1,N) float32.
        dtype: of the result; the hardware wants bfloat16.

    Returns:
        (M,N).
    """
    return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=True)


def _kernels_for(tensor: Tensor) -> ModuleType | None:
    """Returns the module of Triton kernels where they can do the work; they want memory, which stand-ins have none of."""
    if tensor.is_cuda and type(tensor) is Tensor and not torch.compiler.is_compiling():
        return kernels_on(tensor.get_device())
    return None


def _rows_in_fp8(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns codes (M,C) and scales (M,1) of ``x`` (...,C), or of ``x`` * ``factor`` (C,) float32, powers of two."""
    rows = x.reshape(-1, x.shape[-1])
    kernels = _kernels_for(rows) if x.dtype == torch.bfloat16 else None
    if kernels is not None:
        return kernels.quantise_rows(rows, factor)
    return quantise_rows(rows if factor is None else rows * factor.to(rows.dtype))


def _transposed(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns codes (in,out) of (out,in) ones, contiguous, and a scale of 1 for each of their rows (1,in) float32."""
    kernels = _kernels_for(codes)
    if kernels is not None:
        return kernels.transpose(codes)
    return codes.t().contiguous(), torch.ones(1, codes.shape[1], dtype=torch.float32, device=codes.device)


class TokensOnce:
    """Quantises a tensor that several Linears are given one after the other, when the first of them asks.

    Codes are kept until the last one has come, and no longer. One that comes with another tensor, or with one that was
    written to in between, has its own quantised.
    """

    def __init__(self, num_linears: int) -> None:
        """Takes how many Linears ask for each tensor."""
        self._num_linears = num_linears
        self._tensor: Callable[[], Tensor | None] = lambda: None
        self._version = -1
        self._made: tuple[Tensor, Tensor] | None = None
        self._num_waiting = 0

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns codes (M,C) and scales (M,1) of ``x`` (...,C)."""
        if x.is_inference():  # such a tensor does not say when it was changed
            return _rows_in_fp8(x)
        made = self._made
        if made is None or self._tensor() is not x or self._version != x._version:
            self._made = None  # its memory may be what the new ones get
            made = _rows_in_fp8(x)
            self._tensor, self._version, self._num_waiting = weakref.ref(x), x._version, self._num_linears
        self._num_waiting -= 1
        self._made = made if self._num_waiting else None
        return made


class Fp8Linear(QuantisedLinear):
    """A Linear whose weight is e4m3 codes times a scale for each output channel.

    Attributes:
        weight: (out,in) float8_e4m3fn.
        weight_scale: (out,) float32, powers of two.
        fast: multiply in fp8.
    """

    weight_scale: Tensor
    _tokens_once: TokensOnce | None = None

    def __init__(self, weight: Tensor, weight_scale: Tensor, fast: bool = False) -> None:
        """Takes codes and scales; :meth:`of` makes them.

        Args:
            weight: (out,in) float8_e4m3fn.
            weight_scale: (out,) float32, powers of two.
            fast: multiply in fp8; has no effect on a matrix with a side that is no multiple of 16, which the hardware
                cannot take (the real models have none).
        """
        super().__init__(weight.shape[1], weight.shape[0])
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.fast = fast and all(side % _MULTIPLE == 0 for side in weight.shape)

    @classmethod
    def of(cls, weight: Tensor, fast: bool = False) -> Fp8Linear:
        """Returns the Linear for a weight (out,in) of any float dtype, on the weight's device."""
        codes, scale = quantise_rows(weight)
        return cls(codes, scale[:, 0].contiguous(), fast)

    def codes(self) -> tuple[Tensor, ...]:
        """Returns codes and scales."""
        return self.weight, self.weight_scale

    def weight_of(self, codes: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Returns the weight (out,in) that codes and scales stand for, in ``dtype``, in new memory."""
        weight, scale = codes
        # Scaled in place: one temporary of the weight's size, not two.
        return weight.to(dtype).mul_(scale.to(dtype)[:, None])

    def share_input(self, others: Sequence[QuantisedLinear]) -> None:
        """Has the input quantised once for itself and for Linears that are given the same tensor right after it."""
        fast = [linear for linear in (self, *others) if isinstance(linear, Fp8Linear) and linear.fast]
        if len(fast) > 1:
            once = TokensOnce(len(fast))
            for linear in fast:
                linear._tokens_once = once

    def product(self, x: Tensor, *operands: Tensor) -> Tensor:
        """Returns x W' (...,out) in the dtype of ``x`` (...,in); bfloat16 where it is fast."""
        if not self.fast:
            return super().product(x, *operands)
        codes, scale = operands
        # A compiler sees for itself that one tensor is quantised twice.
        once = None if torch.compiler.is_compiling() else self._tokens_once
        tokens, token_scale = _rows_in_fp8(x) if once is None else once(x)
        product = scaled_product(tokens, codes, token_scale, scale[None, :], x.dtype)  # (M,out)
        # As a Linear's output it is no view to autograd, so that a LoRA may add its part in place.
        return torch.ops.aten._unsafe_view(product, (*x.shape[:-1], codes.shape[0]))

    def input_gradient(self, gradient: Tensor, *operands: Tensor) -> Tensor:
        """Returns ``gradient`` W (...,in) for a gradient (...,out), multiplied as :meth:`product` does."""
        if not self.fast:
            return super().input_gradient(gradient, *operands)
        codes, scale = operands
        tokens, token_scale = _rows_in_fp8(gradient, scale)  # (M,out)
        transposed, ones = _transposed(codes)
        product = scaled_product(tokens, transposed, token_scale, ones, gradient.dtype)  # (M,in)
        return product.view(*gradient.shape[:-1], codes.shape[1])


def require_fp8_products(device: torch.device) -> None:
    """Checks that a device multiplies in fp8, by its kind and by doing it once, forward and backward.

    Raises:
        SettingsError: it does not.
    """
    instead = "leave --fp8_fast out: fp8 weights work without it on every device"
    if device.type != "cuda" or torch.version.hip is not None:
        what = "the GPU is no NVIDIA one" if device.type == "cuda" else f"this run computes on {device.type}"
        raise SettingsError(f"--fp8_fast needs an NVIDIA GPU that multiplies in fp8, and {what}; {instead}")
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        raise SettingsError(
            f"--fp8_fast: {torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]} and"
            f" does not multiply in fp8, which begins with 8.9 (RTX 40, L4, H100); {instead}"
        )
    try:
        x = torch.ones(5, 32, dtype=torch.bfloat16, device=device, requires_grad=True)
        Fp8Linear.of(torch.ones(48, 32, dtype=torch.bfloat16, device=device), fast=True)(x).sum().backward()
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(
            f"--fp8_fast: PyTorch {torch.__version__} cannot multiply in fp8 on"
            f" {torch.cuda.get_device_name(device)} ({reason}); use a newer PyTorch, or {instead}"
        ) from error
    if kernels_on(x.get_device()) is not None:
        logger.info("Quantising for --fp8_fast: Triton kernels")
    elif not has_triton():
        logger.info("Quantising for --fp8_fast: torch's operations; with the package triton steps would be faster")
