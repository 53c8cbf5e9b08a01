from __future__ import annotations

import pytest
import torch

from library.memory.attention import sdpa_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("masked", [False, True])
def test_cuda_agrees_with_the_cpu_and_never_writes_out_the_scores(masked: bool) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 64, 6, 96), (2, 64, 2, 96), (2, 64, 2, 96)]
    tensors = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    mask = torch.arange(64) < torch.tensor([64, 40])[:, None] if masked else None
    expected = sdpa_attention(*(tensor.float() for tensor in tensors), mask)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        ours = sdpa_attention(*(tensor.cuda() for tensor in tensors), None if mask is None else mask.cuda())
    # bfloat16 has 8 bits: one rounding of probabilities and one of the result.
    torch.testing.assert_close(ours.cpu().float(), expected, atol=2e-2, rtol=2e-2)
