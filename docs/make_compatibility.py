"""Writes docs/sd_scripts_compatibility.md: one row for each flag and each dataset key of sd-scripts' Lumina trainer.

    python docs/make_compatibility.py            # write
    python docs/make_compatibility.py --check    # exit code 1 where the file is not up to date

The flags come from the recorded list tests/golden/sd_scripts_flags.json, what happens with them from the code, and how
something is better here from docs/compatibility_texts.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compatibility_texts import BETTER_FLAGS, BETTER_KEYS

from library.data import schema
from library.files import write_text
from library.settings import FlagSpec
from library.training.arguments import all_specs
from library.training.legacy_flags import IGNORED, REFUSED

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "sd_scripts_compatibility.md"
_RECORDED = ROOT / "tests" / "golden" / "sd_scripts_flags.json"

WORKS, BETTER, NO_EFFECT, REFUSES = "works", "better than there", "accepted without effect", "not available"

_HEAD = """\
# What becomes of sd-scripts' flags and dataset keys

Written by `python docs/make_compatibility.py` from the code and from the recorded list of sd-scripts' flags (its
`lumina_train_network.py` of February 2026); do not edit it by hand.

* **works**: does what it does there.
* **better than there**: does that, and the row says what it does better.
* **accepted without effect**: a run that sets it goes on and names it once in a warning, with the reason in the row.
* **not available**: a run that sets it ends at once with the reason in the row, instead of doing something else than asked.

A value equal to sd-scripts' default asks for nothing, so front ends may write all of them. What front ends write besides
is in [config_file.md](config_file.md); every flag's type and default is in [flags.md](flags.md).
"""

_TAIL = """\
## 日本語

sd-scripts の `lumina_train_network.py` のフラグとデータセット設定のキーが、ここでどう扱われるかの一覧です。

* **works**: sd-scripts と同じ動作です。
* **better than there**: 同じ動作に加えて、改善された点が右の列にあります。
* **accepted without effect**: 受け付けますが効果はなく、実行時の警告で理由が一度だけ表示されます。
* **not available**: 指定すると、理由を表示してすぐに終了します。

sd-scripts の既定値と同じ値は「指定なし」として扱われるので、GUI がすべてのフラグを書き出しても問題ありません。表はコードから
生成しているため英語です。
"""


def recorded_flags() -> list[str]:
    """Returns the names of sd-scripts' flags in its own order."""
    return [flag["dest"] for flag in json.loads(_RECORDED.read_text(encoding="utf-8"))]


def flag_rows() -> list[tuple[str, str, str]]:
    """Returns (flag, what becomes of it, why or how) for each of sd-scripts' flags, in its order."""
    return [(name, *_flag(name)) for name in recorded_flags()]


def _flag(name: str) -> tuple[str, str]:
    for specs, status in ((IGNORED, NO_EFFECT), (REFUSED, REFUSES)):
        spec = next((spec for spec in specs if spec.name == name), None)
        if spec is not None:
            return status, spec.help
    if name not in _known():
        raise KeyError(f"--{name} of sd-scripts is not known to the command line")
    return (BETTER, BETTER_FLAGS[name]) if name in BETTER_FLAGS else (WORKS, "")


def _known() -> set[str]:
    return {name for spec in all_specs().values() for name in (spec.name, *spec.aliases)}


def key_rows() -> list[tuple[str, str, str, str]]:
    """Returns (key, where it may stand, what becomes of it, why or how) for each key of sd-scripts' dataset file."""
    rows = []
    for key in schema.KEYS.values():
        if key.name in new_keys():
            continue
        levels = ", ".join(f"`{level}`" for level in key.levels)
        if key is schema.WITHOUT_EFFECT:
            status, text = NO_EFFECT, "sd-scripts reads it and never uses it"
        else:
            status, text = (BETTER, BETTER_KEYS[key.name]) if key.name in BETTER_KEYS else (WORKS, "")
        rows.append((key.name, levels, status, text))
    return rows


def new_flags() -> list[FlagSpec]:
    """Returns the flags that sd-scripts does not have."""
    recorded = set(recorded_flags())
    return [spec for spec in all_specs().values() if spec.name not in recorded]


def new_keys() -> set[str]:
    """Returns the keys of the dataset file that sd-scripts does not have: those that stand for flags it does not have."""
    return {key.name for key in schema.KEYS.values() if key.flag in {spec.name for spec in new_flags()}}


def unused_texts() -> set[str]:
    """Returns names in docs/compatibility_texts.py that are no flag or key which works."""
    works = {name for name, status, _ in flag_rows() if status in (WORKS, BETTER)}
    return (BETTER_FLAGS.keys() - works) | (BETTER_KEYS.keys() - schema.KEYS.keys())


def _table(heading: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heading = list(heading)
    return "\n".join(_row(cells) for cells in (heading, ["---"] * len(heading), *rows))


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def page() -> str:
    """Returns the whole page.

    Raises:
        KeyError: the recorded list holds a flag that the command line does not know.
    """
    flags, keys = flag_rows(), key_rows()
    counts = Counter(status for _, status, _ in flags)
    summary = ", ".join(f"{counts[status]} {status}" for status in (WORKS, BETTER, NO_EFFECT, REFUSES))
    flag_table = _table(
        ("Flag", "Here", "How, or why"), ((f"`--{name}`", status, text) for name, status, text in flags)
    )
    key_table = _table(
        ("Key", "Where", "Here", "How, or why"),
        ((f"`{name}`", levels, status, text) for name, levels, status, text in keys),
    )
    new_table = _table(
        ("Flag", "Key too", "Meaning"),
        ((f"`--{spec.name}`", "yes" if spec.name in new_keys() else "", spec.help) for spec in new_flags()),
    )
    return (
        f"{_HEAD}\n## Flags\n\n{len(flags)} flags: {summary}.\n\n{flag_table}\n\n## Dataset file\n\n{key_table}\n\n"
        f"## Flags that sd-scripts does not have\n\n{new_table}\n\n{_TAIL}"
    )


def main() -> int:
    """Writes or checks the file and returns the exit code."""
    parser = argparse.ArgumentParser(description="Writes docs/sd_scripts_compatibility.md from the code.")
    parser.add_argument("--check", action="store_true", help="only say whether the file is up to date")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if unused := unused_texts():
        logger.error("docs/compatibility_texts.py speaks of what does not work: %s", ", ".join(sorted(unused)))
        return 1
    new = page()
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == new:
        logger.info("docs/sd_scripts_compatibility.md is up to date")
        return 0
    if options.check:
        logger.error("docs/sd_scripts_compatibility.md is not up to date; run: python docs/make_compatibility.py")
        return 1
    write_text(PAGE, new)
    logger.info("wrote docs/sd_scripts_compatibility.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
