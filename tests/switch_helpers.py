"""Switches of a program as a table, and sets of their values in which every two values meet."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from quantisation_helpers import HAS_CPU_PRODUCTS
from torch import Tensor
from transport_helpers import LateTransport

from configs.quickstart import make_models
from library.memory import activation_offload, attention_kernels, fp8, prepare

NUM_LAYERS = 4  # with two nothing would ever leave the ring of streamed blocks

Value = tuple[str, str]
"""A switch and one of its values."""
Row = Mapping[str, str]
"""A value of every switch."""


@dataclass(frozen=True)
class Setting:
    """One value of a switch.

    Attributes:
        flags: as they are typed.
        rounding: how far (L2, relative) it may move losses and gradients from those with the switch's first value, by
            the precision of the run; empty: not by a bit.
        changes: whether it changes the arithmetic, so that it can only be compared with a run that has it too.
        is_dear: whether runs with it take long, so that no more rows have it than its own pairs need.
    """

    flags: tuple[str, ...] = ()
    rounding: Mapping[str, float] | None = None
    changes: bool = False
    is_dear: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether a run with it is the same, bit for bit, as one with the switch's first value."""
        return self.rounding is None and not self.changes


Table = Mapping[str, Mapping[str, Setting]]
"""Switch -> value -> what it is; the first value is the switch left alone."""


def plain(table: Table) -> dict[str, str]:
    """Returns the row with every switch left alone."""
    return {switch: next(iter(values)) for switch, values in table.items()}


def flags_of(table: Table, row: Row) -> list[str]:
    """Returns a row as it is typed."""
    return [flag for switch, value in row.items() for flag in table[switch][value].flags]


def without(table: Table, row: Row, unwanted: Callable[[Setting], bool]) -> dict[str, str]:
    """Returns a row in which the switches with unwanted values are left alone."""
    return {
        switch: next(iter(table[switch])) if unwanted(table[switch][value]) else value for switch, value in row.items()
    }


def pairs_of(row: Row) -> set[frozenset[Value]]:
    """Returns every two values of a row."""
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}


def possible_pairs(table: Table, impossible: set[frozenset[Value]]) -> list[frozenset[Value]]:
    """Returns every two values of different switches that can meet, in the table's order."""
    values = [(switch, value) for switch in table for value in table[switch]]
    pairs = (frozenset(pair) for pair in itertools.combinations(values, 2))
    return [pair for pair in pairs if len({switch for switch, _ in pair}) == 2 and pair not in impossible]


def covering(table: Table, impossible: set[frozenset[Value]]) -> list[dict[str, str]]:
    """Returns few rows in which all possible pairs occur; always the same ones.

    Each row begins with the first pair that has not occurred, and takes for each further switch the value that makes most
    further pairs occur.

    Args:
        table: the switches.
        impossible: pairs that no row has; they may leave no value without a partner.
    """
    dear = {(switch, value) for switch, values in table.items() for value in values if values[value].is_dear}
    missing = dict.fromkeys(possible_pairs(table, impossible))
    rows: list[dict[str, str]] = []
    while missing:
        first = next((pair for pair in missing if dear & pair), next(iter(missing)))
        row = dict(sorted(first))
        for switch in sorted(table, key=lambda name: -len(table[name])):
            if switch in row:
                continue
            fitting = [
                value
                for value in table[switch]
                if not any(frozenset((chosen, (switch, value))) in impossible for chosen in row.items())
                and ((switch, value) not in dear or dear & first)
            ]
            row[switch] = max(fitting, key=lambda value: _new_pairs(row, (switch, value), missing))
        rows.append({switch: row[switch] for switch in table})
        for pair in pairs_of(row):
            missing.pop(pair, None)
    return rows


def _new_pairs(row: Row, added: Value, missing: Mapping[frozenset[Value], None]) -> int:
    return sum(frozenset((chosen, added)) in missing for chosen in row.items())


def named(rows: list[dict[str, str]], table: Table) -> Iterator[str]:
    """Yields a name for each row: what it has beside the first values."""
    first = plain(table)
    for row in rows:
        yield ", ".join(value for switch, value in row.items() if value != first[switch]) or "plain"


def write_models(folder: Path) -> dict[str, Path]:
    """Writes models of few and small layers; returns their files by ``dit``, ``gemma2`` and ``ae``."""
    tiny = make_models.SIZES["tiny"]
    dit = dataclasses.replace(tiny.dit, num_layers=NUM_LAYERS, num_noise_refiners=1, num_context_refiners=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(make_models.SIZES, "deep", dataclasses.replace(tiny, dit=dit))
        files = make_models.write_files(make_models.make_models("deep"), folder, torch.float32, torch.float32)
    return dict(zip(("dit", "gemma2", "ae"), files, strict=True))


def make_the_cpu_a_device(patch: pytest.MonkeyPatch) -> list[LateTransport]:
    """Has the CPU look like a device with memory of its own, whose copies run late, and which multiplies in fp8.

    Returns:
        The stand-ins for copies, as they are asked for.
    """
    made: list[LateTransport] = []

    def transport(device: torch.device) -> LateTransport:
        made.append(LateTransport())
        return made[-1]

    patch.setattr(prepare, "CudaTransport", transport)
    patch.setattr(prepare, "can_stream", lambda device: True)
    patch.setattr(activation_offload.ActivationOffload.__init__, "__defaults__", ((), 1024, 4096))
    patch.setattr(fp8, "require_fp8_products", lambda device: None)
    # On every CPU, so that auto and sdpa are different kernels where the run is in bf16.
    patch.setattr(attention_kernels, "is_faster_than_sdpa", lambda: True)
    return made


def skip_where_the_cpu_cannot(values: Row) -> None:
    """Skips a test of switches that this torch's CPU kernels cannot do."""
    if values.get("weights") == "fp8 products" and not HAS_CPU_PRODUCTS:
        pytest.skip(f"torch {torch.__version__} has no fp8 products with row scales on a CPU")


def differing(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of what is not the same bit for bit."""
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def tolerance(table: Table, row: Row, arithmetic: str) -> float:
    """Returns the sum of what a row's switches may each round."""
    settings = [table[switch][value] for switch, value in row.items()]
    return sum(setting.rounding[arithmetic] for setting in settings if setting.rounding is not None)
