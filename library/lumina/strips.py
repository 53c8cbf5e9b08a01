"""Convolutions of large pictures strip by strip: the same sums, with a bounded workspace.

cuDNN's fast kernels for half precision want channels last. Given a picture as PyTorch has it, they make a copy of all of
it in their order, and one of the result, in a workspace that no count of tensors shows: by these copies' sizes 1 GiB for the
decoder's largest layer at 1024 x 1024 pixels, which fits what whole runs were seen to need beyond their tensors
(docs/benchmarks/log.md). Strip by strip it is as much as a strip has.

Shapes: B batch, C channels, H W height and width of the layer's input, K kernel side.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIP_BYTES = 64 * 2**20
"""Of a strip's input and output together: long enough that its kernels fill a GPU."""


def can_be_cut(convolution: nn.Conv2d) -> bool:
    """Whether :func:`in_strips` knows a layer's ways: it pads with zeros by a number, so that no row of the result sees
    padding alone, and does not dilate."""
    return (
        convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
        and int(convolution.padding[0]) < convolution.kernel_size[0]
        and convolution.dilation == (1, 1)
    )


def convolution_in_strips(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """Returns ``convolution(x)`` of x (B,C,H,W), in strips where it is large and on a GPU; takes no gradients then."""
    if not x.is_cuda:  # elsewhere kernels take a picture as it is
        return convolution._conv_forward(x, convolution.weight, convolution.bias)
    return in_strips(convolution, x, STRIP_BYTES)


def in_strips(convolution: nn.Conv2d, x: Tensor, strip_bytes: int) -> Tensor:
    """Returns ``convolution(x)``, computed in strips of rows of about ``strip_bytes`` of input and output.

    All strips are of one size, so that a kernel is looked for once: the last one begins early enough for that, and
    computes some rows again.

    Args:
        convolution: one that :func:`can_be_cut`.
        x: (B,C,H,W).
        strip_bytes: about so much; a strip has one row of the result at least.
    """
    (side, _), (step, _) = convolution.kernel_size, convolution.stride
    above, beside = (int(padding) for padding in convolution.padding)
    batch, _, height, width = x.shape
    rows = (height + 2 * above - side) // step + 1
    columns = (width + 2 * beside - convolution.kernel_size[1]) // convolution.stride[1] + 1
    num_bytes = (x.numel() + batch * convolution.out_channels * rows * columns) * x.element_size()
    strip_rows = math.ceil(rows / max(1, math.ceil(num_bytes / strip_bytes)))
    if strip_rows >= rows:
        return convolution._conv_forward(x, convolution.weight, convolution.bias)
    out = x.new_empty(batch, convolution.out_channels, rows, columns)
    for begin in range(0, rows, strip_rows):
        begin = min(begin, rows - strip_rows)
        first = begin * step - above
        last = first + (strip_rows - 1) * step + side
        strip = x[:, :, max(first, 0) : min(last, height)]
        strip = F.pad(strip, (0, 0, max(-first, 0), max(last - height, 0)))
        out[:, :, begin : begin + strip_rows] = torch.conv2d(
            strip, convolution.weight, convolution.bias, convolution.stride, (0, beside), groups=convolution.groups
        )
    return out
