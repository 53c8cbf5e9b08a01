"""What is made of a key mask: sequences among padded rows, marks in further channels; once for all blocks."""

from __future__ import annotations

import pytest
import torch
from attention_helpers import heads_of_a_block, over_sequences, written_out

from library.lumina.configs import NextDiTConfig
from library.lumina.next_dit import NextDiT
from library.memory import attention_masks
from library.memory.attention import sdpa_attention
from library.memory.attention_masks import AttentionFn, OncePerMask, by_marks, by_sequences, sequence_bounds

# Float32; fused kernels sum in blocks.
ROUNDING = {"atol": 2e-5, "rtol": 1e-4}
LENGTHS = [7, 13, 1, 13]


def test_every_row_lies_in_a_sequence_of_its_own_kind() -> None:
    mask = torch.arange(13) < torch.tensor(LENGTHS)[:, None]
    bounds = sequence_bounds(mask)
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == [0, 7, 13, 26, 26, 27, 39, 52, 52]


def test_the_bounds_are_made_once_for_all_blocks_that_share_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []

    def spy(mask: torch.Tensor) -> torch.Tensor:
        made.append(mask)
        return sequence_bounds(mask)

    monkeypatch.setattr(attention_masks, "sequence_bounds", spy)
    config = NextDiTConfig(dim=48, num_layers=5, num_noise_refiners=1, num_context_refiners=2, num_heads=2,
                           num_kv_heads=1, head_dim=24, ffn_dim=32, cap_dim=16, time_dim=8)  # fmt: skip
    torch.manual_seed(0)
    model = NextDiT(config, by_sequences(over_sequences))
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    model(torch.randn(2, 16, 4, 4), torch.rand(2), torch.randn(2, 5, 16), mask)
    assert [tuple(mask.shape) for mask in made] == [(2, 5), (2, 9)]  # the captions' own, and the joint one


def test_a_mask_that_was_changed_is_read_again() -> None:
    once = OncePerMask(sequence_bounds)
    mask = torch.ones((1, 4), dtype=torch.bool)
    first = once(mask)
    assert once(mask) is first
    mask[0, 2:] = False
    assert once(mask).tolist() == [0, 2, 4]
    assert once(mask.clone()).tolist() == [0, 2, 4]
    with torch.inference_mode():
        unversioned = torch.ones((1, 4), dtype=torch.bool)
        assert once(unversioned).tolist() == [0, 4, 4]
        unversioned[0, 1:] = False
        assert once(unversioned).tolist() == [0, 1, 4]


def unmasked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """A kernel without a mask, in the inputs' precision."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("widens_values", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_marks_take_padding_out_of_halves(dtype: torch.dtype, widens_values: bool) -> None:
    seen: list[tuple[int, ...]] = []

    def wide(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        # A kernel adds scores up in float32, whatever it is given.
        seen.append((q.shape[-1], k.shape[-1], v.shape[-1]))
        assert q.dtype == k.dtype == v.dtype == dtype
        return unmasked(q.float(), k.float(), v.float(), scale).to(dtype)

    attention = by_marks(wide, widens_values)
    tensors, mask = heads_of_a_block(LENGTHS)
    q, k, v = (tensor.detach().to(dtype) for tensor in tensors)
    for factor in (1, 30):  # scores of some units, and of some thousands, more than normalised heads ever have
        found = attention(q * factor, k * factor, v, mask)
        wanted = written_out((q * factor).float(), (k * factor).float(), v.float(), mask)
        assert found.shape == q.shape
        # The result is rounded once: bf16 has 8 bits, values of up to 4.
        torch.testing.assert_close(found[mask].float(), wanted[mask], atol=2e-2, rtol=2e-2)
        other = attention(q * factor, (k * factor).masked_fill(~mask[:, :, None, None], 30.0), v, mask)
        assert torch.equal(other[mask], found[mask])
    assert set(seen) == {(32, 32, 32 if widens_values else 24)}
    seen.clear()
    assert attention(q, k, v, None).shape == q.shape
    assert seen == [(24, 24, 24)]


def test_a_sample_of_padding_alone_is_finite() -> None:
    # Captions may be empty, and the refiner of captions sees nothing else.
    tensors, _ = heads_of_a_block([5, 5])
    mask = torch.tensor([[True] * 5, [False] * 5])
    output = by_marks(unmasked)(*tensors, mask)
    gradients = torch.autograd.grad(output.sum(), tensors)
    assert all(torch.isfinite(tensor).all() for tensor in (output, *gradients))


@torch.library.custom_op("lumina_tests::over_sequences", mutates_args=())
def opaque_over_sequences(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int
) -> torch.Tensor:
    """A kernel that a compiler cannot look into, as the real ones are."""
    return over_sequences(q, k, v, bounds, longest).contiguous()


@opaque_over_sequences.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int) -> torch.Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@pytest.mark.parametrize(
    "attention",
    [sdpa_attention, by_sequences(opaque_over_sequences), by_marks(unmasked)],
    ids=["sdpa", "sequences", "marks"],
)
def test_a_block_compiles_as_one_graph(attention: AttentionFn) -> None:
    def joint(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
        return attention(q, k, v, key_mask)

    torch.compiler.reset()  # attention's code is compiled eight times at most, whatever it was compiled for
    # No code is generated: what counts is that nothing in the block waits for the host.
    compiled = torch.compile(joint, fullgraph=True, backend="aot_eager")
    for lengths in (LENGTHS, [9, 4]):
        tensors, mask = heads_of_a_block(lengths)
        with torch.no_grad():
            for key_mask in (mask, None):
                expected = written_out(*tensors, key_mask)[mask]
                torch.testing.assert_close(compiled(*tensors, key_mask)[mask], expected, **ROUNDING)
