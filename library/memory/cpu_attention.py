"""Attention in bfloat16 for CPUs whose bfloat16 matrix units torch's own kernel leaves idle.

On a CPU without AMX, torch's flash attention converts bfloat16 to float32 and multiplies at float32's speed, which is a
quarter of what AVX512-BF16 gives. Here each group of heads that shares a key/value head is a few plain matrix products,
cut into rows so that the scores stay in the cache; they are never all in memory.

oneDNN applies an elementwise function to a product's float32 sums before it rounds them to bfloat16. It offers no
exponential, but the logistic function, and far below 0 the two are the same: e^x / (1 + e^x) is off by a share of e^x.
So a score becomes its weight inside the product, not rounded in between, once enough is subtracted for all scores to lie
below -ln(2^14). In forward that is any bound of the scores: weights are divided by their sum later, and floating point
does not mind that they are small. |q| |k| is one; where it is so far above a row's scores that weights come near the
smallest numbers there are, each row's own maximum is taken instead. In backward it is the row's log-sum.

A number for each row goes into the product as further columns, three bfloat16 parts that together have float32's
precision; the mask is the product's bias, or one column more.

Shapes: B batch, S tokens, A heads, K key/value heads, G = A / K heads of a group, E head dimension, R = S G rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CpuAttention", "cpu_attention", "is_faster_than_sdpa"]

_PARTS = 3  # further columns for a number of each row
_MORE = 4  # with one for the other side's bias
_SCORES = 3 * 2**19  # numbers of one chunk of scores: 3 MiB
_SUMMED_PARTS = 8
_UP = 2.0**14  # weights are smaller by this factor, so that the logistic function is off by a share of 2^-14
_SHIFT = math.log(_UP)
_LEAST_SUM = 1e-25  # of a row's weights; those too small to be numbers (1e-38) then add up to nothing
_MASKED = -1e6  # its exponential is 0


def is_faster_than_sdpa() -> bool:
    """Returns whether this CPU has bfloat16 units that ``scaled_dot_product_attention`` does not use."""
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


class CpuAttention:
    """Softmax(q k' / sqrt(E)) v in bfloat16; for the arguments see :mod:`library.memory.attention_kernels`.

    Every row must have a key that is not masked.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """Returns (B,S,A,E)."""
        return self.of_scaled_queries(q * q.shape[-1] ** -0.5, k, v, key_mask)

    def of_scaled_queries(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """Returns softmax(q k') v, for queries that were divided by sqrt(E) before they were rounded."""
        return _attention(q, k, v, key_mask)[0]


cpu_attention = CpuAttention()


@torch.library.custom_op("lumina::cpu_attention", mutates_args=(), device_types="cpu")
def _attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype)
    log_sums = torch.empty(q.shape[:-1], dtype=torch.float32)  # (B,S,A)
    for sample, head, group in _groups(q, k):
        queries = q[sample, :, group].flatten(0, 1)  # (R,E)
        keys, values = k[sample, :, head].contiguous(), v[sample, :, head].contiguous()  # (S,E)
        bias = _bias(keys, key_mask, sample)
        subtracted: Tensor = _bound(queries, keys)
        attended, sums = _attended(queries, keys, bias - subtracted, values)
        if not sums.min() > _LEAST_SUM:  # NaN as well
            subtracted = _maxima(queries, keys, bias).add_(_SHIFT)  # (R,)
            attended, sums = _attended(_with_columns(queries, -subtracted), _with_columns(keys), bias, values)
        place = q[sample, :, group].shape  # (S,G,E)
        out[sample, :, group] = (attended / sums[:, None]).view(place)
        log_sums[sample, :, group] = sums.log_().add_(subtracted).view(place[:-1])
    return out, log_sums


@torch.library.custom_op("lumina::cpu_attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, out: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    of_q, of_k, of_v = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    for sample, head, group in _groups(q, k):
        plain_keys, values = k[sample, :, head].contiguous(), _with_columns(v[sample, :, head])  # (S,E), (S,E+4)
        keys = _with_columns(plain_keys, bias=_bias(plain_keys, key_mask, sample))
        plain_queries = q[sample, :, group].flatten(0, 1)  # (R,E)
        queries = _with_columns(plain_queries, log_sums[sample, :, group].flatten().add(_SHIFT).neg_())  # (R,E+4)
        plain_given = gradient[sample, :, group].flatten(0, 1)
        products = plain_given.float().mul_(out[sample, :, group].flatten(0, 1)).sum(dim=-1)
        given = _with_columns(plain_given, products.neg_())
        group_q, sum_k, sum_v = torch.empty_like(plain_queries), *(torch.zeros(keys.shape[0], k.shape[3]) for _ in "kv")
        for rows in _chunks(queries.shape[0], keys.shape[0]):
            # Keys first: two of the three products below then take it as it lies; transposed they are slower.
            weights = _weights(keys, queries[rows], None)  # (S,rows), columns sum to 1 / _UP
            sum_v += weights @ plain_given[rows]
            # weights * (gradient v - products)
            of_scores = torch.ops.mkldnn._linear_pointwise.binary(values, weights, given[rows], None, "mul")
            del weights
            sum_k += of_scores @ plain_queries[rows]
            torch.mm(of_scores.t(), plain_keys, out=group_q[rows])
        torch.mul(group_q.view(q[sample, :, group].shape), _UP, out=of_q[sample, :, group])
        of_k[sample, :, head], of_v[sample, :, head] = sum_k.mul_(_UP), sum_v.mul_(_UP)
    return of_q, of_k, of_v


def _groups(q: Tensor, k: Tensor) -> Iterator[tuple[int, int, slice]]:
    """Yields sample, key/value head and its group of heads."""
    size = q.shape[2] // k.shape[2]
    for sample in range(q.shape[0]):
        for head in range(k.shape[2]):
            yield sample, head, slice(head * size, (head + 1) * size)


def _chunks(rows: int, keys: int) -> list[slice]:
    """Returns slices of rows whose scores fit the cache, of about equal length."""
    step = math.ceil(rows / math.ceil(rows * keys / _SCORES))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _attended(queries: Tensor, keys: Tensor, bias: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the weighted sums of the values (R,E), and the sums of the weights (R,) float32."""
    attended, sums = queries.new_empty(queries.shape[0], values.shape[1]), torch.empty(queries.shape[0])
    for rows in _chunks(queries.shape[0], keys.shape[0]):
        weights = _weights(queries[rows], keys, bias)
        torch.sum(_sums_of_parts(weights), dim=-1, dtype=torch.float32, out=sums[rows])
        torch.mm(weights, values, out=attended[rows])
    return attended, sums


def _sums_of_parts(weights: Tensor) -> Tensor:
    """Returns sums (rows,about 8), each rounded to bfloat16; for one float32 sum torch would copy the weights first."""
    length = weights.shape[1] - weights.shape[1] % _SUMMED_PARTS
    whole, rest = weights[:, :length], weights[:, length:]
    sums = whole.unflatten(1, (_SUMMED_PARTS, -1)).sum(dim=-1)
    return torch.cat([sums, rest], dim=1) if rest.shape[1] else sums


def _weights(rows: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """Returns the logistic function of rows columns' + bias (of each column), computed before they are rounded."""
    return torch.ops.mkldnn._linear_pointwise(rows, columns, bias, "sigmoid", [], "")


def _bias(keys: Tensor, key_mask: Tensor | None, sample: int) -> Tensor:
    """Returns what is added to the scores of each key (S,)."""
    if key_mask is None:
        return keys.new_zeros(keys.shape[0])
    return torch.where(key_mask[sample], 0.0, _MASKED).to(keys.dtype)


def _bound(queries: Tensor, keys: Tensor) -> Tensor:
    """Returns a number (), exact in bfloat16, by which to make scores smaller: |q| |k| is not below any score."""
    # 2 % for what is rounded to bfloat16: squares, their sums and the result, each by at most 0.4 %.
    longest = [x.square().sum(dim=-1).amax().float().sqrt() for x in (queries, keys)]
    return (longest[0] * longest[1] * 1.02 + _SHIFT).to(queries.dtype)


def _maxima(queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """Returns numbers (R,) float32 that are just above the largest score of each row."""
    largest = [
        torch.ops.mkldnn._linear_pointwise(queries[rows], keys, bias, "none", [], "").amax(dim=-1).float()
        for rows in _chunks(queries.shape[0], keys.shape[0])
    ]
    maxima = torch.cat(largest)
    return maxima + maxima.abs() / 128  # they are rounded: by at most a share of 1/256


def _with_columns(x: Tensor, numbers: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Returns rows (N,E+4) whose products with those of another tensor are larger by a number of each row.

    Args:
        x: rows (N,E).
        numbers: (N,) float32, of the queries' side; None makes rows of the other side.
        bias: (N,) in the dtype of ``x``, of the other side's rows; None = 0.
    """
    padded = F.pad(x, (0, _MORE))
    columns = padded[:, x.shape[-1] :]
    if numbers is None:
        columns[:, :_PARTS] = 1
        if bias is not None:
            columns[:, _PARTS] = bias
        return padded
    columns[:, _PARTS] = 1
    for column in range(_PARTS):
        columns[:, column] = numbers
        numbers = numbers - columns[:, column]
    return padded


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
