"""What a run says of its flags before anything else: which have no effect, which were replaced, which are missing."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from library.training.arguments import all_specs
from library.training.config_file import warn_of_gui_keys
from library.training.optimizer_names import warn_where_no_rate_is_given
from library.training.precedence import say_what_is_switched_off
from library.training.unused_flags import warn_of_ignored, warn_of_unused

if TYPE_CHECKING:
    from library.training.arguments import TrainConfig

logger = logging.getLogger(__name__)


def give_notices(config: TrainConfig) -> None:
    """Says all that the flags alone tell, each kind in one line."""
    given = config.given
    warn_of_gui_keys(config.gui_keys, config.config_file)
    say_what_is_switched_off(config.switched_off, config.config_file)
    warn_of_ignored(given)
    warn_of_unused(config, all_specs())
    if (
        "learning_rate" in config.typed
        and config.optimizer.unet_lr
        and "unet_lr" not in config.typed
        and config.trains_dit
    ):
        logger.warning(
            "--learning_rate %g is not the transformer's, which has unet_lr = %g in %s; type --unet_lr to change it",
            config.optimizer.learning_rate,
            config.optimizer.unet_lr,
            config.config_file,
        )
    warn_where_no_rate_is_given(config.optimizer, "learning_rate" in given, config.own_rates)
    name = config.output.output_name
    if given.get("output_name", name) != name:
        logger.info(
            "--output_name %s: the ending is left out, because it is added anyway; the name is %s",
            given["output_name"],
            name,
        )
