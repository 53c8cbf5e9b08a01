"""What is made of a key mask: sequences among padded rows, once for all blocks."""

from __future__ import annotations

import pytest
import torch
from attention_helpers import heads_of_a_block, over_sequences, written_out

from library.lumina.configs import NextDiTConfig
from library.lumina.next_dit import NextDiT
from library.memory import attention_masks
from library.memory.attention import sdpa_attention
from library.memory.attention_masks import AttentionFn, OncePerMask, by_sequences, sequence_bounds

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


@torch.library.custom_op("lumina_tests::over_sequences", mutates_args=())
def opaque_over_sequences(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int
) -> torch.Tensor:
    """A kernel that a compiler cannot look into, as the real ones are."""
    return over_sequences(q, k, v, bounds, longest).contiguous()


@opaque_over_sequences.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int) -> torch.Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@pytest.mark.parametrize("attention", [sdpa_attention, by_sequences(opaque_over_sequences)], ids=["sdpa", "sequences"])
def test_a_block_compiles_as_one_graph(attention: AttentionFn) -> None:
    def joint(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
        return attention(q, k, v, key_mask)

    # No code is generated: what counts is that nothing in the block waits for the host.
    compiled = torch.compile(joint, fullgraph=True, backend="aot_eager")
    for lengths in (LENGTHS, [9, 4]):
        tensors, mask = heads_of_a_block(lengths)
        with torch.no_grad():
            for key_mask in (mask, None):
                expected = written_out(*tensors, key_mask)[mask]
                torch.testing.assert_close(compiled(*tensors, key_mask)[mask], expected, **ROUNDING)
