"""How attention is computed: one callable, one contract, chosen outside the model.

The contract (``AttentionFn``): queries (B,S,A,E), keys and values (B,S,K,E) where K divides A, a key mask (B,S) bool
with True = real token, or None where nothing is padded; returns (B,S,A,E) = softmax(q k' / sqrt(E)) v in the queries'
dtype. A caller that has no padding must give None: any mask rules out PyTorch's flash kernel. Rows of padded queries
are defined but meaningless.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

AttentionFn = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """Returns attention by ``scaled_dot_product_attention``, which picks flash, memory-efficient or plain kernels.

    Grouped key/value heads are shared inside the kernel. The one exception is CUDA with a mask: there sharing excludes
    every kernel but the one that writes out the whole S x S matrix, so keys and values are expanded instead.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B,heads,S,E)
    grouped = q.shape[1] != k.shape[1]
    if key_mask is None:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped).transpose(1, 2)
    if grouped and q.is_cuda:
        shared_by = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared_by, dim=1), v.repeat_interleave(shared_by, dim=1)
        grouped = False
    mask = key_mask[:, None, None, :]  # (B,1,1,S)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)
