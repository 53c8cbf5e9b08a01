"""Which memory flags make a training run fit: what each set of them needs, how long it takes, and the fastest that fits.

Needs are computed by rehearsing the run's own step (``library/training/step_rehearsal.py``). On top comes an *allowance* for
what no rehearsal sees: kernels' workspaces and fragmentation, as a share, and CUDA's own context. It stands in
``memory_table.json`` beside the table of the documentation, and is taken from measured rows as soon as there are any.

Nothing heavy is imported here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.memory.settings import MemorySettings, Quantisation

GIB = 2**30
TABLE_FILE = Path(__file__).with_name("memory_table.json")

CHECKPOINTING: dict[str, dict[str, Any]] = {
    "none": {"gradient_checkpointing": False},
    "selective": {"gradient_checkpointing": True, "gradient_checkpointing_level": "selective"},
    "full": {"gradient_checkpointing": True, "gradient_checkpointing_level": "full"},
}
"""Levels of recomputation -> the settings that mean them."""
QUALITY: tuple[Quantisation | None, ...] = (None, "fp8", "nf4")
"""Kinds of frozen weights, the exact ones first: a later one is taken only where nothing of the earlier ones fits."""
COMPUTE_FLOPS = 40e12
MEMORY_BYTES = 400e9
HOST_COPY_BYTES = 12e9
"""What a card is taken to do in a second, for the order of rows: a consumer card of the middle, PCIe 4.0 with 8 lanes. Only
ratios of times are used."""


@dataclass(frozen=True)
class Row:
    """One set of memory flags."""

    quantisation: Quantisation | None = None
    checkpointing: str = "none"
    offload: bool = False
    blocks_to_swap: int = 0

    def applied_to(self, settings: MemorySettings) -> MemorySettings:
        """Returns the settings with this row's flags."""
        return replace(
            settings,
            **CHECKPOINTING[self.checkpointing],
            blocks_to_swap=self.blocks_to_swap or None,
            cpu_offload_checkpointing=self.offload,
        )


@dataclass(frozen=True)
class Need:
    """What a run's step needs with a row's flags, before any block is streamed."""

    weights: int
    """Bytes of frozen weights on the device."""
    trained: int
    """Bytes of what is trained and of the optimizer's memory, which stay between steps."""
    step: int
    """The most bytes beside ``weights`` in a step; ``trained`` is part of it."""
    blocks: tuple[int, ...]
    """Bytes of each block that can be streamed."""
    forward_s: float
    backward_s: float
    """Computing, recomputation and the optimizer included, by the speeds above."""
    out: int = 0
    back: int = 0
    """Bytes of activations that go to the host and come back."""
    text_layers: tuple[int, ...] = ()
    """Bytes of each of the text encoder's layers, where they are part of ``weights`` and all streamed as soon as one block
    is."""

    def bytes_with(self, blocks_to_swap: int) -> int:
        """Returns the most device memory that tensors take where so many blocks are streamed."""
        saved = self._streamed(blocks_to_swap) - ring_bytes(self.blocks, blocks_to_swap)
        if blocks_to_swap:
            saved += sum(self.text_layers) - ring_bytes(self.text_layers, len(self.text_layers))
        return self.weights + self.step - saved

    def seconds_with(self, blocks_to_swap: int) -> float:
        """Returns how long a step takes: copies in one direction hide behind the computation, or it behind them."""
        weights = self._streamed(blocks_to_swap) / HOST_COPY_BYTES
        forward = max(self.forward_s, weights, self.out / HOST_COPY_BYTES)
        # Captions are encoded before the model begins, and in less time than the text encoder's layers need to come.
        text = sum(self.text_layers) / HOST_COPY_BYTES if blocks_to_swap else 0.0
        return text + forward + max(self.backward_s, weights + self.back / HOST_COPY_BYTES)

    def _streamed(self, count: int) -> int:
        return sum(self.blocks[index * len(self.blocks) // count] for index in range(count))


def ring_bytes(blocks: Sequence[int], count: int) -> int:
    """Returns the device memory through which ``count`` of the blocks are streamed: room for two of the largest, as
    ``BlockStream.num_ring_bytes`` says."""
    return min(2, count) * max(blocks, default=0)


@dataclass(frozen=True)
class Allowance:
    """What comes on top of the tensors."""

    share: float
    context_gib: float

    def with_allowance(self, num_bytes: float) -> float:
        """Returns GiB of the card for so many bytes of tensors."""
        return num_bytes * (1 + self.share) / GIB + self.context_gib

    @classmethod
    def read(cls, file: Path = TABLE_FILE) -> Allowance:
        """Returns the one that the table's file holds."""
        found = json.loads(file.read_text(encoding="utf-8"))["allowance"]
        return cls(float(found["share"]), float(found["context_gib"]))


@dataclass(frozen=True)
class Choice:
    """A row with what it needs of the card and how long its step takes."""

    row: Row
    gib: float
    seconds: float


def rows(kinds: Iterable[Quantisation | None]) -> list[Row]:
    """Returns every row without streaming with these kinds of weights, in their order."""
    return [Row(kind, level, offload) for kind in kinds for level in CHECKPOINTING for offload in (False, True)]


def choices(row: Row, need: Need, allowance: Allowance, streamed: Iterable[int]) -> Iterator[Choice]:
    """Yields the row with each number of streamed blocks, and what each needs."""
    for count in streamed:
        gib = allowance.with_allowance(need.bytes_with(count))
        yield Choice(replace(row, blocks_to_swap=count), gib, need.seconds_with(count))


def fastest(found: Sequence[Choice], limit_gib: float) -> Choice | None:
    """Returns the fastest choice within a limit; of equally fast ones the first, which has the fewest flags."""
    fitting = [choice for choice in found if choice.gib <= limit_gib]
    return min(
        fitting,
        key=lambda choice: (round(choice.seconds, 6), choice.row.offload, choice.row.blocks_to_swap),
        default=None,
    )
