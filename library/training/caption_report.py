"""What the log says of captions: those that are too long for the text encoder, and those that are too many to keep."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from library.data import captions as rules
from library.errors import some
from library.lumina import prompt_template
from library.prompts import Prompt

if TYPE_CHECKING:
    from library.data.dataset import TrainingData
    from library.data.items import Item

logger = logging.getLogger(__name__)

_SAMPLED = 200  # captions that are measured to estimate the size of all
_SUGGESTED_VARIANTS = (1, 4, 16)
_COUNTED_AT_A_TIME = 1000


class CountsTokens(Protocol):
    """What is needed of a tokenizer."""

    def counts(self, texts: Sequence[str]) -> list[int]:
        """Returns how many tokens each text has, without cutting off."""


def training_captions(data: TrainingData) -> Iterator[tuple[str, list[str]]]:
    """Yields (file name, captions) for every picture: the longest captions that its text can become in this run."""
    for item in (*data.items, *data.validation_items):
        if item.subset.caption_dropout_rate < 1 and item.subset.caption_dropout_every_n_epochs != 1:
            yield item.name, rules.longest_captions(item.subset, item.caption)


def report_system_prompt(given: str, used: str, data: TrainingData, prompts: Sequence[Prompt]) -> None:
    """Says what of ``--system_prompt`` was left out, where there is none, and where texts bring one of their own.

    Args:
        given: as the user wrote it.
        used: put before captions and prompts.
        data: the datasets; captions may have a system prompt inside, also as ``caption_prefix``.
        prompts: of the previews.
    """
    prompt_template.say_what_was_left_out(given, used)
    captions = _with_prefixes((*data.items, *data.validation_items))
    num_marked = sum(prompt_template.MARK in caption for caption in captions)
    if used:
        prompt_template.warn_of_two_marks(num_marked, "captions")
        num_marked = sum(prompt_template.MARK in prompt.prompt for prompt in prompts)
        prompt_template.warn_of_two_marks(num_marked, "sample prompts")
    elif not num_marked:
        logger.info(
            "No --system_prompt is given. The model itself was trained with one before every caption; a LoRA that was"
            ' trained without one is to be drawn without one. This would add one: --system_prompt "%s"',
            prompt_template.EXAMPLE,
        )


def system_prompt_of_training(used: str, items: Iterable[Item]) -> str | None:
    """Returns the system prompt that captions are trained with, "" for none, ``None`` where it is not the same for all.

    Args:
        used: of ``--system_prompt``.
        items: the pictures; their captions may have a system prompt inside.
    """
    if used:
        return used
    inside = {prompt_template.system_prompt_of(caption) for caption in _with_prefixes(items) if caption.strip()}
    return next(iter(inside), "") if len(inside) < 2 else None


def _with_prefixes(items: Iterable[Item]) -> Iterator[str]:
    return (f"{item.subset.caption_prefix or ''} {item.caption}" for item in items)


def warn_of_long_captions(
    captions: Iterable[tuple[str, Sequence[str]]],
    full_text: Callable[[str], str],
    tokenizer: CountsTokens,
    limit: int,
    what: str,
) -> None:
    """Warns once of captions that are longer than the text encoder takes, with their names and numbers of tokens.

    Only captions that could be too long are tokenised: a token has at least one byte.

    Args:
        captions: (name, its possible captions).
        full_text: adds the system prompt.
        tokenizer: counts.
        limit: of tokens.
        what: they are.
    """
    found: dict[int, tuple[str, int]] = {}
    waiting: list[tuple[int, str, str]] = []
    num_names = 0

    def count_waiting() -> None:
        counts = tokenizer.counts([text for _, _, text in waiting])
        for (number, name, _), num_tokens in zip(waiting, counts, strict=True):
            if num_tokens > max(limit, found.get(number, ("", 0))[1]):
                found[number] = name, num_tokens
        waiting.clear()

    for number, (name, texts) in enumerate(captions):
        num_names += 1
        for text in map(full_text, texts):
            # Besides the bytes there are BOS and the mark that tokenizers may put before the first word.
            if 4 * len(text) + 2 > limit and len(text.encode("utf-8", "replace")) + 2 > limit:
                waiting.append((number, name, text))
        if len(waiting) >= _COUNTED_AT_A_TIME:
            count_waiting()
    count_waiting()
    if found:
        by_length = sorted(found.values(), key=lambda entry: -entry[1])
        logger.warning(
            "%d of %d %s are longer than --gemma2_max_token_length %d with the system prompt; their ends are cut off:"
            " %s. A larger --gemma2_max_token_length reads them whole",
            len(found),
            num_names,
            what,
            limit,
            some([f"{name} ({num_tokens} tokens)" for name, num_tokens in by_length]),
        )


def warn_of_many_captions(data: TrainingData, num_epochs: int, size_bytes: Callable[[Iterable[str]], int]) -> None:
    """Says where more captions than pictures are going to be encoded and kept, and what would need less.

    It is a warning where they are large.

    Args:
        data: the datasets, with their clock set.
        num_epochs: of the run.
        size_bytes: returns how many bytes the features of captions take.
    """
    plan, items = data.caption_plan, data.items
    most = plan.most(items, num_epochs)
    if most <= len(items):
        return
    sampled = items[:: max(1, len(items) // _SAMPLED)]
    texts = [caption for item in sampled for caption in rules.longest_captions(item.subset, item.caption)[:1]]
    mean_gib = size_bytes(texts) / len(texts) / 2**30
    fewer = {number: plan.most(items, num_epochs, number) for number in _SUGGESTED_VARIANTS}
    offers = [
        f"{k} it would be {count} captions, {_size(count * mean_gib)}" for k, count in fewer.items() if count < most
    ]
    logger.log(
        logging.WARNING if most * mean_gib >= 1 else logging.INFO,
        "Shuffled, chosen or growing captions give up to %d different ones for %d pictures in %d epochs; each is encoded"
        " once and kept, about %s.%s",
        most,
        len(items),
        num_epochs,
        _size(most * mean_gib),
        f" With --caption_variants {', with '.join(offers)}" if offers else "",
    )


def _size(gib: float) -> str:
    return f"{gib:.1f} GiB" if gib >= 1 else f"{gib * 1024:.1f} MiB"
