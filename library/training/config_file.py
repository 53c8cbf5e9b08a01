"""``--config_file``: flags from a TOML file, with the types and choices of the command line, and back into one.

The files in circulation were written by graphical front ends, so what these write for "not set" (an empty text, ``"None"``,
a 0 where 0 means nothing) is understood, and the keys of their own are known by name (``gui_keys.py``).
"""

from __future__ import annotations

import json
import logging
import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from library.console import process_rank
from library.errors import SettingsError, nearest
from library.files import write_text
from library.settings import FlagSpec, expanded
from library.training.gui_keys import REASONS, WORDS_FOR_NOTHING, ZERO_MEANS_OFF

logger = logging.getLogger(__name__)

_ABOUT_THE_FILE = ("config_file", "output_config")
_PRESET_SIGNS = ("LoRA_type", "max_resolution", "lr_warmup")


def read_config_file(path: Path, specs: Mapping[str, FlagSpec]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the flags of a TOML file, and the keys of graphical front ends in it; names of sections do not matter.

    Args:
        path: the file; its ``.toml`` may be left out.
        specs: every flag by name.

    Raises:
        SettingsError: the file is missing or broken, a value is wrong, or a key is neither a flag nor a front end's.
    """
    if not path.exists() and path.with_name(path.name + ".toml").exists():
        path = path.with_name(path.name + ".toml")
    aliases = {alias: spec.name for spec in specs.values() for alias in spec.aliases}
    flags: dict[str, Any] = {}
    gui_keys: list[str] = []
    unknown: list[str] = []
    origins: dict[str, str] = {}
    secrets = {name for spec in specs.values() if spec.secret for name in (spec.name, *spec.aliases)}
    for key, value in _flat(path, secrets).items():
        name = aliases.get(key, key)
        if name in specs:
            if is_unset(specs[name], value):
                continue
            if name in _ABOUT_THE_FILE and not _says_nothing(name, value, path):
                raise SettingsError(
                    f"{path}: {key} = {value!r} has no place in a file: a file cannot read or write another one; give"
                    f" --{name} on the command line"
                )
            if name in origins:
                raise SettingsError(f"{path}: {origins[name]} and {key} are the same flag; keep one")
            origins[name] = key
            if name not in _ABOUT_THE_FILE:
                flags[name] = specs[name].convert(_listed(specs[name], value), f"{path}: {key}")
        elif key in REASONS:
            gui_keys.append(key)
        else:
            unknown.append(key)
    if unknown:
        raise SettingsError(_unknown_keys(path, unknown, specs))
    return flags, tuple(gui_keys)


def _flat(path: Path, secrets: Collection[str]) -> dict[str, Any]:
    """Returns the keys of the file and of its sections, one level deep, as sd-scripts reads them.

    Messages leave the values of ``secrets`` out.
    """
    content = _parse(path)
    if isinstance(content.get("datasets"), list):
        raise SettingsError(f"--config_file: {path} is a dataset file; give it with --dataset_config")
    flat: dict[str, Any] = {}
    for section, content_of in content.items():
        for key, value in (content_of if isinstance(content_of, dict) else {section: content_of}).items():
            if key in flat:
                values = "" if key in secrets else f", as {flat[key]!r} and {value!r}"
                raise SettingsError(f"{path}: {key} stands in two sections{values}; keep one")
            if isinstance(value, dict):
                raise SettingsError(f"{path}: {key} is a table inside a table; write its keys at the top")
            flat[key] = value
    return flat


def _parse(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SettingsError(f"--config_file: {path} is no file; give a TOML file")
    if path.suffix.lower() == ".json":
        raise SettingsError(
            f"--config_file: {path} is a .json file, such as the presets that a front end saves for itself; a TOML file is"
            " needed. In kohya_ss, load the preset and press 'Print training command' (or start the training once): that"
            " writes a config_lora-....toml into the output folder, and this file can be given here"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"--config_file: {path} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise SettingsError(f"--config_file: {path} cannot be read: {error.strerror}") from error
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SettingsError(f"--config_file: {path} is not valid TOML: {error}{_hint(text, str(error))}") from error


def _hint(text: str, message: str) -> str:
    """Returns what to do where the broken line is one of the usual mistakes."""
    found = re.search(r"at line (\d+)", message)
    lines = text.splitlines()
    line = lines[int(found[1]) - 1] if found and int(found[1]) <= len(lines) else ""
    if "\\" in line:
        return ". Write Windows paths with forward slashes or in single quotes"
    if re.search(r"=\s*(None|null)\b", line):
        return ". TOML has no word for nothing; remove the line"
    if re.search(r"=\s*(True|False)\b", line):
        return ". Write true and false in small letters"
    if re.search(
        "[\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}\N{DOUBLE LOW-9 QUOTATION MARK}]", line
    ):
        return '. Write straight quotes: "text"'
    if "overwrite" in message:
        return ". The key stands there a second time; keep one of the lines"
    if re.match(r"\s*\w+\s*:", line):
        return ". Write key = value, with an equals sign"
    if re.search(r"=\s*[A-Za-z/~.]", line):
        return '. Put texts in quotes: key = "text"'
    return ""


def is_unset(spec: FlagSpec, value: Any) -> bool:
    """Whether a value of a file is a front end's way to say that the flag was not set."""
    if isinstance(value, list) and spec.parse is None:
        return all(is_unset(spec, item) for item in value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value == 0 and spec.name in ZERO_MEANS_OFF
    if not isinstance(value, str):
        return False
    text = value.strip()
    if not text:
        return value == "" or spec.kind is not str
    if text in WORDS_FOR_NOTHING.get(spec.name, ()):
        return True
    is_free_text = spec.kind is str and spec.choices is None and spec.parse is None
    return text.lower() in ("none", "null") and not is_free_text and text not in (spec.choices or ())


def _listed(spec: FlagSpec, value: Any) -> Any:
    """Returns the value of a flag that takes several, as a list without empty texts."""
    if not spec.many:
        return value
    return [item for item in (value if isinstance(value, list) else [value]) if item != ""]


def _says_nothing(name: str, value: Any, path: Path) -> bool:
    if name == "output_config":
        return value is False
    return isinstance(value, str) and expanded(Path(value), name).resolve() == path.resolve()


def _unknown_keys(path: Path, unknown: list[str], specs: Mapping[str, FlagSpec]) -> str:
    lines = [f"{path}: no flag is called {key!r}{nearest(key, specs)}" for key in unknown]
    return "; ".join(lines) + "; mend or remove the line" + ("s" if len(lines) > 1 else "")


def warn_of_gui_keys(keys: tuple[str, ...], path: Path | None) -> None:
    """Names the keys of graphical front ends that were found in the file, with the reasons, in one warning."""
    by_reason: dict[str, list[str]] = {}
    for key in keys:
        by_reason.setdefault(REASONS[key], []).append(key)
    if by_reason:
        parts = [f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()]
        logger.warning("%s: these keys are no flags and have no effect: %s", path, "; ".join(parts))


def write_config_file(path: Path | None, given: Mapping[str, Any]) -> None:
    """Writes the given flags as TOML; ``given`` must be free of secrets.

    Raises:
        SettingsError: there is no path, the file exists already, or a value cannot be written as UTF-8.
    """
    if path is None:
        raise SettingsError("--output_config writes to the file that --config_file names; add --config_file")
    if path.suffix != ".toml":
        path = path.with_name(path.name + ".toml")
    if path.exists() and process_rank() == 0:
        raise SettingsError(f"--output_config: {path} exists already; remove it or give another --config_file")
    if process_rank() != 0:
        return  # the launcher's first process writes it
    lines = [f"{name} = {toml_text(_plain(name, value), name)}\n" for name, value in given.items()]
    write_text(path, "".join(lines))
    logger.info("Wrote %s", path)


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(name, item) for item in value]
    if name in ("lr_warmup_steps", "lr_decay_steps") and isinstance(value, float) and value == 1:
        return "100%"  # 1.0 would be read back as one step
    return value


def toml_text(value: Any, name: str) -> str:
    """Returns a bool, number, text or list of them in TOML's notation.

    Raises:
        SettingsError: a text is no Unicode, as the bytes of a file name may be.
    """
    if isinstance(value, list):
        return f"[{', '.join(toml_text(item, name) for item in value)}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return repr(value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise SettingsError(
            f"--output_config: --{name} {value!r} is not UTF-8 text, so it cannot be written"
        ) from error
    # JSON's escapes are TOML's; DEL is the one character that only TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
