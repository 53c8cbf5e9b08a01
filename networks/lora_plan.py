"""Which LoRA modules a network is made of: beside which Linears, with which ranks and alphas, fused or split.

A plan follows from a table and the user's ranks, or from a LoRA file, which has ranks and alphas of its own. Nothing here
knows a model: :mod:`networks.lora_table` says which Linears are reached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from networks.lora_files import Factors
from networks.lora_fit import require_split
from networks.lora_table import Assignment, Table


@dataclass(frozen=True)
class Planned:
    """A LoRA module to be made: where, and with what rank and alpha."""

    assignment: Assignment
    linear: nn.Module
    alpha: float
    split_rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Plan:
    """All modules to be made for one model."""

    table: Table
    modules: Sequence[Planned]


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Returns module path -> Linear, in the model's order; a quantised replacement with its sizes counts as one."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "out_features"))
    }


def qkv_rows(table: Table, modules: Mapping[str, nn.Module]) -> tuple[int, int, int] | None:
    """Returns how many rows of the model's fused Linears are q, k and v, or None where nothing is fused.

    The output projection has as many inputs as there are query rows; keys and values share the rest.
    """
    for path, linear in modules.items():
        if table.is_fused(path):
            query = int(modules[path.rpartition(".")[0] + ".out"].in_features)  # type: ignore[arg-type]
            rest = int(linear.out_features) - query  # type: ignore[arg-type]
            return query, rest // 2, rest // 2
    return None


def plan_of(
    table: Table, modules: Mapping[str, nn.Module], assignments: Sequence[Assignment], alpha: float, split: bool
) -> Plan:
    """Returns the plan of what the user asked for.

    Args:
        table: the model's rows.
        modules: the model's Linears by path.
        assignments: which of them get a LoRA of which rank.
        alpha: of all of them.
        split: fused Linears get separate LoRAs for q, k and v.
    """
    rows = qkv_rows(table, modules) if split else None
    return Plan(
        table,
        [Planned(one, modules[one.path], alpha, rows if table.is_fused(one.path) else None) for one in assignments],
    )


def plan_of_file(
    table: Table, modules: Mapping[str, nn.Module], factors: Mapping[str, Factors], split: bool, source: str
) -> Plan:
    """Returns the plan for those Linears that a file has factors for, with the file's ranks and alphas.

    Args:
        table: the model's rows.
        modules: the model's Linears by path.
        factors: the file's, by kohya's names.
        split: fused Linears get separate LoRAs for q, k and v.
        source: the file, for messages.

    Raises:
        NetworkError: a LoRA of a fused Linear is not made of separate ones, and they are asked for.
    """
    planned = []
    rows = qkv_rows(table, modules) if split else None
    for path in table.in_order(modules):
        component, name = table.component_of(path), table.lora_name(path)
        one = factors.get(name)
        if one is None:
            continue
        rank, alpha, split_rows = one.down.shape[0], one.alpha, None
        if rows is not None and table.is_fused(path):
            require_split(one.up, rows, name, source)
            # Files hold the three LoRAs as one of three times the rank and alpha.
            rank, alpha, split_rows = rank // len(rows), alpha / len(rows), rows
        planned.append(Planned(Assignment(path, name, component, rank), modules[path], alpha, split_rows))
    return Plan(table, planned)
