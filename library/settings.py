"""One declaration per setting: a flag is a field of a frozen dataclass, and everything else is read off that field.

The command line, ``--config_file``, the documentation table and the checks all come from the field's name, annotation,
default and :func:`flag` metadata. This module and every module that declares settings import nothing heavy, so that
``--help`` and a wrong flag answer at once.

Supported annotations: ``bool``, ``int``, ``float``, ``str``, ``Path``, ``Literal[...]`` of strings, ``tuple[T, ...]``
(several values after one flag), and each of these ``| None``.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from library.errors import SettingsError

T = TypeVar("T")

_TRUE = {"true", "1", "yes", "on"}
_LARGEST = 2**63 - 1
_FALSE = {"false", "0", "no", "off"}


def flag(
    default: Any,
    help: str,
    *,
    parse: Callable[[Any], Any] | None = None,
    aliases: tuple[str, ...] = (),
    secret: bool = False,
) -> Any:
    """Declares one setting as a dataclass field.

    Args:
        default: value when neither the command line nor ``--config_file`` gives one.
        help: one line for ``--help`` and the documentation table.
        parse: turns the given string, number or list into the value; raises ``ValueError`` with what is expected.
        aliases: further flag names without dashes.
        secret: never written to logs or files.
    """
    metadata = {"help": help, "parse": parse, "aliases": aliases, "secret": secret}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class FlagSpec:
    """What argparse, ``--config_file`` and the docs need to know of one setting, read off its dataclass field."""

    name: str
    kind: type
    default: Any
    help: str
    many: bool
    choices: tuple[str, ...] | None
    parse: Callable[[Any], Any] | None
    aliases: tuple[str, ...]
    secret: bool

    def convert(self, value: Any, origin: str) -> Any:
        """Returns ``value`` (a string, or a TOML value) as this setting's type.

        Args:
            value: what the user gave.
            origin: ``--flag`` or ``file: key``, for the message.

        Raises:
            SettingsError: the value has the wrong type or is none of the choices.
        """
        if self.parse is not None:
            try:
                return self.parse(value)
            except (ValueError, TypeError) as error:
                raise SettingsError(f"{origin}: {value!r} is not valid: {error}") from error
        if self.many:
            values = value if isinstance(value, (list, tuple)) else [value]
            return tuple(self._convert_one(item, origin) for item in values)
        return self._convert_one(value, origin)

    def _convert_one(self, value: Any, origin: str) -> Any:
        if self.choices is not None:
            if value not in self.choices:
                raise SettingsError(f"{origin}: {value!r} is none of {', '.join(self.choices)}")
            return value
        if self.kind is bool:
            return parse_bool(value, origin)
        shown = "the value" if self.secret else repr(value)
        wrong = SettingsError(f"{origin}: {shown} is not {_KIND_NAMES[self.kind]}")
        if isinstance(value, (bool, list, dict)) or (self.kind is Path and (value == "" or "\0" in str(value))):
            raise wrong
        if self.kind is int and isinstance(value, float) and not value.is_integer():
            raise wrong
        if self.kind in (str, Path) and not isinstance(value, (str, int, float)):
            raise wrong
        try:
            converted = self.kind(value)
        except (ValueError, TypeError, OverflowError) as error:
            raise wrong from error
        if isinstance(converted, float) and not math.isfinite(converted):
            raise wrong
        if isinstance(converted, int) and abs(converted) > _LARGEST:
            raise SettingsError(f"{origin}: {value!r} is beyond every sensible size")
        return expanded(converted, origin) if isinstance(converted, Path) else converted


def expanded(path: Path, origin: str) -> Path:
    """Returns the path with ``~`` resolved, which a shell leaves alone behind an equals sign.

    Args:
        path: what the user gave.
        origin: ``--flag`` or ``file: key``, for the message.

    Raises:
        SettingsError: it begins with the name of a user who is not known here.
    """
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise SettingsError(
            f"{origin}: {str(path)!r} begins with ~ and a name that no user has here; write the whole path"
        ) from error


_KIND_NAMES = {int: "a whole number", float: "a number", str: "a text", Path: "a path"}


def parse_bool(value: Any, origin: str) -> bool:
    """Returns a boolean from true/false, 1/0, yes/no, on/off in any case.

    Raises:
        SettingsError: it is none of these.
    """
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    raise SettingsError(f"{origin}: {value!r} is neither true nor false; write the flag alone, or with =true or =false")


def shown(value: Any) -> str:
    """Returns a setting's value as users write it: ``true``, ``0.001``, ``512,768``, ``""``."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return ",".join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


def as_given(name: str, value: Any) -> str:
    """Returns a flag with its value as on a command line: ``--seed 3``, ``--sdpa``, ``--sdpa=false``."""
    if value is True:
        return f"--{name}"
    return f"--{name}=false" if value is False else f"--{name} {shown(value)}"


def require(ok: bool, message: str) -> None:
    """Raises ``SettingsError`` with the message unless ``ok``."""
    if not ok:
        raise SettingsError(message)


def require_positive(settings: object, *names: str) -> None:
    """Raises ``SettingsError`` where one of these settings is given and not above 0."""
    for name in names:
        value = getattr(settings, name)
        require(value is None or value > 0, f"--{name}: {value} must be above 0")


def specs_of(settings_class: type) -> list[FlagSpec]:
    """Returns the flags of a settings dataclass in the order of its fields."""
    hints = typing.get_type_hints(settings_class)
    return [_spec(field, hints[field.name]) for field in dataclasses.fields(settings_class) if "help" in field.metadata]


def from_given(settings_class: type[T], given: Mapping[str, Any]) -> T:
    """Returns the settings with the given flags set, and the defaults for the rest.

    Raises:
        SettingsError: the settings' own checks find something wrong.
    """
    return settings_class(**{spec.name: given[spec.name] for spec in specs_of(settings_class) if spec.name in given})


def _spec(field: dataclasses.Field[Any], hint: Any) -> FlagSpec:
    if get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    many = get_origin(hint) is tuple and field.metadata["parse"] is None
    if get_origin(hint) is tuple:
        hint = get_args(hint)[0]
    choices = get_args(hint) if get_origin(hint) is Literal else None
    return FlagSpec(
        name=field.name,
        kind=str if choices else hint,
        default=field.default,
        help=field.metadata["help"],
        many=many,
        choices=choices,
        parse=field.metadata["parse"],
        aliases=field.metadata["aliases"],
        secret=field.metadata["secret"],
    )
