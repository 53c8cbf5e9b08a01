"""The command line that both programs share."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest

from library.command_line import build_parser, read_command_line
from library.errors import SettingsError
from library.settings import flag, specs_of


@dataclass(frozen=True)
class Example:
    names: tuple[str, ...] = flag((), "several names")
    rates: tuple[float, ...] = flag((), "several rates")
    count: int = flag(1, "a count", aliases=("how_many",))
    steps: tuple[float, ...] = flag((0.5, 1.0), "several steps")


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


def test_defaults_are_shown_as_they_are_typed() -> None:
    shown = build_parser("", [("", SPECS.values())]).format_help()
    assert "several steps (default: 0.5 1.0)" in shown
    assert "several names\n" in shown


def test_beginnings_of_one_flag_are_that_flag() -> None:
    """As in sd-scripts, whose command lines are taken as they are."""
    assert read("--nam", "a", "--how_many=3") == {"names": ("a",), "count": 3}


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("--coun_t=3", "--coun_t is no flag of this program (did you mean '--count'?)"),
        ("--how_mnay=3", "--how_mnay is no flag of this program (did you mean '--how_many'?)"),
        ("--=3", "-- is the beginning of several flags; write one of them out: --help, --names, --rates"),
        ("--h=a b", "--h is the beginning of several flags; write one of them out: --help, --how_many"),
        ("wide", "'wide' belongs to no flag; put values with spaces in quotes"),
    ],
)
def test_wrong_names_say_what_was_meant(word: str, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(word)
    assert str(caught.value).startswith(says)
