"""Random data with what makes quantising hard in real models: rows of different size, heavy tails, outlier channels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

HAS_CPU_PRODUCTS = TorchVersion(torch.__version__) >= (2, 13)
"""Whether torch multiplies in fp8 on a CPU with a scale for each row, as a GPU does; 2.11 asserts that there is one."""
needs_cpu_products = pytest.mark.skipif(
    not HAS_CPU_PRODUCTS, reason=f"torch {torch.__version__} has no fp8 products with row scales on a CPU"
)


def realistic_weight(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    """Returns (out,in) float32: Student-t with 5 degrees of freedom, rows about 0.02 and lognormally different."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(out_features, in_features, generator=generator)
    chi_square = torch.randn(5, out_features, in_features, generator=generator).square().sum(0)
    rows = 0.02 * torch.exp(0.7 * torch.randn(out_features, 1, generator=generator))
    return rows * normal / (chi_square / 5).sqrt()


def realistic_tokens(num_tokens: int, features: int, seed: int = 1) -> Tensor:
    """Returns (num_tokens,features) float32: one channel in 64 is 30 times as large as the others."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(num_tokens, features, generator=generator)
    tokens[:, ::64] *= 30
    return tokens


def realistic_gradient(num_tokens: int, features: int, seed: int = 2) -> Tensor:
    """Returns (num_tokens,features) float32: about 1e-4, tokens and channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(
        1.5 * torch.randn(num_tokens, 1, generator=generator) + torch.randn(features, generator=generator)
    )
    return 1e-4 * sizes * torch.randn(num_tokens, features, generator=generator)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Returns |found - expected| / |expected|, both as vectors."""
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


def channel_error(found: Tensor, expected: Tensor) -> float:
    """Returns the mean over output channels (the rows) of each channel's own relative error.

    Of all numbers together the large channels' errors are nearly all; what becomes of the others shows here.
    """
    found, expected = found.detach().float(), expected.detach().float()
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).mean())


def emulated_product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns what ``library.memory.fp8.scaled_product`` is defined as, in float32 and rounded once."""
    return ((a.float() @ b.float().t()) * scale_a * scale_b).to(dtype)
