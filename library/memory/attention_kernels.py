"""Attention by different programs, each under the one contract, with what each of them needs.

The contract (``AttentionFn``): queries (B,S,A,E), keys and values (B,S,K,E) where K divides A, a key mask (B,S) bool
with True = real token, or None where nothing is padded; returns (B,S,A,E) = softmax(q k' / sqrt(E)) v in the queries'
dtype. The real tokens of a sample come first and its padding behind them. A caller that has no padding must give None:
any mask rules out PyTorch's flash kernel. Rows of padded queries are defined and finite, as are their gradients, but
meaningless. A function may also have a method ``of_scaled_queries``: the same for queries that carry 1 / sqrt(E) already,
which the model prefers.

**Variable-length kernels without packing.** These kernels take rows of tokens and the bounds of sequences among them,
and leave what lies outside all sequences uninitialised. Packing the real tokens would need their number on the host,
which would wait for the device. As padding lies behind the real tokens, there is nothing to pack: the padded batch,
seen as B*S rows, already is a row of 2B sequences [real tokens of sample 0 | its padding | real tokens of sample 1 | ...].
The padding of a sample attends to itself, which costs next to nothing and leaves no row and no gradient undefined. Only
the bounds depend on data, and those are read on the device. A sample without padding has an empty second sequence.

B batch, S tokens, A heads, K key/value heads, E head dimension.
"""

from __future__ import annotations

import importlib
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from library.memory.cpu_attention import cpu_attention, is_faster_than_sdpa
from library.memory.recompute import hidden_from_recomputation

AttentionFn = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
T = TypeVar("T")

_HALF = (torch.bfloat16, torch.float16)
_FLEX_BLOCK = 128  # tokens; flex_attention skips whole blocks of padding


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


def _make_cudnn() -> AttentionFn:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        mask = None if key_mask is None else key_mask[:, None, None, :]  # (B,1,1,S)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            grouped = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)

    return cudnn_attention


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


# ---- what depends on the mask ----


class OncePerMask(Generic[T]):
    """Makes something from a key mask once, and gives the same to all blocks that ask with the same mask.

    All blocks of a forward pass, and their recomputation, are given one and the same tensor.
    """

    def __init__(self, make: Callable[[Tensor], T]) -> None:
        self._make = make
        self._mask: Callable[[], Tensor | None] = lambda: None
        self._version = -1
        self._made: T | None = None

    def __call__(self, key_mask: Tensor) -> T:
        """Returns what ``make`` makes of the mask (B,S)."""
        # In a compiled block it is a part of the graph; a tensor of inference mode does not say when it was changed.
        if torch.compiler.is_compiling() or key_mask.is_inference():
            return self._make(key_mask)
        if self._made is None or self._mask() is not key_mask or self._version != key_mask._version:
            with hidden_from_recomputation():  # whether it is made here depends on what came before
                self._made = self._make(key_mask)
            self._mask, self._version = weakref.ref(key_mask), key_mask._version
        return self._made


def sequence_bounds(key_mask: Tensor) -> Tensor:
    """Returns where sequences begin and end in the B*S rows of a padded batch, without waiting for the device.

    Args:
        key_mask: (B,S) bool, the real tokens of a sample first.

    Returns:
        (2B + 1,) int32, not falling: 0, end of sample 0's real tokens, begin of sample 1, ... , B*S.
    """
    batch, length = key_mask.shape
    begins = torch.arange(0, batch * length, length, dtype=torch.int32, device=key_mask.device)
    ends = begins + key_mask.sum(dim=1, dtype=torch.int32)
    return F.pad(torch.stack([begins, ends], dim=1).flatten(), (0, 1), value=batch * length)


def by_sequences(over_sequences: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]) -> AttentionFn:
    """Returns attention by a variable-length kernel.

    Args:
        over_sequences: (queries (R,A,E), keys (R,K,E), values (R,K,E), bounds of sequences (N+1,) int32, longest
            possible sequence) -> (R,A,E).
    """
    bounds_of = OncePerMask(sequence_bounds)

    def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        batch, length = q.shape[:2]
        if key_mask is None:
            bounds = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=q.device)
        else:
            bounds = bounds_of(key_mask)
        rows = over_sequences(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bounds, length)
        return rows.unflatten(0, (batch, length))

    return attention


def flex_block_mask(key_mask: Tensor) -> Any:
    """Returns the mask (B,S) bool as flex_attention's ``BlockMask``: blocks of keys that are all real, partly, or not.

    Made from the mask directly: torch's ``create_block_mask`` writes out an S x S matrix of each sample first.
    """
    from torch.nn.attention.flex_attention import BlockMask

    batch, length = key_mask.shape
    blocks = -(-length // _FLEX_BLOCK)
    tokens = F.pad(key_mask, (0, blocks * _FLEX_BLOCK - length)).unflatten(1, (blocks, _FLEX_BLOCK))
    whole = tokens.all(dim=-1)  # (B,blocks)
    partly = tokens.any(dim=-1) & ~whole

    def in_order(chosen: Tensor) -> tuple[Tensor, Tensor]:
        count = chosen.sum(dim=-1, dtype=torch.int32)[:, None, None].expand(batch, 1, blocks)
        order = torch.argsort(chosen.to(torch.int32), dim=-1, descending=True, stable=True).to(torch.int32)
        return count.contiguous(), order[:, None, None].expand(batch, 1, blocks, blocks).contiguous()

    def is_real(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key_mask[sample, key]

    return BlockMask.from_kv_blocks(
        *in_order(partly), *in_order(whole), BLOCK_SIZE=_FLEX_BLOCK, mask_mod=is_real, seq_lengths=(length, length)
    )


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
