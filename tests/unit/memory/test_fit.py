"""Needs and times of rows, and which of them is taken."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transport_helpers import LateTransport

from library.memory.block_stream import BlockStream, streamed_bytes
from library.memory.fit import GIB, HOST_COPY_BYTES, Allowance, Choice, Need, Row, choices, fastest, rows
from library.memory.prepare import spread
from library.memory.settings import MemorySettings

NEED = Need(
    weights=10 * GIB, trained=GIB, step=5 * GIB, blocks=(GIB,) * 8, forward_s=1.0, backward_s=2.0, out=0, back=0
)
NOTHING = Allowance(0.0, 0.0)


def test_streaming_takes_weights_away_and_adds_two_buffers() -> None:
    assert [NEED.bytes_with(count) / GIB for count in (0, 1, 2, 3, 8)] == [15, 15, 15, 14, 9]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_streamed_bytes_are_those_of_the_stream(count: int) -> None:
    blocks = [nn.Sequential(nn.Linear(7, 5 + size), nn.LayerNorm(3)).requires_grad_(False) for size in range(5)]
    sizes = tuple(streamed_bytes(block) for block in blocks)
    need = Need(sum(sizes), 0, 0, sizes, 1.0, 1.0)
    chosen = spread(blocks, count)
    stream = BlockStream(chosen, torch.device("cpu"), LateTransport())
    left = sum(size for block, size in zip(blocks, sizes, strict=True) if block not in chosen)
    # The ring is as large as the largest of all blocks here, which all are alike in a real model.
    assert need.bytes_with(count) >= left + stream.num_ring_bytes
    assert need.bytes_with(count) - left == min(2, count) * max(sizes)
    assert stream.num_host_bytes == sum(sizes) - left


def test_copies_hide_behind_the_computation() -> None:
    assert NEED.seconds_with(0) == 3.0
    assert NEED.seconds_with(8) == 3.0  # 0.7 s of copies in each direction of the pass
    slow = Need(0, 0, 0, NEED.blocks, forward_s=0.1, backward_s=0.2, out=0, back=GIB)
    copied = 8 * GIB / HOST_COPY_BYTES
    assert slow.seconds_with(8) == pytest.approx(copied + copied + GIB / HOST_COPY_BYTES)


def test_the_allowance_comes_on_top() -> None:
    assert Allowance(0.1, 0.5).with_allowance(10 * GIB) == pytest.approx(11.5)


def test_the_allowance_is_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_text(json.dumps({"allowance": {"share": 0.25, "context_gib": 1}}), encoding="utf-8")
    assert Allowance.read(file) == Allowance(0.25, 1.0)
    assert Allowance.read().share > 0


def test_the_fastest_that_fits_is_taken() -> None:
    found = [
        Choice(Row(), 16.0, 1.0),
        Choice(Row(blocks_to_swap=20), 12.0, 1.0),
        Choice(Row(checkpointing="full"), 8.0, 1.4),
        Choice(Row(checkpointing="full", blocks_to_swap=26), 4.0, 1.6),
    ]
    taken = {limit: fastest(found, limit) for limit in (24, 15, 10, 5, 3)}
    assert [None if choice is None else found.index(choice) for choice in taken.values()] == [0, 1, 2, 3, None]


def test_as_few_blocks_as_possible_are_streamed() -> None:
    found = list(choices(Row(), NEED, NOTHING, range(9)))
    chosen = fastest(found, 12.5)
    assert chosen is not None
    assert chosen.row == Row(blocks_to_swap=5)
    assert chosen.gib == 12


def test_rows_become_settings() -> None:
    settings = MemorySettings(mixed_precision="bf16", vae_tiling=True)
    row = Row("fp8", "full", True, 9)
    applied = row.applied_to(settings)
    assert (applied.gradient_checkpointing, applied.cpu_offload_checkpointing, applied.blocks_to_swap) == (
        True,
        True,
        9,
    )
    assert applied.vae_tiling
    assert Row().applied_to(applied).blocks_to_swap is None
    assert len(set(rows([None, "fp8"]))) == len(rows([None, "fp8"])) == 12
