"""Attention in fp16 of float32 tensors: exact whatever their sizes are, and nothing a kernel makes leaves fp16."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from quantisation_helpers import relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from library.memory.attention import sdpa_attention
from library.memory.attention_masks import AttentionFn
from library.memory.half_attention import in_halves

SAMPLES, TOKENS, HEADS, KV_HEADS, WIDTH = 2, 150, 6, 2, 32
# Inputs, results and weights are rounded by up to 2^-12 each, and gradients once more on each way; twice what was measured.
ROUNDING = 2e-3
SIZES = [(1.0, 1.0), (1e5, 1e-9), (1e-7, 1e6), (3e4, 1e4)]


def inputs(of_values: float, of_gradients: float) -> tuple[list[Tensor], Tensor]:
    """Returns q, k, v and a gradient of the output; the second sample's gradient is a thousand times smaller."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, gradient = (
        torch.randn(SAMPLES, TOKENS, heads, WIDTH, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    gradient[1] *= 1e-3
    return [q, k, v * of_values], gradient * of_gradients


def results(attention: AttentionFn, given: list[Tensor], gradient: Tensor, mask: Tensor | None) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    attended = attention(*leaves, mask)  # type: ignore[arg-type, call-arg]
    return [attended.detach(), *torch.autograd.grad(attended, leaves, gradient)]


@pytest.mark.parametrize(("of_values", "of_gradients"), SIZES)
@pytest.mark.parametrize("ragged", [False, True])
def test_it_is_attention_in_float32(of_values: float, of_gradients: float, ragged: bool) -> None:
    given, gradient = inputs(of_values, of_gradients)
    mask = torch.arange(TOKENS) < torch.tensor([[TOKENS], [100]]) if ragged else None
    wanted = results(sdpa_attention, given, gradient, mask)
    found = results(in_halves(sdpa_attention), given, gradient, mask)
    for ours, expected in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float32
        for sample in range(SAMPLES):  # each by itself: the second one's gradients are small
            size = float(expected[sample].abs().max())
            assert relative_error(ours[sample] / size, expected[sample] / size) < ROUNDING


def written_out(seen: list[float]) -> AttentionFn:
    """Returns attention that rounds gradients of scores, queries, keys and values to fp16 as kernels do.

    Args:
        seen: gets the largest number of each kind that is in fp16, as it comes.
    """

    def noted(x: Tensor) -> Tensor:
        def rounded(gradient: Tensor) -> Tensor:
            seen.append(float(gradient.abs().max()))
            return gradient.half().float()

        seen.append(float(x.detach().abs().max()))
        if x.requires_grad:
            x.register_hook(rounded)
        return x

    def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        assert {q.dtype, k.dtype, v.dtype} == {torch.float16}
        q, k, v = (noted(x.float()) for x in (q, k, v))
        keys, values = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
        scores = torch.einsum("bqae,bkae->baqk", q, keys) * q.shape[-1] ** -0.5
        weights = noted(scores).softmax(dim=-1)
        return noted(torch.einsum("baqk,bkae->bqae", weights, values)).to(torch.float16)

    return attention


@pytest.mark.parametrize(("of_values", "of_gradients"), SIZES)
@pytest.mark.parametrize("kind", ["random", "one key", "one query", "equal signs"])
def test_nothing_that_a_kernel_makes_leaves_fp16(of_values: float, of_gradients: float, kind: str) -> None:
    given, gradient = inputs(of_values, of_gradients)
    if kind == "one key":  # all queries look at one, as at a text's first token, and half of them at another one
        given[1][:, 0] = 8 * given[0].mean(dim=(1, 2), keepdim=True)[:, 0] / given[0].mean(dim=(1, 2)).norm() + 3
        given[0] += 2
    if kind == "one query":
        gradient[:, 1:] *= 1e-6
    if kind == "equal signs":
        gradient = gradient.abs()
        given[2] = given[2].abs()
    seen: list[float] = []
    found = results(in_halves(written_out(seen)), given, gradient, None)
    assert len(seen) == 10
    assert max(seen) < 65504
    assert all(bool(each.isfinite().all()) for each in found)


def largest(attention: Callable[[list[float]], AttentionFn], given: list[Tensor], gradient: Tensor) -> float:
    """Returns the largest number that was in fp16, as a share of what a bound allows: 2^15."""
    seen: list[float] = []
    found = results(in_halves(attention(seen)), given, gradient, None)
    assert all(bool(each.isfinite().all()) for each in found)
    return max(seen) / 2**15


def opposite(tokens: int) -> tuple[list[Tensor], Tensor]:
    """Returns q and k of zeros, values of which the first is far from all others, and a gradient alike in all rows."""
    q, k, v, gradient = (torch.zeros(1, tokens, heads, 8) for heads in (3, 1, 1, 3))
    v[..., 1] = -1e5
    v[:, 0, :, 1] = 1e5
    gradient[..., 1] = 1e-9
    return [q, k, v], gradient


def test_a_keys_gradient_reaches_its_bound() -> None:
    (q, k, v), gradient = opposite(1500)
    length = 3.0
    q[..., 0] = length
    k[:, 0, :, 0] = math.log(1499) * 8**0.5 / length  # half of every query's weight is on it
    assert largest(written_out, [q, k, v], gradient) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("far", [0.0, 1e3], ids=["score", "query"])
def test_a_scores_and_a_querys_gradient_reach_their_bounds(far: float) -> None:
    (q, k, v), gradient = opposite(2)  # a weight of a half for each of them
    k[0, :, 0, 2] = torch.tensor([far, -far])
    gradient[:, 1:] = 0
    assert largest(written_out, [q, k, v], gradient) == pytest.approx(1, abs=0.01)


def test_a_values_gradient_reaches_its_bound() -> None:
    def of_first(seen: list[float]) -> AttentionFn:
        def attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
            v.register_hook(lambda gradient: seen.append(float(gradient.abs().max())))
            return v[:, :1].expand(q.shape) + 0 * (q.sum() + k.sum())  # as if all weight were on it

        return attention

    assert largest(of_first, *opposite(1500)) == pytest.approx(1, abs=0.01)


def test_samples_of_zeros_give_zeros() -> None:
    given, gradient = inputs(1.0, 1.0)
    given[2][1], gradient[1] = 0, 0
    assert not any(bool(found[1].any()) for found in results(in_halves(sdpa_attention), given, gradient, None))


def test_a_small_head_keeps_its_digits_beside_a_large_one() -> None:
    given, gradient = inputs(1.0, 1.0)
    shared_by = HEADS // KV_HEADS
    given[2][:, :, 1] *= 1e-3
    gradient[:, :, shared_by:] *= 1e-3
    found = results(in_halves(written_out([])), given, gradient, None)
    wanted = results(sdpa_attention, given, gradient, None)
    for ours, expected in zip(found, wanted, strict=True):
        small = slice(ours.shape[2] // KV_HEADS, None)
        size = float(expected[0, :, small].abs().max())
        assert relative_error(ours[0, :, small] / size, expected[0, :, small] / size) < ROUNDING


def test_it_goes_with_recomputation_and_with_compilers() -> None:
    given, gradient = inputs(1e5, 1e-9)
    attention = in_halves(sdpa_attention)
    expected = results(attention, given, gradient, None)

    def again(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        return checkpoint(attention, q, k, v, key_mask, use_reentrant=False)  # type: ignore[no-any-return]

    assert all(map(torch.equal, results(again, given, gradient, None), expected))
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    for ours, wanted in zip(results(compiled, given, gradient, None), expected, strict=True):
        size = float(wanted.abs().max())
        assert relative_error(ours / size, wanted / size) < ROUNDING  # a quotient is rounded twice


def test_without_gradients_it_gives_the_same() -> None:
    given, gradient = inputs(1e5, 1.0)
    expected = results(in_halves(sdpa_attention), given, gradient, None)[0]
    with torch.no_grad():
        assert torch.equal(in_halves(sdpa_attention)(*given, None), expected)  # type: ignore[call-arg]
