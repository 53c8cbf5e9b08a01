"""How often regularisation pictures are shown: together as often as the pictures that are trained."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from library import keyed_random
from library.data.items import Item

logger = logging.getLogger(__name__)


def balanced(items: Sequence[Item], seed: int) -> list[Item]:
    """Returns the items with regularisation pictures repeated so that they match the others, in each dataset.

    ``num_repeats`` of their subsets say how often they are shown relative to each other. Where they are too many, some are
    left out, chosen by the seed.

    Args:
        items: pictures of all datasets, in the order of their indexes.
        seed: of the run.
    """
    showings: dict[int, int] = {}
    of_dataset: dict[int, list[Item]] = {}
    for item in items:
        if item.subset.is_reg:
            of_dataset.setdefault(item.dataset_index, []).append(item)
        else:
            showings[item.dataset_index] = showings.get(item.dataset_index, 0) + item.num_repeats
    if not of_dataset:
        return list(items)
    repeats: dict[int, int] = {}
    for dataset_index, regularising in of_dataset.items():
        # In this order those that are left out, or shown once more than others, are spread over all folders.
        ordered = sorted(
            regularising, key=lambda item: keyed_random.key("regularisation", seed, item.dataset_index, item.name)
        )
        weights = [item.subset.num_repeats for item in ordered]
        counts = share_out(showings.get(dataset_index, 0), weights)
        repeats.update({item.index: count for item, count in zip(ordered, counts, strict=True)})
    shown = []
    for item in items:
        count = repeats.get(item.index, item.num_repeats)
        if count:
            shown.append(item if count == item.num_repeats else dataclasses.replace(item, num_repeats=count))
    return shown


def share_out(showings: int, weights: Sequence[int]) -> list[int]:
    """Returns how often each picture is shown, ``showings`` in all: whole rounds of the weights, then a part of one."""
    rounds, rest = divmod(showings, sum(weights))
    counts = []
    for weight in weights:
        more = min(weight, rest)
        rest -= more
        counts.append(rounds * weight + more)
    return counts


def report(items: Sequence[Item], shown: Sequence[Item]) -> None:
    """Says how many of the regularisation pictures of each dataset are used, and how often they are shown."""
    for dataset_index in sorted({item.dataset_index for item in items if item.subset.is_reg}):
        there = sum(1 for item in items if item.dataset_index == dataset_index and item.subset.is_reg)
        used = [item for item in shown if item.dataset_index == dataset_index and item.subset.is_reg]
        logger.info(
            "Dataset %d: %d of %d regularisation pictures are used, %d times an epoch in all, as often as the others",
            dataset_index + 1,
            len(used),
            there,
            sum(item.num_repeats for item in used),
        )
