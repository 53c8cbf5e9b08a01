"""How attention is computed: one callable, one contract, chosen outside the model.

The contract (``AttentionFn``): queries (B,S,A,E), keys and values (B,S,K,E) where K divides A, a key mask (B,S) bool
with True = real token, or None where nothing is padded; returns (B,S,A,E) = softmax(q k' / sqrt(E)) v in the queries'
dtype. A caller that has no padding must give None: any mask rules out PyTorch's flash kernel. Rows of padded queries
are defined but meaningless.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

AttentionFn = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """Returns attention by ``scaled_dot_product_attention``, which picks flash, memory-efficient or plain kernels.

    Grouped key/value heads are shared inside the kernel. The exceptions are CUDA with a mask or in float32: only flash
    kernels share heads there, and they take neither, so what is left would write out the whole S x S matrix. Keys and
    values are expanded instead.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B,heads,S,E)
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and (key_mask is not None or q.dtype == torch.float32):
        shared_by = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared_by, dim=1), v.repeat_interleave(shared_by, dim=1)
        grouped = False
    mask = None if key_mask is None else key_mask[:, None, None, :]  # (B,1,1,S)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)
