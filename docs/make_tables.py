"""Writes the tables of flags, dataset keys and network arguments into docs/flags.md, from their declarations in the code.

    python docs/make_tables.py            # write
    python docs/make_tables.py --check    # exit code 1 where the file is not up to date

Each table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; the text around them is written by hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.data import schema
from library.data.settings import DataSettings
from library.errors import NetworkError
from library.files import write_text
from library.inference.settings import CompareFlags, ModelFlags, PictureFlags
from library.memory.settings import AttentionSettings, QuantisationSettings
from library.settings import FlagSpec, specs_of
from library.training.arguments import GROUPS, ConfigFileSettings
from library.training.legacy_flags import IGNORED, REFUSED
from networks.convert_lumina_lora import ConvertFlags
from networks.lora_lumina_args import GEMMA2, LUMINA, NetworkArgs, check_network_args
from networks.lora_table import Table
from networks.merge_lumina_lora import MergeFlags

logger = logging.getLogger(__name__)

FLAGS_FILE = Path(__file__).resolve().parent / "flags.md"
_TABLE = re.compile(r"(<!-- table: (?P<name>[a-z ]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

_KINDS = {bool: "on/off", int: "whole number", float: "number", str: "text", Path: "path"}
# Flags that read their own value; a new one is to be named here.
_OWN_TYPES = {
    "resolution": "`N` or `W,H`",
    "lr_warmup_steps": "steps, share or `%`",
    "lr_decay_steps": "steps, share or `%`",
    "token_warmup_step": "steps or share",
    "face_crop_aug_range": "`lo,hi`",
    "vram_gb": "GiB or `auto`",
}
# Keys of the dataset file that no flag describes.
_KEY_HELP = {
    "image_dir": "folder of the pictures; its sub-folders are not searched",
    "metadata_file": "file (.json or .jsonl) with the captions of pictures, instead of caption files",
    "conditioning_data_dir": "folder of mask pictures, named as the pictures; acts with `--masked_loss`",
    "is_reg": "these are regularisation pictures: repeated to the number of the others, weighed by `--prior_loss_weight`",
    "class_tokens": "caption of pictures that have no caption file",
    "custom_attributes": "`diff_output_preservation = true`: these pictures keep the base model's prediction as it is",
}
_NONE = "–"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_cell(text) for text in cells) + " |"


def _cell(text: str) -> str:
    text = text.replace("|", "\\|")
    # Outside code, Markdown takes <...> for HTML and hides it.
    return text if text.startswith("`") else text.replace("<", "&lt;")


def _table(heading: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heading = list(heading)
    return "\n".join([_row(heading), _row("---" for _ in heading), *(_row(row) for row in rows)])


def _value(value: Any) -> str:
    if value is None or value == ():
        return _NONE
    if isinstance(value, tuple):
        return f"`{' '.join(map(str, value))}`"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Path):
        return f"`{value.as_posix()}`"
    return "empty" if value == "" else f"`{value}`"


def _type(spec: FlagSpec) -> str:
    if spec.parse is not None:
        return _OWN_TYPES[spec.name]
    if spec.choices:
        return ", ".join(f"`{choice}`" for choice in spec.choices)
    return _KINDS[spec.kind] + (", one or more" if spec.many else "")


def flag_table(specs: Iterable[FlagSpec]) -> str:
    """Returns the table of flags: name, type or choices, default, meaning."""
    rows = []
    for spec in specs:
        names = ", ".join(f"`--{name}`" for name in (spec.name, *spec.aliases))
        rows.append((names, _type(spec), _value(spec.default), spec.help))
    return _table(("Flag", "Value", "Default", "Meaning"), rows)


def _training() -> str:
    groups = [("flags in a file", ConfigFileSettings), *GROUPS.values()]
    parts = [f"### {title.capitalize()}\n\n{flag_table(specs_of(settings))}" for title, settings in groups]
    return "\n\n".join(parts)


def _inference() -> str:
    further = [spec for settings in (AttentionSettings, QuantisationSettings) for spec in specs_of(settings)]
    return flag_table([*specs_of(ModelFlags), *further, *specs_of(PictureFlags), *specs_of(CompareFlags)])


def legacy_table(specs: Iterable[FlagSpec]) -> str:
    """Returns the table of sd-scripts flags that are not acted on: name, the value that asks for nothing, reason."""
    rows = [(f"`--{spec.name}`", _value(spec.default), spec.help) for spec in specs]
    return _table(("Flag", "sd-scripts' default", "Why"), rows)


def _expected(read: Callable[[Any], Any]) -> str:
    """Returns what a reader of a dataset key says that it expects."""
    try:
        read(object())
    except ValueError as error:
        return str(error).removeprefix("expected ")
    raise TypeError("the reader takes anything, so its key does not belong into this table")


def _dataset_keys() -> str:
    flags = {spec.name: spec for spec in specs_of(DataSettings)}
    rows = []
    for key in (*schema.DATASET_KEYS, *schema.SUBSET_KEYS):
        spec = flags[key.flag] if key.flag else None
        help_text = spec.help if spec else _KEY_HELP[key.name]
        flag = f"`--{spec.name}`" if spec else _NONE
        default = _value(spec.default) if spec else _NONE
        levels = ", ".join(f"`{level}`" for level in key.levels)
        rows.append((f"`{key.name}`", _expected(key.read), default, levels, flag, help_text))
    return _table(("Key", "Value", "Default", "Where", "Flag", "Meaning"), rows)


def _dataset_keys_refused() -> str:
    rows = [(f"`{schema.WITHOUT_EFFECT.name}`", "accepted, without effect")]
    return _table(("Key", "What happens"), rows)


def _argument_values(name: str) -> str:
    """Returns what ``networks.lora_lumina`` expects of an argument, from its own message."""
    try:
        check_network_args({name: "?"})
    except NetworkError as error:
        return str(error).partition("expected ")[2]
    raise TypeError(f"{name} takes anything; describe it")


def _network_args() -> str:
    rows = [
        (f"`{field.name}`", _argument_values(field.name), _value(field.default), field.metadata["help"])
        for field in dataclasses.fields(NetworkArgs)
    ]
    return _table(("Argument", "Value", "Default", "Meaning"), rows)


def _components() -> str:
    def rows(table: Table) -> Iterable[tuple[str, ...]]:
        for component in table.components:
            arguments = ", then ".join(f"`{name}`" for name in component.rank_arguments)
            without = "`--network_dim`" if component.on_by_default else "not trained"
            yield f"`{table.prefix}_`", component.name, arguments or _NONE, without

    return _table(
        ("Names begin with", "Component", "Rank is set by (the first one given)", "Else"),
        [*rows(LUMINA), *rows(GEMMA2)],
    )


TABLES: dict[str, Callable[[], str]] = {
    "training": _training,
    "ignored": lambda: legacy_table(IGNORED),
    "refused": lambda: legacy_table(REFUSED),
    "inference": _inference,
    "converter": lambda: flag_table(specs_of(ConvertFlags)),
    "merger": lambda: flag_table(specs_of(MergeFlags)),
    "dataset keys": _dataset_keys,
    "dataset keys refused": _dataset_keys_refused,
    "network arguments": _network_args,
    "components": _components,
}


def up_to_date(text: str) -> str:
    """Returns the text with the content of every table replaced by what the code says now.

    Raises:
        KeyError: a marker names a table that does not exist.
        ValueError: a table has no place in the text.
    """
    places = {match["name"] for match in _TABLE.finditer(text)}
    if missing := TABLES.keys() - places:
        raise ValueError(f"no markers for {', '.join(sorted(missing))}")
    return _TABLE.sub(lambda match: f"{match[1]}\n{TABLES[match['name']]()}\n\n{match[3]}", text)


def main() -> int:
    """Writes or checks the file and returns the exit code."""
    parser = argparse.ArgumentParser(description="Writes the tables in docs/flags.md from the code.")
    parser.add_argument("--check", action="store_true", help="only say whether the file is up to date")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    text = FLAGS_FILE.read_text(encoding="utf-8")
    new = up_to_date(text)
    if text == new:
        logger.info("docs/flags.md is up to date")
        return 0
    if options.check:
        logger.error("docs/flags.md is not up to date; run: python docs/make_tables.py")
        return 1
    write_text(FLAGS_FILE, new)
    logger.info("wrote docs/flags.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
