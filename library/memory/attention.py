"""Which kernel computes attention in a run: ``--attn_mode`` to a callable, chosen outside the model and tried at the start.

The model is given one callable with the contract of :data:`AttentionFn` (see ``attention_kernels``). Behind it stand two
kernels: one for batches without padding, and one for batches whose captions differ in length (ragged ones).

``auto`` takes the first of these that is exact and can do the work, which is the expected order of speed:

1. FlashAttention 3, on Hopper GPUs where it is installed: made for them, takes ragged batches too.
2. Where ``scaled_dot_product_attention`` picks cuDNN by itself (Hopper GPUs and data centres' Blackwell ones), that; and
   cuDNN for ragged batches, too, with padding marked in further channels. FlashAttention 2, and torch's ``varlen_attn``
   that is built on it, take 1.6 times as long there.
3. FlashAttention 2, where it is installed.
4. Without it ``scaled_dot_product_attention``, whose flash kernel needs nothing installed; and for ragged batches torch's
   ``varlen_attn``, as any mask would rule that flash kernel out.
5. On a CPU with bf16 units that torch's kernel leaves idle, our own products in bf16 (``cpu_attention``).
6. Where that cannot run (other CPUs, float32, GPUs before Ampere, MPS), ``scaled_dot_product_attention`` with a mask. GPUs
   before Ampere have no flash kernel, and no other one shares heads; they get a function that expands keys and values.

Nothing here falls back without a word: a kernel that was asked for and cannot do the work ends the run at start-up, and
what was chosen is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import SettingsError
from library.memory.attention_kernels import (
    KERNELS,
    AttentionFn,
    Kernel,
    Workload,
    sdpa_attention,
    sdpa_kernel_name,
    sdpa_without_sharing,
    shares_heads,
)
from library.memory.half_attention import in_halves
from library.memory.settings import AttentionSettings

__all__ = ["AttentionChoice", "AttentionFn", "Workload", "choose_attention", "sdpa_attention"]

logger = logging.getLogger(__name__)

# Mode -> (kernels for batches without padding, kernels for ragged batches), each in the order of preference.
_ORDERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "auto": (("flash3", "flash2", "cpu", "sdpa"), ("flash3", "flash2", "varlen", "cpu", "sdpa")),
    "sdpa": (("sdpa",), ("sdpa",)),
    # Padding takes channels, of which cuDNN may have none to spare; what stands in for it is logged.
    "cudnn": (("cudnn",), ("cudnn", "cudnn_wide", "varlen", "sdpa")),
    "flash": (("flash3", "flash2"), ("flash3", "flash2")),
    "varlen": (("sdpa",), ("varlen",)),
    "flex": (("flex",), ("flex",)),
    "sage": (("sage",), ("sage",)),
}

_AUTO_WITH_CUDNN = (("flash3", "sdpa"), ("flash3", "cudnn", "cudnn_wide", "flash2", "varlen", "sdpa"))

_TRIED_LENGTHS = (200, 131)  # tokens: a ragged batch with a whole and a partial block of 128


@dataclass(frozen=True)
class AttentionChoice:
    """How a run computes attention.

    Attributes:
        function: for the model, whose tensors are float32 where a run's attention is in fp16.
        equal: name of the kernel for batches without padding, a key of ``KERNELS``.
        ragged: name of the kernel for batches whose captions differ in length.
        description: both, for the log.
    """

    function: AttentionFn
    equal: str
    ragged: str
    description: str


def choose_attention(settings: AttentionSettings, work: Workload, precision_flag: str) -> AttentionChoice:
    """Returns the callable that ``--attn_mode`` names, tried on the run's device, and logs what it is.

    Args:
        settings: ``--attn_mode`` and the flags that say the same.
        work: the run's device, dtype and head sizes.
        precision_flag: the program's flag for bf16, for messages.

    Raises:
        SettingsError: what was asked for is not installed or cannot do the work.
    """
    takes_cudnn = settings.mode == "auto" and _prefers_cudnn(work)
    for_equal, for_ragged = _AUTO_WITH_CUDNN if takes_cudnn else _ORDERS[settings.mode]
    made: dict[str, AttentionFn] = {}
    equal = _first_that_works(for_equal, work, False, made, settings, precision_flag)
    ragged = _first_that_works(for_ragged, work, True, made, settings, precision_flag)
    names = (_describe(equal, work, ragged=False), _describe(ragged, work, ragged=True))
    description = names[0] if names[0] == names[1] else f"{names[0]}; where captions differ in length {names[1]}"
    logger.info("Attention: %s", description)
    function = made[equal] if equal == ragged else _by_padding(made[equal], made[ragged])
    if work.dtype == torch.float16:
        function = in_halves(function)
    return AttentionChoice(function, equal, ragged, description)


def _prefers_cudnn(work: Workload) -> bool:
    """Whether torch holds cuDNN's kernel for the fastest on this GPU."""
    if work.device.type != "cuda" or torch.version.hip is not None or KERNELS["cudnn"].unsuitable(work):
        return False
    return sdpa_kernel_name(work, ragged=False) == "cudnn"


def _by_padding(equal: AttentionFn, ragged: AttentionFn) -> AttentionFn:
    def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        return equal(q, k, v, None) if key_mask is None else ragged(q, k, v, key_mask)

    return attention


def _first_that_works(
    names: Sequence[str],
    work: Workload,
    ragged: bool,
    made: dict[str, AttentionFn],
    settings: AttentionSettings,
    precision_flag: str,
) -> str:
    """Returns the first kernel that can do the work; puts its function into ``made``.

    Raises:
        SettingsError: none can.
    """
    reasons: dict[str, list[str]] = {}
    for name in names:
        kernel = KERNELS[name]
        reason = kernel.unsuitable(work)
        if reason is None:
            if name not in made and kernel.is_compiled:
                logger.info("Attention: trying %s, which is compiled first; that takes up to a minute", kernel.label)
            reason = _made(name, work, made) or (
                failure_of(kernel, made[name], work, ragged) if kernel.is_tried else None
            )
            if reason is None:
                return name
            # Meant for this device and yet of no use: worth a line also where another kernel stands in.
            where = " where captions differ in length" if ragged else ""
            logger.warning("Attention: %s cannot be used%s: %s", kernel.label, where, reason)
        reasons.setdefault(reason, []).append(kernel.label)
    told = "; ".join(f"{' and '.join(labels)} cannot be used: {reason}" for reason, labels in reasons.items())
    remedy = "leave it out, and the fastest exact way that runs here is taken"
    if work.dtype == torch.float32 and work.device.type == "cuda" and all(KERNELS[name].half_only for name in names):
        remedy = f"add {precision_flag}, or {remedy}"
    raise SettingsError(f"{settings.given_as}: {told}; {remedy}")


def _made(name: str, work: Workload, made: dict[str, AttentionFn]) -> str | None:
    """Puts a kernel's function into ``made`` and returns None, or what goes wrong, such as with a package's version."""
    if name not in made:
        try:
            needs_own_heads = name == "sdpa" and not shares_heads(work)
            made[name] = sdpa_without_sharing if needs_own_heads else KERNELS[name].make()
        except Exception as error:  # whatever another package raises: that it cannot run is the answer
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            return f"it does not go with this torch ({reason})"
    return None


def failure_of(kernel: Kernel, function: AttentionFn, work: Workload, ragged: bool) -> str | None:
    """Returns what goes wrong where a small batch is computed forward, and backward in training; None = nothing.

    Args:
        kernel: what ``function`` is.
        function: tried on the run's device, with its dtype and head sizes.
        work: of the run.
        ragged: with a mask.
    """
    length = max(_TRIED_LENGTHS)
    lengths = torch.tensor(_TRIED_LENGTHS if ragged else (length, length))
    real = torch.arange(length) < lengths[:, None]  # (B,S)
    mask = real.to(work.device) if ragged else None
    generator = torch.Generator().manual_seed(0)
    heads = (work.num_heads, work.num_kv_heads, work.num_kv_heads, work.num_heads)
    q, k, v, weights = (
        torch.randn((2, length, count, work.head_dim), generator=generator).to(work.device, work.dtype)
        for count in heads
    )
    weights = weights * real.to(work.device)[:, :, None, None]

    def results(attention: AttentionFn, dtype: torch.dtype) -> list[Tensor]:
        inputs = [tensor.detach().to(dtype).requires_grad_(work.training) for tensor in (q, k, v)]
        with torch.set_grad_enabled(work.training):
            # Rows of padding are meaningless, but must be finite: a NaN would live on through a weight of 0.
            weighted = attention(inputs[0], inputs[1], inputs[2], mask) * weights.to(dtype)
            gradients = torch.autograd.grad(weighted.sum(), inputs) if work.training else ()
        return [weighted.detach(), *gradients]

    try:
        found = results(function, work.dtype)
    except Exception as error:  # whatever a compiler or another package raises: that it cannot run is the answer
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return f"a try ended with an error ({reason})"
    for ours, expected in zip(found, results(sdpa_attention, torch.float32), strict=True):
        off = float((ours.float() - expected).norm() / expected.norm())
        if not off <= kernel.tolerance:  # NaN as well
            return f"a try gave wrong results (off by {off:.1%})"
    return None


def _describe(name: str, work: Workload, ragged: bool) -> str:
    label = KERNELS[name].label
    return f"{label} ({sdpa_kernel_name(work, ragged)} kernel)" if name == "sdpa" else label
