"""Which texts get a system prompt: one rule for training, previews and inference."""

from __future__ import annotations

from dataclasses import dataclass


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
        return f"{system_prompt} <Prompt Start> {caption}" if system_prompt else caption

    @property
    def fingerprint(self) -> str:
        """What encoded texts depend on besides themselves; the system prompt itself under the official rule."""
        return self.filled if not self.empty else f"{self.filled}\n<empty>\n{self.empty}"
