"""Difference output preservation: some pictures are trained to leave the model's prediction as it is without the network.

Their target is the model's own prediction with the network switched off. So a network learns its subject from some
pictures and is told by others (of the same class, say) what not to change.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from library.data.config import DatasetConfig
from library.errors import SettingsError

logger = logging.getLogger(__name__)

_IN_USE = 1.0  # the multiplier that the trainer builds networks with


@contextlib.contextmanager
def without_network(network: Any) -> Iterator[None]:
    """Switches every part of the network off while the block runs."""
    network.set_multiplier(0.0)
    try:
        yield
    finally:
        network.set_multiplier(_IN_USE)


def indices_of(preserves: Iterable[bool]) -> list[int]:
    """Returns the places of the samples whose output is preserved."""
    return [index for index, value in enumerate(preserves) if value]


def check_can_be_switched_off(network: Any, datasets: Sequence[DatasetConfig], module: str) -> None:
    """Makes sure that the network can be switched off, where a folder asks for that.

    Raises:
        SettingsError: it cannot.
    """
    asking = [subset.image_dir for config in datasets for subset in config.subsets if subset.preserves_output]
    why = None if callable(getattr(network, "set_multiplier", None)) else "it has no set_multiplier"
    if any(getattr(part, "wd", False) is True for part in network.modules()):  # LyCORIS' name
        why = "with dora_wd a multiplier of 0 leaves its direction in place"
    if asking and why:
        raise SettingsError(
            f"diff_output_preservation of {asking[0]} needs a network that can be switched off, and that of"
            f" --network_module {module} cannot ({why}); leave diff_output_preservation out or use networks.lora_lumina"
        )


def warn_where_nothing_is_learned(datasets: Sequence[DatasetConfig]) -> None:
    """Warns where every picture is trained to change nothing."""
    preserves = [subset.preserves_output for config in datasets for subset in config.subsets]
    if preserves and all(preserves):
        logger.warning(
            "Every picture has diff_output_preservation, so the network is only taught to change nothing, and a new one"
            " stays as it is; leave it out for the pictures that are to be learned"
        )
