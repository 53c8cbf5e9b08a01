"""``--weighted_captions``: words that count more or less, in the notation of Stable Diffusion's front ends.

``(word)`` is 1.1 times, ``[word]`` a 1.1th, ``(word:1.3)`` 1.3 times; they may be nested, and brackets behind a backslash
are plain ones. The marks are taken out before the text is tokenized, so that Gemma2 never sees them.

A token's feature is moved along the line from the feature that the same place has in an empty text, as ComfyUI does it:
``empty + weight * (feature - empty)``. Scaling the feature itself, as for CLIP, would do nothing at all: the transformer's
caption embedder begins with an RMS norm, which takes every scale out again.

A text is ``"{system prompt} <Prompt Start> {caption}"``; brackets in the system prompt are plain.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from library.lumina.tokenizer import GemmaTokenizer

if TYPE_CHECKING:
    from torch import Tensor

_STEP = 1.1
_CAPTION_BEGINS = "<Prompt Start> "
_SPACE = "\u2581"  # sentencepiece's sign for a space
_MARK = re.compile(r"\\(?P<plain>[()\[\]\\])|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|(?P<mark>[()\[\]])")


def parse_weights(caption: str) -> tuple[str, list[float]]:
    """Returns the caption without marks, and the weight of each of its characters.

    A bracket that is never closed reaches to the end; one that was never opened is plain text.
    """
    characters: list[str] = []
    weights: list[float] = []
    opened: list[tuple[str, int]] = []

    def scale(begin: int, factor: float) -> None:
        weights[begin:] = [weight * factor for weight in weights[begin:]]

    def add(text: str) -> None:
        characters.extend(text)
        weights.extend([1.0] * len(text))

    end = 0
    for found in _MARK.finditer(caption):
        add(caption[end : found.start()])
        end = found.end()
        kind = opened[-1][0] if opened else ""
        if found["plain"]:
            add(found["plain"])
        elif found["weight"] is not None:
            if kind == "(" and math.isfinite(float(found["weight"])):
                scale(opened.pop()[1], float(found["weight"]))
            else:
                add(found[0])
        elif found["mark"] in "([":
            opened.append((found["mark"], len(characters)))
        elif (kind, found["mark"]) in (("(", ")"), ("[", "]")):
            scale(opened.pop()[1], _STEP if found["mark"] == ")" else 1 / _STEP)
        else:
            add(found["mark"])
    add(caption[end:])
    for kind, begin in opened:
        scale(begin, _STEP if kind == "(" else 1 / _STEP)
    return "".join(characters), weights


class WeightedTokenizer(GemmaTokenizer):
    """Gemma's tokenizer for texts whose captions hold marks: it counts and encodes the text without them."""

    def __init__(self, model_proto: bytes, max_tokens: int) -> None:
        super().__init__(model_proto, max_tokens)
        self.fingerprint += ", weighted"

    def encode(self, text: str) -> list[int]:
        """Returns BOS and the tokens of the text without marks, cut off at ``max_tokens``."""
        return super().encode(_split(text)[0])

    def count(self, text: str) -> int:
        """Returns how many tokens the text without marks has, BOS included, without cutting off."""
        return super().count(_split(text)[0])

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Returns :meth:`count` of each text."""
        return [self.count(text) for text in texts]

    def parts(self, text: str) -> tuple[str, str]:
        """Returns the text as it is where it is read whole; else its beginning and its end, both without marks."""
        kept, cut = super().parts(_split(text)[0])
        return (kept, cut) if cut else (text, "")

    def weights(self, text: str) -> list[float] | None:
        """Returns the weight of each token that :meth:`encode` gives; ``None`` where all are 1."""
        plain, weights = _split(text)
        if all(weight == 1 for weight in weights):
            return None
        valid = plain.encode("utf-8", "replace").decode("utf-8")
        spread = _spread(valid, weights)
        result = [1.0, *(_mean(spread[max(begin, 0) : end]) for begin, end in self._spans(valid))]
        return result[: self.max_tokens]

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """Returns where each token begins and ends in the text, in bytes of its UTF-8 form."""
        sizes = [
            1 if self._processor.IsByte(number) else len(piece.replace(_SPACE, " ").encode())
            for piece, number in zip(
                self._processor.EncodeAsPieces(text), self._processor.EncodeAsIds(text), strict=True
            )
        ]
        # A tokenizer that puts a space in front of every text, unlike Gemma's own.
        begin = len(text.replace(_SPACE, " ").encode()) - sum(sizes)
        spans = []
        for size in sizes:
            spans.append((begin, begin + size))
            begin += size
        return spans


def _split(text: str) -> tuple[str, list[float]]:
    """Returns a whole text without the marks of its caption, and the weight of each character."""
    head, begins, caption = text.rpartition(_CAPTION_BEGINS)
    plain, weights = parse_weights(caption)
    return head + begins + plain, [1.0] * len(head + begins) + weights


def _mean(spread: Sequence[tuple[float, bool]]) -> float:
    """Returns the mean weight of a token's bytes; spaces count only among themselves."""
    words = [weight for weight, is_space in spread if not is_space]
    counted = words or [weight for weight, _ in spread]
    return sum(counted) / len(counted) if counted else 1.0


def _spread(text: str, weights: Sequence[float]) -> list[tuple[float, bool]]:
    """Returns (weight, whether it is a space) for each byte of the text's UTF-8 form."""
    return [
        (weight, character.isspace())
        for character, weight in zip(text.replace(_SPACE, " "), weights, strict=True)
        for _ in character.encode()
    ]


def weigh(features: Tensor, empty: Tensor, weights: Sequence[float]) -> Tensor:
    """Returns the features with each token moved by its weight; tokens of weight 1 stay exactly as they are.

    Args:
        features: (L,D) of a text.
        empty: (L,D) of an empty text of the same length.
        weights: L numbers.
    """
    import torch

    from library.lumina.placement import copied_to

    factor = copied_to(torch.tensor(weights, dtype=torch.float32), features.device)[:, None]  # (L,1)
    moved = empty.float() + factor * (features.float() - empty.float())
    return torch.where(factor == 1, features, moved.to(features.dtype))
