"""From the text of a caption file to the caption that the model sees: pure functions.

The final caption is a function of the subset's settings, the raw text, the epoch, the key of the draw and, while the
number of tags is still growing, the optimizer step. So everything that a run will use can be listed before it starts.
"""

from __future__ import annotations

import math
import os
import random
import re
from pathlib import Path
from typing import NamedTuple

from library import keyed_random
from library.data.config import SubsetConfig
from library.errors import DatasetError

_CHOICE = re.compile(r"\{([^{}]+)\}")
# Private-use characters stand for escaped braces; they have no meaning in any text.
_OPEN, _CLOSE = "\ue000", "\ue001"


LINES_REMEDY = "join_caption_lines reads all lines as one caption, enable_wildcard one of them by chance"


def read_lines(picture: str | Path, extension: str) -> list[str]:
    """Returns the lines of the caption file beside a picture as :func:`lines_of` does, none where there is no file.

    Args:
        picture: path of the picture; its caption file has the same stem.
        extension: the caption file's extension with its dot.

    Raises:
        DatasetError: the file is not UTF-8 or cannot be read.
    """
    # Texts and not Path objects, which would cost more than the reading where there are 100,000.
    for stem in caption_stems(os.path.splitext(picture)[0]):  # noqa: PTH122
        content = _read(stem + extension)
        if content is not None:
            return lines_of(content)
    return []


def caption_stems(stem: str) -> tuple[str, ...]:
    """Returns the names without extension that a picture's caption file may have, the first to be looked for first.

    Tools that mark faces append ``_cx_cy_w_h`` to a picture's name; its caption file may have the name without that.
    """
    folder, name = os.path.split(stem)
    parts = name.split("_")
    return (stem, os.path.join(folder, "_".join(parts[:-4]))) if len(parts) >= 5 else (stem,)  # noqa: PTH118


def lines_of(text: str) -> list[str]:
    """Returns the lines that are not blank, without spaces at their ends."""
    # Not splitlines(), which also ends lines at characters that are part of a text, such as U+2028.
    return [line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip()]


def kept_lines(subset: SubsetConfig, lines: list[str]) -> list[str]:
    """Returns what of a caption's lines is used: all as one line, all (a wildcard chooses one), or the first alone."""
    if subset.join_caption_lines:
        return [" ".join(lines)] if lines else []
    return lines if subset.enable_wildcard else lines[:1]


def leaves_lines_out(subset: SubsetConfig, lines: list[str]) -> bool:
    """Tells whether a caption has lines that are never read."""
    return len(lines) > 1 and not (subset.join_caption_lines or subset.enable_wildcard)


def _read(path: str) -> str | None:
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            content = file.read()
        if b"\0" in content:
            raise DatasetError(f"The caption file {path} holds NUL bytes, so it is not UTF-8 text; save it as UTF-8.")
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"The caption file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8."
        ) from error
    except OSError as error:
        raise DatasetError(f"The caption file {path} cannot be read: {error.strerror}.") from error


class WarmUp(NamedTuple):
    """How far the growth of captions (``token_warmup_step``) has come: 0 <= step < num_steps."""

    step: int
    num_steps: int


def warm_up_at(subset: SubsetConfig, step: int | None, num_run_steps: int) -> WarmUp | None:
    """Returns where the growth of captions stands at an optimizer step, or ``None`` where it is over.

    Args:
        subset: the rules.
        step: optimizer steps done before this one; ``None``: after the growth.
        num_run_steps: of the whole run.
    """
    num_steps = warm_up_steps(subset, num_run_steps)
    return WarmUp(step, num_steps) if step is not None and step < num_steps else None


def warm_up_steps(subset: SubsetConfig, num_run_steps: int) -> int:
    """Returns for how many optimizer steps captions grow; a ``token_warmup_step`` below 1 is a share of the run."""
    given = subset.token_warmup_step
    return math.floor(given * num_run_steps) if given < 1 else int(given)


def final_caption(
    subset: SubsetConfig,
    raw: str,
    epoch: int,
    draw_key: int,
    warm_up: WarmUp | None = None,
    variant: int | None = None,
) -> str:
    """Returns the caption of one draw.

    Order: dropout of the whole caption; a random line, where there are several; prefix and suffix; ``{a|b}`` choices; as
    many tags as the warm-up shows; tag shuffling and dropout; the secondary separator.

    Args:
        subset: the rules.
        raw: text of the caption file, or the class tokens.
        epoch: counted from 1.
        draw_key: identity of the draw; equal keys give equal captions.
        warm_up: where the growth of captions stands.
        variant: which of the picture's few captions this is (``--caption_variants``). All but the dropout of the whole
            caption then depends on the text and this number alone: not on the seed or the picture's place, so that
            another run finds the same captions in its cache.
    """
    if not caption_varies(subset, raw):
        # The usual case for large datasets: no generator is needed.
        return "" if is_dropped_epoch(subset, epoch) else _assemble(subset, raw, None, warm_up)
    rng = keyed_random.python_random("caption", draw_key)
    dropped = rng.random() < subset.caption_dropout_rate
    if dropped or is_dropped_epoch(subset, epoch):
        return ""
    return _assemble(subset, raw, rng, warm_up) if variant is None else variant_caption(subset, raw, variant, warm_up)


def variant_caption(subset: SubsetConfig, raw: str, variant: int, warm_up: WarmUp | None = None) -> str:
    """Returns one of the few captions of a text (``--caption_variants``), not dropped as a whole."""
    return _assemble(subset, raw, keyed_random.python_random("caption variant", raw, variant), warm_up)


def undropped_caption(subset: SubsetConfig, raw: str, epoch: int) -> str | None:
    """Returns the caption with all its tags in their order, and with the first line and first choices of wildcards.

    ``None`` where the epoch drops all captions (no epoch 0 does).
    """
    return None if is_dropped_epoch(subset, epoch) else _assemble(subset, raw, None, None)


def longest_captions(subset: SubsetConfig, raw: str) -> list[str]:
    """Returns the longest captions that the text can become, one for each line a wildcard may choose."""
    lines = raw.split("\n") if subset.enable_wildcard else [raw.split("\n")[0]]
    if not subset.enable_wildcard:
        return [_assemble(subset, lines[0], None, None)]

    def with_long_choices(text: str) -> str:
        text = text.replace("{{", _OPEN).replace("}}", _CLOSE)
        text = _CHOICE.sub(lambda found: max(found[1].split("|"), key=lambda part: len(part.encode())), text)
        return text.replace(_OPEN, "{{").replace(_CLOSE, "}}")

    captions = [with_long_choices(_whole(subset, line)) for line in lines]
    return [_arranged(subset, _choose(caption, None), None, None) for caption in captions]


def caption_varies(subset: SubsetConfig, raw: str) -> bool:
    """Tells whether draws of the same epoch can differ in their caption, the warm-up aside."""
    return subset.caption_dropout_rate > 0 or text_varies(subset, raw)


def text_varies(subset: SubsetConfig, raw: str) -> bool:
    """Tells whether captions that are not dropped as a whole can differ, the warm-up aside."""
    if subset.shuffle_caption or subset.caption_tag_dropout_rate > 0:
        return True
    whole = "".join((subset.caption_prefix or "", raw, subset.caption_suffix or ""))
    return subset.enable_wildcard and ("\n" in raw or "{" in whole)


def is_dropped_epoch(subset: SubsetConfig, epoch: int) -> bool:
    """Tells whether all captions of an epoch (counted from 1) are dropped."""
    every = subset.caption_dropout_every_n_epochs
    return every > 0 and epoch > 0 and epoch % every == 0


def may_be_empty(subset: SubsetConfig) -> bool:
    """Tells whether whole captions can be dropped."""
    return subset.caption_dropout_rate > 0 or subset.caption_dropout_every_n_epochs > 0


def _assemble(subset: SubsetConfig, raw: str, rng: random.Random | None, warm_up: WarmUp | None) -> str:
    """Returns the caption that was not dropped; without ``rng`` with the first of everything, in order."""
    lines = raw.split("\n")
    line = rng.choice(lines) if rng and subset.enable_wildcard and len(lines) > 1 else lines[0]
    caption = _whole(subset, line)
    if subset.enable_wildcard:
        caption = _choose(caption, rng)
    return _arranged(subset, caption, rng, warm_up)


def _whole(subset: SubsetConfig, line: str) -> str:
    return " ".join(part for part in (subset.caption_prefix, line, subset.caption_suffix) if part)


def _arranged(subset: SubsetConfig, caption: str, rng: random.Random | None, warm_up: WarmUp | None) -> str:
    """Returns the caption with its tags shuffled and left out, and without marks and secondary separators."""
    changes_tags = subset.shuffle_caption or subset.caption_tag_dropout_rate > 0
    # With a warm-up tags are joined alike during and after it: the caption must not change its commas on the way.
    if (rng and changes_tags) or subset.token_warmup_step > 0:
        caption = _rearrange(subset, caption, rng, warm_up)
    elif subset.keep_tokens_separator and subset.keep_tokens_separator in caption:
        caption = _without_marks(subset, caption)
    if subset.secondary_separator:
        caption = caption.replace(subset.secondary_separator, subset.caption_separator)
    return caption


def _choose(caption: str, rng: random.Random | None) -> str:
    """Returns the text with each ``{a|b}`` replaced by one of its parts, and ``{{ }}`` by single braces."""
    caption = caption.replace("{{", _OPEN).replace("}}", _CLOSE)

    def one(found: re.Match[str]) -> str:
        parts = found[1].split("|")
        return rng.choice(parts) if rng else parts[0]

    return _CHOICE.sub(one, caption).replace(_OPEN, "{").replace(_CLOSE, "}")


def _rearrange(subset: SubsetConfig, caption: str, rng: random.Random | None, warm_up: WarmUp | None) -> str:
    """Returns the tags, the free ones as many as are shown, shuffled and some of them dropped, joined by ``", "``."""
    mark = subset.keep_tokens_separator
    if mark and mark in caption:
        head_text, free_text, *tail_texts = caption.split(mark)
        head, free = _tags(subset, head_text), _tags(subset, free_text)
        tail = [tag for part in tail_texts for tag in _tags(subset, part)]
    else:
        tags = _tags(subset, caption)
        head, free, tail = tags[: subset.keep_tokens], tags[subset.keep_tokens :], []
    if warm_up is not None:
        free = free[: _num_shown(subset, len(free), warm_up)]
    if rng and subset.shuffle_caption:
        rng.shuffle(free)
    if rng and subset.caption_tag_dropout_rate > 0:
        free = [tag for tag in free if rng.random() >= subset.caption_tag_dropout_rate]
    return ", ".join(head + free + tail)


def _num_shown(subset: SubsetConfig, num_free: int, warm_up: WarmUp) -> int:
    """Returns how many free tags are shown: from ``token_warmup_min`` at step 0 up to all of them."""
    growing = max(0, num_free - subset.token_warmup_min)
    return num_free - growing + growing * warm_up.step // warm_up.num_steps


def _tags(subset: SubsetConfig, text: str) -> list[str]:
    return [tag.strip() for tag in text.split(subset.caption_separator) if tag.strip()]


def _without_marks(subset: SubsetConfig, caption: str) -> str:
    """Returns the text with each keep_tokens_separator turned into a comma; the rest stays as it was written."""
    edges = subset.caption_separator + " \t"
    parts = [part.strip(edges) for part in caption.split(subset.keep_tokens_separator)]
    return ", ".join(part for part in parts if part)
