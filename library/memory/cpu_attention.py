"""Attention in bfloat16 for CPUs whose bfloat16 matrix units torch's own kernel leaves idle.

On a CPU without AMX, torch's flash attention converts bfloat16 to float32 and multiplies at float32's speed, which is a
quarter of what AVX512-BF16 gives. Here each group of heads that shares a key/value head is a few plain matrix products,
cut into rows so that the scores stay in the cache; they are never all in memory.

A matrix product rounds its result to bfloat16, which would spoil large scores. So what is subtracted from a score before
the exponential is taken (the row's maximum in forward, its log-sum in backward) goes into the product as further columns,
in three parts that together have float32's precision: (q' k') / sqrt(E) = q k / sqrt(E) - m, summed in float32 and rounded
once, when it is small where it matters. A mask is one more such column.

Shapes: B batch, S tokens, A heads, K key/value heads, G = A / K heads of a group, E head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cpu_attention", "is_faster_than_sdpa"]

_MORE = 8  # further columns: three parts of what is subtracted, one for the mask, the rest zero (rows stay aligned)
_SCORES = 4 * 2**20  # numbers of one chunk of scores: 8 MiB
_MASKED = -1e6  # divided by sqrt(E), its exponential is 0


def is_faster_than_sdpa() -> bool:
    """Returns whether this CPU has bfloat16 units that ``scaled_dot_product_attention`` does not use."""
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def cpu_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """Returns softmax(q k' / sqrt(E)) v, (B,S,A,E) bfloat16; for the arguments see :mod:`library.memory.attention`.

    Every row must have a key that is not masked.
    """
    return _attention(q, k, v, key_mask)[0]


@torch.library.custom_op("lumina::cpu_attention", mutates_args=(), device_types="cpu")
def _attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype)
    log_sums = torch.empty(q.shape[:-1], dtype=torch.float32)  # (B,S,A)
    scale = q.shape[-1] ** -0.5
    for sample, head, group in _groups(q, k):
        keys = _keys(k[sample, :, head], key_mask, sample).t()  # (E+8,S)
        values = v[sample, :, head].contiguous()  # (S,E)
        for rows in _chunks(q, k):
            queries = _queries(q[sample, rows, group])  # (R,E+8)
            scores = queries.new_empty(len(queries), keys.shape[1])
            largest = _scaled_product(queries, keys, scale, scores).amax(dim=-1).float()
            _subtract(queries, largest / scale)
            _scaled_product(queries, keys, scale, scores).exp_()
            sums = scores.sum(dim=-1, dtype=torch.float32)
            result = (scores @ values).float().div_(sums[:, None])
            place = q[sample, rows, group].shape
            out[sample, rows, group] = result.view(place).to(q.dtype)
            log_sums[sample, rows, group] = (largest + sums.log()).view(place[:-1])
    return out, log_sums


@torch.library.custom_op("lumina::cpu_attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, out: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    of_q, of_k, of_v = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    for sample, head, group in _groups(q, k):
        plain_keys = k[sample, :, head].contiguous()  # (S,E)
        keys = _keys(k[sample, :, head], key_mask, sample).t()  # (E+8,S)
        values = _keys(v[sample, :, head], None, sample).t()  # (E+8,S)
        sum_k, sum_v = (torch.zeros(k.shape[1], k.shape[3]) for _ in range(2))
        for rows in _chunks(q, k):
            queries = _queries(q[sample, rows, group])  # (R,E+8)
            _subtract(queries, log_sums[sample, rows, group].reshape(-1) / scale)
            weights = queries.new_empty(len(queries), keys.shape[1])
            _scaled_product(queries, keys, scale, weights).exp_()  # (R,S), rows sum to 1
            given = gradient[sample, rows, group]
            products = given.float().mul_(out[sample, rows, group]).sum(dim=-1)
            padded = F.pad(given, (0, _MORE)).flatten(0, 1)  # (R,E+8)
            _subtract(padded, products.flatten())
            of_scores = torch.mm(padded, values).mul_(weights)  # weights * (gradient v - products)
            sum_v += weights.t() @ padded[:, : q.shape[-1]]
            sum_k += of_scores.t() @ queries[:, : q.shape[-1]]
            of_q[sample, rows, group] = (of_scores @ plain_keys).float().mul_(scale).view(given.shape).to(q.dtype)
        of_k[sample, :, head], of_v[sample, :, head] = sum_k.mul_(scale).to(k.dtype), sum_v.to(v.dtype)
    return of_q, of_k, of_v


def _groups(q: Tensor, k: Tensor) -> Iterator[tuple[int, int, slice]]:
    """Yields sample, key/value head and its group of heads."""
    size = q.shape[2] // k.shape[2]
    for sample in range(q.shape[0]):
        for head in range(k.shape[2]):
            yield sample, head, slice(head * size, (head + 1) * size)


def _chunks(q: Tensor, k: Tensor) -> list[slice]:
    """Returns slices of query tokens whose scores of one group fit the cache, of about equal length."""
    length, size = q.shape[1], q.shape[2] // k.shape[2]
    count = max(1, math.ceil(length * size * k.shape[1] / _SCORES))
    step = math.ceil(length / count)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _keys(x: Tensor, key_mask: Tensor | None, sample: int) -> Tensor:
    """Returns keys or values (S,E+8) with the columns that meet those of :func:`_subtract` and the mask."""
    width = x.shape[-1]
    padded = F.pad(x, (0, _MORE))
    padded[:, width : width + 3] = 1
    if key_mask is not None:
        padded[:, width + 3] = torch.where(key_mask[sample], 0.0, _MASKED).to(x.dtype)
    return padded


def _scaled_product(queries: Tensor, keys: Tensor, scale: float, out: Tensor) -> Tensor:
    """Returns ``out``, filled with the scaled product; scaled before it is rounded."""
    return torch.addmm(out, queries, keys, beta=0, alpha=scale, out=out)


def _queries(x: Tensor) -> Tensor:
    """Returns the queries (rows * G, E+8) of a group (rows,G,E), with nothing subtracted."""
    width = x.shape[-1]
    padded = F.pad(x, (0, _MORE)).flatten(0, 1)
    padded[:, width + 3] = 1
    return padded


def _subtract(padded: Tensor, values: Tensor) -> None:
    """Makes the product of each row with keys smaller by a float32 value, given as three bfloat16 parts."""
    width = padded.shape[-1] - _MORE
    rest = values.neg()
    for column in range(width, width + 3):
        part = rest.to(padded.dtype)
        padded[:, column] = part
        rest = rest - part.float()


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@_backward.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, out: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))  # type: ignore[return-value]


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx, gradient: Tensor, _of_log_sums: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    return (*_backward(gradient, *ctx.saved_tensors), None)


_attention.register_autograd(_differentiate, setup_context=_save)
