"""Which texts get a system prompt: one rule for training, previews and inference."""

from __future__ import annotations

import logging
from dataclasses import dataclass

logger = logging.getLogger(__name__)

MARK = "<Prompt Start>"
"""Stands between the system prompt and the caption."""
EXAMPLE = "You are an assistant designed to generate high-quality images based on user prompts."


def plain_system_prompt(text: str) -> str:
    """Returns a system prompt without the mark behind it, which the template puts there.

    Users of programs that have no flag for it, such as ComfyUI, know the two as one text.
    """
    plain = text
    while plain.rstrip().endswith(MARK):
        plain = plain.rstrip().removesuffix(MARK).rstrip()
    return plain


def say_what_was_left_out(given: str, used: str) -> None:
    """Says so where a system prompt was given with the mark behind it."""
    if given != used:
        logger.info(
            '--system_prompt: the %s at its end is left out, because it is added anyway; used is "%s"', MARK, used
        )


def system_prompt_of(text: str) -> str:
    """Returns the system prompt of a text as it is encoded: what stands before the mark; "" where there is none."""
    before, mark, _ = text.partition(MARK)
    return before.strip() if mark else ""


def warn_of_two_marks(num: int, what: str) -> None:
    """Warns where ``--system_prompt`` comes before ``num`` texts that have a system prompt inside already."""
    if num:
        logger.warning(
            "--system_prompt comes before %d of the %s, which have a %s inside already; keep one of the two system prompts",
            num,
            what,
            MARK,
        )


@dataclass(frozen=True)
class PromptTemplate:
    """The system prompts of one kind of texts: captions and prompts, or negative prompts.

    The official rule is that filled captions have one, and that empty ones (dropped, or an empty negative prompt) have
    none.

    Attributes:
        filled: system prompt of texts that are not empty; "" = none.
        empty: system prompt of empty texts; "" = none.
    """

    filled: str = ""
    empty: str = ""

    @classmethod
    def of_captions(cls, system_prompt: str, on_empty: bool = False) -> PromptTemplate:
        """Returns the template of captions and of prompts."""
        return cls(system_prompt, system_prompt if on_empty else "")

    @classmethod
    def of_negatives(cls, system_prompt: str, on_empty: bool = False, on_filled: bool = False) -> PromptTemplate:
        """Returns the template of negative prompts, which have the system prompt only where the user asks for it."""
        return cls(system_prompt if on_filled else "", system_prompt if on_empty else "")

    def text(self, caption: str) -> str:
        """Returns the text that is encoded for a caption: ``"{system} <Prompt Start> {caption}"``."""
        system_prompt = self.filled if caption else self.empty
        return f"{system_prompt} {MARK} {caption}" if system_prompt else caption

    @property
    def fingerprint(self) -> str:
        """What encoded texts depend on besides themselves; the system prompt itself under the official rule."""
        return self.filled if not self.empty else f"{self.filled}\n<empty>\n{self.empty}"
