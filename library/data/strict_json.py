"""JSON files that people write: a key that stands twice is an error, where Python silently keeps the last one."""

from __future__ import annotations

import json
from typing import Any

from library.errors import DatasetError


def load_json(text: str, origin: str) -> Any:
    """Returns the content of a JSON text.

    Args:
        text: the file's content.
        origin: flag and file, for messages.

    Raises:
        DatasetError: a key stands twice in one table, or tables are nested beyond reason.
        json.JSONDecodeError: the text is no JSON.
    """

    def to_table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            seen: set[str] = set()
            for name, _ in pairs:
                if name in seen:
                    raise DatasetError(f"{origin}: the key {name!r} stands twice in one table; keep one.")
                seen.add(name)
        return table

    try:
        return json.loads(text, object_pairs_hook=to_table)
    except RecursionError as error:
        raise DatasetError(f"{origin} is nested too deeply to be a dataset file.") from error
