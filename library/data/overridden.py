"""Flags that have no effect because the dataset file says otherwise everywhere: named once, with what it says and where."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.data import schema
from library.settings import as_given, shown, specs_of

if TYPE_CHECKING:
    from library.data.config import DatasetConfig
    from library.data.settings import DataSettings

logger = logging.getLogger(__name__)

Said = Mapping[str, Mapping[Any, str]]
"""Key of the dataset file -> its values there -> the kind of table that each stands in."""


def warn_of_overridden(
    path: Path, said: Said, datasets: Sequence[DatasetConfig], settings: DataSettings, typed: Collection[str]
) -> None:
    """Warns of given flags whose value reaches no dataset and no subset.

    Args:
        path: the dataset file.
        said: what stands in it.
        datasets: what became of it.
        settings: the flags.
        typed: flags that stood on the command line. Others count as given where they differ from their default: front
            ends write every default.
    """
    defaults = {spec.name: spec.default for spec in specs_of(type(settings))}
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    parts = []
    for keys, owners in ((schema.DATASET_KEYS, datasets), (schema.SUBSET_KEYS, subsets)):
        for key in keys:
            if key.flag is None:
                continue
            value, used = getattr(settings, key.flag), [getattr(owner, key.name) for owner in owners]
            if value in used or (key.flag not in typed and value == defaults[key.flag]):
                continue
            instead = [f"{shown(one)} in {level}" for one, level in said.get(key.name, {}).items() if one in used]
            parts.append(f"{as_given(key.flag, value)} ({key.name} = {', '.join(instead)})")
    if parts:
        logger.warning(
            "These flags have no effect, because %s says otherwise: %s. Change the file, or remove its lines",
            path,
            ", ".join(parts),
        )
