"""Attention by different programs, each under the one contract, with what each of them needs.

The contract (``AttentionFn``): queries (B,S,A,E), keys and values (B,S,K,E) where K divides A, a key mask (B,S) bool
with True = real token, or None where nothing is padded; returns (B,S,A,E) = softmax(q k' / sqrt(E)) v in the queries'
dtype. The real tokens of a sample come first and its padding behind them. A caller that has no padding must give None:
any mask rules out PyTorch's flash kernel. Rows of padded queries are defined and finite, as are their gradients, but
meaningless. A function may also have a method ``of_scaled_queries``: the same for queries that carry 1 / sqrt(E) already,
which the model prefers.

How kernels are told of padding stands in ``attention_masks``.

B batch, S tokens, A heads, K key/value heads, E head dimension.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from library.memory.attention_masks import AttentionFn, OncePerMask, by_marks, by_sequences, flex_block_mask
from library.memory.cpu_attention import cpu_attention, is_faster_than_sdpa

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Workload:
    """What attention has to do in a run."""

    device: torch.device
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    training: bool


# ---- torch's own ----


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """Returns attention by ``scaled_dot_product_attention``, which picks flash, memory-efficient or plain kernels.

    Grouped key/value heads are shared inside the kernel. The exceptions are CUDA with a mask or in float32: only flash
    kernels share heads there, and they take neither, so what is left would write out the whole S x S matrix. Keys and
    values are expanded instead.
    """
    q, k, v, mask, grouped = _for_sdpa(q, k, v, key_mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)


def sdpa_without_sharing(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """Returns what :func:`sdpa_attention` does, with keys and values always expanded: for GPUs without flash kernels."""
    q, k, v, mask, _ = _for_sdpa(q, k, v, key_mask, shares_heads=False)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def shares_heads(work: Workload) -> bool:
    """Whether torch has a kernel for the device that shares heads without writing out the whole S x S matrix."""
    if work.device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(work.device) >= (8, 0)


def _for_sdpa(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, shares_heads: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool]:
    """Returns q, k, v as (B,heads,S,E), the mask as (B,1,1,S), and whether the kernel is to share heads."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    if grouped and (not shares_heads or (q.is_cuda and (key_mask is not None or q.dtype == torch.float32))):
        shared_by = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared_by, dim=1), v.repeat_interleave(shared_by, dim=1)
        grouped = False
    return q, k, v, None if key_mask is None else key_mask[:, None, None, :], grouped


def sdpa_kernel_name(work: Workload, ragged: bool) -> str:
    """Returns the name of the kernel that ``scaled_dot_product_attention`` picks for the work, such as ``flash``.

    Args:
        work: the run's device, dtype and head sizes.
        ragged: with a mask.
    """
    from torch.nn.attention import SDPBackend

    q, k, v = (
        torch.zeros((2, 256, heads, work.head_dim), device=work.device, dtype=work.dtype, requires_grad=work.training)
        for heads in (work.num_heads, work.num_kv_heads, work.num_kv_heads)
    )
    key_mask = torch.ones((2, 256), dtype=torch.bool, device=work.device) if ragged else None
    q, k, v, mask, grouped = _for_sdpa(q, k, v, key_mask, shares_heads(work))
    picked = SDPBackend(torch._fused_sdp_choice(q, k, v, mask, enable_gqa=grouped))
    return str(picked.name).removesuffix("_ATTENTION").lower()


def _make_cudnn(widens_values: bool = False) -> AttentionFn:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def unmasked(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            grouped = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped).transpose(1, 2)

    # Given a mask it takes 1.6 times as long, no less than varlen_attn does.
    return by_marks(unmasked, widens_values)


def _make_varlen() -> AttentionFn:
    from torch.nn.attention.varlen import varlen_attn

    # Newer versions of torch want to be told that heads are shared; the kernel of the older ones shares them unasked.
    grouping: dict[str, Any] = {}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        grouping["enable_gqa"] = True

    def over_sequences(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
        return _first(varlen_attn(q, k, v, bounds, bounds, longest, longest, **grouping))

    return by_sequences(over_sequences)


def _make_flex() -> AttentionFn:
    from torch.nn.attention.flex_attention import flex_attention

    def without_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])

    def with_mask(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Tensor:
        return flex_attention(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])

    # Not compiled it would write out the whole S x S matrix. Two functions, because each may be compiled eight times: for
    # the first sizes and for any others, with and without gradients, for one sample and for several.
    plain, masked = torch.compile(without_mask, fullgraph=True), torch.compile(with_mask, fullgraph=True)
    block_masks = OncePerMask(flex_block_mask)

    def flex(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        attended = plain(q, k, v) if key_mask is None else masked(q, k, v, block_masks(key_mask))
        return attended.transpose(1, 2)

    return flex


# ---- packages ----


def _make_flash(package: str) -> AttentionFn:
    flash = importlib.import_module(package)

    def over_sequences(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
        found = flash.flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest, max_seqlen_k=longest
        )
        return _first(found)

    ragged = by_sequences(over_sequences)

    def flash_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        return _first(flash.flash_attn_func(q, k, v)) if key_mask is None else ragged(q, k, v, key_mask)

    return flash_attention


def _first(found: Any) -> Tensor:
    """Returns the output; some versions give the logarithms of the softmax's sums beside it."""
    return found[0] if isinstance(found, tuple) else found


def _make_sage() -> AttentionFn:
    sage = importlib.import_module("sageattention")

    def over_sequences(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int) -> Tensor:
        # Its quantisation wants rows that lie close together, and values are a part of wider rows.
        return sage.sageattn_varlen(q, k.contiguous(), v.contiguous(), bounds, bounds, longest, longest)

    ragged = by_sequences(over_sequences)

    def sage_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        if key_mask is not None:
            return ragged(q, k, v, key_mask)
        return sage.sageattn(q, k.contiguous(), v.contiguous(), tensor_layout="NHD", is_causal=False)

    return sage_attention


# ---- what each of them needs ----


@dataclass(frozen=True)
class Kernel:
    """One way to compute attention.

    Attributes:
        label: for the log and for messages.
        make: returns the function; imports what it needs.
        package: what has to be installed, or None.
        install: how to get it.
        on_cuda: needs an NVIDIA or AMD GPU.
        min_capability: oldest NVIDIA GPU, as compute capability.
        max_capability: newest one, or None.
        half_only: takes bf16 and fp16 alone.
        max_head_dim: largest E; it must be divisible by 8 where ``half_only``.
        gradients_on: kinds of devices where it has gradients; None = all.
        tolerance: how far a result may be from the definition's, as a share of its norm.
        is_tried: whether it is tried out at start-up. torch's own choice always works.
        is_compiled: whether it is compiled when it is first run, which takes a while.
        lacking: returns what else of the work or the machine rules it out, or None.
    """

    label: str
    make: Callable[[], AttentionFn]
    package: str | None = None
    install: str = ""
    on_cuda: bool = True
    min_capability: tuple[int, int] = (8, 0)
    max_capability: tuple[int, int] | None = None
    half_only: bool = True
    max_head_dim: int = 256
    gradients_on: tuple[str, ...] | None = None
    tolerance: float = 0.05
    is_tried: bool = True
    is_compiled: bool = False
    lacking: Callable[[Workload], str | None] = lambda work: None

    def unsuitable(self, work: Workload) -> str | None:
        """Returns why it cannot do the work, as far as that can be told without running it; None = nothing is known."""
        device = work.device.type
        if work.training and self.gradients_on is not None and device not in self.gradients_on:
            return "it has no gradients" + (f" on {device}" if self.gradients_on else "")
        if self.on_cuda and device != "cuda":
            return f"it needs a CUDA device, and this run computes on {device}"
        if self.half_only and work.dtype not in _HALF:
            return f"it computes in bf16 or fp16, and this run in {str(work.dtype).removeprefix('torch.')}"
        if self.half_only and (work.head_dim % 8 or work.head_dim > self.max_head_dim):
            return (
                f"it takes head sizes that are multiples of 8 up to {self.max_head_dim}, and this model's is"
                f" {work.head_dim}"
            )
        if self.on_cuda and torch.version.hip is None:
            capability = torch.cuda.get_device_capability(work.device)
            if capability < self.min_capability or (self.max_capability and capability > self.max_capability):
                return f"it has no kernels for {torch.cuda.get_device_name(work.device)}"
        return self.lacking(work) or self._not_installed()

    def _not_installed(self) -> str | None:
        if self.package is None:
            return None
        try:
            importlib.import_module(self.package)
        except Exception as error:  # whatever a package raises that does not go with this torch or this GPU's driver
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            return f"it cannot be imported ({reason}; {self.install})"
        return None


KERNELS: dict[str, Kernel] = {
    "sdpa": Kernel(
        "torch's scaled_dot_product_attention", lambda: sdpa_attention, on_cuda=False, half_only=False, is_tried=False
    ),
    "cudnn": Kernel("cuDNN's attention", _make_cudnn),
    "cudnn_wide": Kernel("cuDNN's attention with wider values", lambda: _make_cudnn(widens_values=True)),
    "cpu": Kernel(
        "matrix products in bf16",
        lambda: cpu_attention,
        on_cuda=False,
        half_only=False,
        lacking=lambda work: (
            None
            if work.device.type == "cpu" and work.dtype == torch.bfloat16 and is_faster_than_sdpa()
            else "it is for bf16 on CPUs with AVX512-BF16 and without AMX"
        ),
    ),
    "flash3": Kernel(
        "FlashAttention 3",
        lambda: _make_flash("flash_attn_interface"),
        "flash_attn_interface",
        "it is built from the folder hopper of flash-attention's sources",
        min_capability=(9, 0),
        max_capability=(9, 9),
    ),
    "flash2": Kernel(
        "FlashAttention 2",
        lambda: _make_flash("flash_attn"),
        "flash_attn",
        "pip install flash-attn --no-build-isolation",
    ),
    "varlen": Kernel("torch's varlen_attn", _make_varlen),
    "flex": Kernel(
        "torch's flex_attention",
        _make_flex,
        on_cuda=False,
        half_only=False,
        gradients_on=("cuda",),
        is_compiled=True,
    ),
    "sage": Kernel(
        "SageAttention",
        _make_sage,
        "sageattention",
        "pip install sageattention",
        max_head_dim=128,
        gradients_on=(),
        tolerance=0.15,  # 8-bit queries and keys
    ),
}
"""Every way to compute attention, by name."""
