"""Settings dataclasses to argparse and back: shared by the programs of this project."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from library.errors import SettingsError, nearest
from library.settings import FlagSpec

logger = logging.getLogger(__name__)

_METAVARS: dict[type, str] = {int: "N", float: "X", Path: "PATH", str: "TEXT"}


class _Parser(argparse.ArgumentParser):
    """As in sd-scripts, a flag may be shortened to a beginning that no other has."""

    def error(self, message: str) -> NoReturn:
        if several := re.fullmatch(r"ambiguous option: ([^\s=]+).* could match (--.*)", message, re.DOTALL):
            message = f"{several[1]} is the beginning of several flags; write one of them out: {several[2]}"
        raise SettingsError(message)


def build_parser(
    description: str,
    groups: Iterable[tuple[str, Iterable[FlagSpec]]],
    hidden: Iterable[FlagSpec] = (),
    epilog: str = "",
) -> argparse.ArgumentParser:
    """Returns a parser that knows all flags and leaves every value a text.

    Args:
        description: first paragraph of ``--help``.
        groups: (title, flags) in the order of ``--help``.
        hidden: flags that are accepted but not listed.
        epilog: last paragraph of ``--help``.
    """
    parser = _Parser(description=description, epilog=epilog, usage="%(prog)s --flag value ...")
    for title, specs in groups:
        group = parser.add_argument_group(title)
        for spec in specs:
            _add_flag(group, spec, spec.help + _default_of(spec))
    for spec in hidden:
        _add_flag(parser, spec, argparse.SUPPRESS)
    return parser


def _default_of(spec: FlagSpec) -> str:
    default = " ".join(map(str, spec.default)) if isinstance(spec.default, tuple) else spec.default
    return "" if default in (None, "", False) else f" (default: {default})"


def _names_of(specs: Iterable[FlagSpec]) -> list[str]:
    return [f"--{name}" for spec in specs for name in (spec.name, *spec.aliases)]


def _add_flag(parser: argparse._ActionsContainer, spec: FlagSpec, help_text: str) -> None:
    keywords: dict[str, Any] = {"dest": spec.name, "default": argparse.SUPPRESS, "metavar": _METAVARS.get(spec.kind)}
    keywords["help"] = help_text if help_text == argparse.SUPPRESS else help_text.replace("%", "%%")
    if spec.choices:
        keywords["metavar"] = "{" + ",".join(spec.choices) + "}"
    if spec.kind is bool:
        keywords.update(nargs="?", const="true", metavar="BOOL")
    elif spec.many:
        keywords["nargs"] = "*"
    parser.add_argument(*_names_of([spec]), **keywords)


def read_command_line(
    parser: argparse.ArgumentParser, specs: Mapping[str, FlagSpec], argv: Sequence[str] | None
) -> dict[str, Any]:
    """Returns the flags that were given, with their values converted.

    A flag that takes several values and has none is empty, as in sd-scripts, and warned about.

    Raises:
        SettingsError: a flag is unknown or has a wrong value.
    """
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        name = next((word for word in unknown if word.startswith("-")), unknown[0]).split("=")[0]
        if not name.startswith("-"):
            raise SettingsError(f"{name!r} belongs to no flag; put values with spaces in quotes")
        raise SettingsError(f"{name} is no flag of this program{nearest(name, _names_of(specs.values()))}")
    given = vars(namespace)
    empty = [f"--{name}" for name, value in given.items() if value == []]
    if empty:
        logger.warning("%s: no value follows, which counts as none; give values, or leave it out", ", ".join(empty))
    return {name: specs[name].convert(value, f"--{name}") for name, value in given.items()}
