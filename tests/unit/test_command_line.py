"""The command line that both programs share."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest

from library.command_line import build_parser, read_command_line
from library.settings import flag, specs_of


@dataclass(frozen=True)
class Example:
    names: tuple[str, ...] = flag((), "several names")
    rates: tuple[float, ...] = flag((), "several rates")
    count: int = flag(1, "a count")


SPECS = {spec.name: spec for spec in specs_of(Example)}


def read(*argv: str) -> dict[str, object]:
    return read_command_line(build_parser("", [("", SPECS.values())]), SPECS, argv)


def test_a_list_without_values_is_empty_and_told(caplog: pytest.LogCaptureFixture) -> None:
    """As where a script's variable is empty: sd-scripts takes it, and nobody may believe that something was set."""
    assert read("--names", "--count", "2", "--rates") == {"names": (), "rates": (), "count": 2}
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "--names, --rates: no value follows, which counts as none" in caplog.text


def test_a_list_with_values_is_not_talked_about(caplog: pytest.LogCaptureFixture) -> None:
    assert read("--names", "a", "b", "--rates", "0") == {"names": ("a", "b"), "rates": (0.0,)}
    assert not caplog.records
