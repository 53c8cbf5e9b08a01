"""Which pictures are held out of the training, to measure the loss on pictures that the network has not seen.

The split is made by content: what is held out is chosen by a keyed hash of each file's SHA-256, so neither names nor order
matter, and all copies of a picture, in whatever subset or dataset, lie on the same side.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

from library import keyed_random
from library.data.config import SubsetConfig
from library.data.items import Item
from library.errors import DatasetError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Split:
    """The two sides.

    Attributes:
        training: the items to train on.
        validation: the items to measure on, each picture once a dataset; their subsets ask for no augmentation.
        keys: per index of a validation item, the key of its draws of noise; it depends on seed and content alone.
    """

    training: tuple[Item, ...]
    validation: tuple[Item, ...] = ()
    keys: dict[int, int] = dataclasses.field(default_factory=dict)


def asks_for_split(items: Sequence[Item]) -> bool:
    """Tells whether any picture may have to be held out."""
    return any(_share(item.subset) > 0 for item in items)


def split_by_content(items: Sequence[Item], content_of: Callable[[Item], bytes], seed: int) -> Split:
    """Returns the two sides.

    Of each subset, ``round(share * number of different pictures)`` are held out. Regularisation pictures never are, nor
    are training pictures that are used for regularisation too.

    Args:
        items: all pictures that can be read.
        content_of: gives the SHA-256 of a picture.
        seed: where a subset has no ``validation_seed``.

    Raises:
        DatasetError: nothing would be left to train on.
    """
    contents = [content_of(item) for item in items]
    never = {content for item, content in zip(items, contents, strict=True) if item.subset.is_reg}
    held = _held_out(items, contents, never, seed)
    training, validation, keys = [], [], {}
    seen: set[tuple[int, bytes]] = set()
    quiet: dict[int, SubsetConfig] = {}
    num_copies = 0
    for item, content in zip(items, contents, strict=True):
        if content not in held:
            training.append(item)
            continue
        if _share(item.subset) == 0 or (item.dataset_index, content) in seen:
            num_copies += 1
            continue
        seen.add((item.dataset_index, content))
        subset = quiet.setdefault(id(item.subset), without_augmentation(item.subset))
        validation.append(dataclasses.replace(item, subset=subset, num_repeats=1))
        keys[item.index] = keyed_random.key("validation", _seed(item.subset, seed), content.hex())
    if num_copies:
        logger.info("%d copies of held-out pictures are neither trained on nor measured", num_copies)
    if not any(not item.subset.is_reg for item in training):
        raise DatasetError(
            f"validation_split holds out all {len(validation)} pictures, so nothing is left to train on; make it smaller,"
            " or add a subset without it."
        )
    return Split(tuple(training), tuple(validation), keys)


def without_augmentation(subset: SubsetConfig) -> SubsetConfig:
    """Returns the settings of a folder with nothing that chance decides, apart from wildcards."""
    return dataclasses.replace(
        subset,
        num_repeats=1,
        flip_aug=False,
        color_aug=False,
        random_crop=False,
        face_crop_aug_range=None,
        shuffle_caption=False,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
        token_warmup_step=0,
    )


def _held_out(items: Sequence[Item], contents: Sequence[bytes], never: set[bytes], seed: int) -> set[bytes]:
    """Returns the contents that are held out in any subset."""
    of_subset: dict[int, tuple[SubsetConfig, set[bytes]]] = {}
    for item, content in zip(items, contents, strict=True):
        if _share(item.subset) > 0:
            candidates = of_subset.setdefault(id(item.subset), (item.subset, set()))[1]
            if content not in never:
                candidates.add(content)
    held: set[bytes] = set()
    for subset, candidates in of_subset.values():
        count = round(_share(subset) * len(candidates))
        if count == 0:
            logger.warning(
                "validation_split %g of the %d pictures in %s that are not for regularisation too is less than one picture;"
                " none of them is held out"
                if never
                else "validation_split %g of the %d pictures in %s is less than one picture; none of them is held out",
                subset.validation_split,
                len(candidates),
                subset.metadata_file or subset.image_dir,
            )
            continue
        subset_seed = _seed(subset, seed)
        # The key of a picture is the same in every subset, so that copies are chosen together.
        ranked = sorted(candidates, key=lambda content: _rank(subset_seed, content))
        held.update(ranked[:count])
    return held


def _rank(seed: int, content: bytes) -> tuple[int, bytes]:
    return keyed_random.key("held out", seed, content.hex()), content


def _share(subset: SubsetConfig) -> float:
    return 0.0 if subset.is_reg else subset.validation_split


def _seed(subset: SubsetConfig, seed: int) -> int:
    return seed if subset.validation_seed is None else subset.validation_seed
