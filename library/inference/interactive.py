"""Prompts typed at the keyboard, one after the other."""

from __future__ import annotations

import dataclasses
import io
import logging
import sys

from library.errors import UserError
from library.inference.painter import Painter
from library.prompts import TYPED_OPTIONS, Prompt, parse_line

logger = logging.getLogger(__name__)

HELP = (
    "Type a prompt, with options behind it: --w --h size, --s steps, --g guidance, --d seed, --n negative prompt, --ctr,"
    " --rcfg, --m multipliers of the LoRAs. All but --d and --n hold for the prompts that follow. exit ends."
)


def interact(painter: Painter, first: Prompt) -> None:
    """Draws prompts typed by the user until ``exit`` or the end of input.

    Sizes, steps, guidance and multipliers hold until they are changed; seed and negative prompt are for one prompt.
    """
    logger.info("%s", HELP)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    current = dataclasses.replace(first, seed=None)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line.lower() == "exit":
            return
        if line.lower() in ("help", "?"):
            logger.info("%s", HELP)
        if not line or line.lower() in ("help", "?"):
            continue
        try:
            prompt = parse_line(line, current, "prompt", TYPED_OPTIONS).rounded()
            # A line of options alone draws the last prompt again.
            prompt = dataclasses.replace(prompt, prompt=prompt.prompt or current.prompt)
            painter.draw([prompt])
        except UserError as error:
            logger.error("%s", error)
            continue
        except (RuntimeError, OSError) as error:  # too large a picture, a full disk: the next prompt may do
            logger.error(
                "This prompt could not be drawn: %s", next(iter(str(error).splitlines()), type(error).__name__)
            )
            continue
        current = dataclasses.replace(prompt, seed=None, negative_prompt=first.negative_prompt)
