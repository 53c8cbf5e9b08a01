"""Which Linears of a model a LoRA reaches and with what rank, decided by an ordered table.

A component is a row of the table: a name, a pattern over module paths, the arguments that set its rank. Every Linear
of the model must match exactly one row, and every rank that the user gives must reach at least one module; anything
else is an error that says which. Nothing here imports torch, so arguments can be checked before any model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from library.errors import NetworkError


@dataclass(frozen=True)
class Component:
    """One row: a kind of Linear that is trained, named and given a rank together.

    Attributes:
        name: what the log calls it.
        pattern: regular expression that the whole module path must match.
        rank_arguments: arguments that set its rank; the first one that is given wins, else the network's own rank.
        on_by_default: whether it is trained when none of its rank arguments is given. A row that is off by default is
            asked for by name, so a restriction to some blocks does not take it away again.
    """

    name: str
    pattern: str
    rank_arguments: tuple[str, ...] = ()
    on_by_default: bool = True


@dataclass(frozen=True)
class Table:
    """All components of one model.

    Attributes:
        model: what messages call the model.
        prefix: first part of every LoRA module's name.
        sections: first parts of the module paths in the order in which LoRA modules are created and saved.
        components: the rows.
        fused_qkv: pattern of the Linears that hold the query, key and value projections stacked by rows; beside each
            stands the output projection ``out``, which has as many inputs as there are query rows.
    """

    model: str
    prefix: str
    sections: tuple[str, ...]
    components: tuple[Component, ...]
    fused_qkv: str | None = None

    def lora_name(self, path: str) -> str:
        """Returns the LoRA module's name for a module path, as in files: ``lora_unet_layers_0_attention_qkv``."""
        return f"{self.prefix}_{path.replace('.', '_')}"

    def is_fused(self, path: str) -> bool:
        """Whether a module path is that of a Linear that holds query, key and value projections."""
        return self.fused_qkv is not None and re.fullmatch(self.fused_qkv, path) is not None

    def component_of(self, path: str) -> Component:
        """Returns the one row that a module path matches.

        Raises:
            NetworkError: no row or several rows match.
        """
        rows = [row for row in self.components if re.fullmatch(row.pattern, path)]
        if len(rows) == 1:
            return rows[0]
        found = " and ".join(row.name for row in rows) or "no component"
        raise NetworkError(
            f"{self.model}: its Linear '{path}' belongs to {found}, but must belong to exactly one, so no LoRA can be"
            " attached; is this really the model that the network module is for?"
        )

    def in_order(self, paths: Iterable[str], blocks: Sequence[str] | None = None) -> list[str]:
        """Returns module paths by section (those of ``blocks`` first), and within a section as given."""
        sections = dict.fromkeys((*(blocks or ()), *self.sections))
        rank = {section: number for number, section in enumerate(sections)}
        return sorted(paths, key=lambda path: rank.get(path.split(".", 1)[0], len(rank)))


@dataclass(frozen=True)
class Assignment:
    """One Linear that gets a LoRA."""

    path: str
    lora_name: str
    component: Component
    rank: int


def assign(
    table: Table,
    paths: Iterable[str],
    ranks: Mapping[str, int],
    default_rank: int,
    blocks: Sequence[str] | None = None,
    numbers: Mapping[str, Collection[int]] | None = None,
) -> list[Assignment]:
    """Returns which Linears get a LoRA of which rank, in the order of creation.

    Args:
        table: the model's rows.
        paths: module paths of all Linears of the model.
        ranks: the rank arguments that the user gave; 0 leaves a component out.
        default_rank: rank of rows for which no argument is given.
        blocks: sections to which rows that are on by default are restricted, in this order; None for all.
        numbers: section -> numbers of those of its blocks to which they are restricted; a section that is not in it is
            taken whole.

    Raises:
        NetworkError: a Linear matches no or several rows, two names are equal, a given rank reaches no module, or a
            section has no block of a given number.
    """
    paths = list(paths)
    numbers = numbers or {}
    _require_numbers(table, paths, numbers)
    assignments: list[Assignment] = []
    names: dict[str, str] = {}
    reached: set[str] = set()
    for path in table.in_order(paths, blocks):
        row = table.component_of(path)
        name = table.lora_name(path)
        if name in names:
            raise NetworkError(f"{table.model}: the Linears '{names[name]}' and '{path}' would both be named '{name}'")
        names[name] = path
        section, number = _block_of(path)
        if row.on_by_default and (
            (blocks is not None and section not in blocks) or (section in numbers and number not in numbers[section])
        ):
            continue
        argument = next((argument for argument in row.rank_arguments if argument in ranks), None)
        if argument is not None:
            reached.add(argument)
            rank = ranks[argument]
        else:
            rank = default_rank if row.on_by_default else 0
        if rank > 0:
            assignments.append(Assignment(path, name, row, rank))
    unused = [argument for argument in ranks if argument not in reached]
    if unused:
        raise NetworkError(_unused_message(table, unused, ranks, blocks))
    return assignments


def _block_of(path: str) -> tuple[str, int | None]:
    section, _, rest = path.partition(".")
    number = rest.partition(".")[0]
    return section, int(number) if number.isdecimal() else None


def _require_numbers(table: Table, paths: Iterable[str], numbers: Mapping[str, Collection[int]]) -> None:
    there = {_block_of(path) for path in paths if numbers}
    for section, given in numbers.items():
        wrong = [number for number in sorted(given) if (section, number) not in there]
        if wrong:
            count = sum(1 for name, number in there if name == section and number is not None)
            raise NetworkError(
                f"--network_args: {table.model} has {count} blocks in {section}, counted from 0, and so none of the number"
                f" {wrong[0]}; name existing ones"
            )


def _unused_message(table: Table, unused: list[str], ranks: Mapping[str, int], blocks: Sequence[str] | None) -> str:
    argument = unused[0]
    winners = {
        other
        for row in table.components
        if argument in row.rank_arguments
        for other in row.rank_arguments[: row.rank_arguments.index(argument)]
        if other in ranks
    }
    why = []
    if blocks is not None:
        why.append(f"train_blocks leaves only {' and '.join(blocks)}")
    if winners:
        why.append(f"{' and '.join(sorted(winners))} takes precedence")
    because = f", because {' and '.join(why)}" if why else f" of {table.model}"
    return f"--network_args: {argument}={ranks[argument]} reaches no module{because}; leave it out"
