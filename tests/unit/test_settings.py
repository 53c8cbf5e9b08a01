"""Flags from dataclass fields: conversion and its messages."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from library.errors import SettingsError, nearest
from library.settings import flag, specs_of


@dataclass(frozen=True)
class Example:
    count: int = flag(1, "a count")
    rate: float | None = flag(None, "a rate")
    name: str | None = flag(None, "a name")
    folder: Path | None = flag(None, "a folder")
    on: bool = flag(False, "a switch")
    kind: Literal["a", "b"] | None = flag(None, "a kind")
    names: tuple[str, ...] = flag((), "several names")
    rates: tuple[float, ...] = flag((), "several rates")
    not_a_flag: int = 3


SPECS = {spec.name: spec for spec in specs_of(Example)}


def test_only_declared_fields_are_flags() -> None:
    assert list(SPECS) == ["count", "rate", "name", "folder", "on", "kind", "names", "rates"]


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("count", "12", 12),
        ("count", 12.0, 12),
        ("rate", "1e-4", 1e-4),
        ("rate", 1, 1.0),
        ("name", "text", "text"),
        ("folder", "a/b", Path("a/b")),
        ("on", "true", True),
        ("on", "False", False),
        ("on", True, True),
        ("kind", "b", "b"),
        ("names", ["x=1", "y=2"], ("x=1", "y=2")),
        ("rates", ["1e-4", "0"], (1e-4, 0.0)),
        ("rates", 0.5, (0.5,)),
    ],
)
def test_values_from_texts_and_toml(name: str, given: object, expected: object) -> None:
    value = SPECS[name].convert(given, f"--{name}")
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("count", "1.5", "a whole number"),
        ("count", 1.5, "a whole number"),
        ("count", True, "a whole number"),
        ("rate", "fast", "a number"),
        ("rate", [1.0], "a number"),
        ("rate", "nan", "a number"),
        ("rate", "1e999", "a number"),
        ("count", "9" * 30, "beyond every sensible size"),
        ("kind", "c", "none of a, b"),
        ("on", "maybe", "neither true nor false"),
    ],
)
def test_wrong_values_name_flag_and_value(name: str, given: object, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        SPECS[name].convert(given, f"--{name}")
    message = str(caught.value)
    assert f"--{name}" in message
    assert repr(given) in message
    assert says in message


def test_nearest() -> None:
    assert nearest("learnin_rate", ["learning_rate", "seed"]) == " (did you mean 'learning_rate'?)"
    assert nearest("adamw", ["AdamW"]) == " (did you mean 'AdamW'?)"
    assert nearest("qqqq", ["learning_rate"]) == ""


def test_paths_begin_at_home_where_the_shell_did_not_say_so() -> None:
    assert SPECS["folder"].convert("~/x", "--folder") == Path.home() / "x"
    with pytest.raises(SettingsError, match="--folder: '~no_such_user_here/x' begins with ~"):
        SPECS["folder"].convert("~no_such_user_here/x", "--folder")


def test_an_empty_path_is_none() -> None:
    with pytest.raises(SettingsError, match="--folder: '' is not a path"):
        SPECS["folder"].convert("", "--folder")
