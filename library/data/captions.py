"""From the text of a caption file to the caption that the model sees: pure functions.

The final caption is a function of the subset's settings, the raw text, the epoch and the key of the draw, so everything
that a run will use can be listed before it starts.
"""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

from library import keyed_random
from library.data.config import SubsetConfig
from library.errors import DatasetError

_CHOICE = re.compile(r"\{([^{}]+)\}")
# Private-use characters stand for escaped braces; they have no meaning in any text.
_OPEN, _CLOSE = "\ue000", "\ue001"


def read_caption(picture: str | Path, extension: str, all_lines: bool) -> str | None:
    """Returns the text of the caption file beside a picture, or ``None`` where there is none or it is blank.

    Args:
        picture: path of the picture; its caption file has the same stem.
        extension: the caption file's extension with its dot.
        all_lines: keep all lines that are not blank (a wildcard chooses one), else only the first.

    Raises:
        DatasetError: the file is not UTF-8 or cannot be read.
    """
    # Texts and not Path objects, which would cost more than the reading where there are 100,000.
    stem = os.path.splitext(picture)[0]  # noqa: PTH122
    content = _read(stem + extension)
    if content is None:
        # Tools that mark faces append _cx_cy_w_h to a picture's name; its caption file may have the name without that.
        folder, name = os.path.split(stem)
        parts = name.split("_")
        if len(parts) >= 5:
            content = _read(os.path.join(folder, "_".join(parts[:-4]) + extension))  # noqa: PTH118
    # Not splitlines(), which also ends lines at characters that are part of a text, such as U+2028.
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", content or "") if line.strip()]
    if not lines:
        return None
    return "\n".join(lines) if all_lines else lines[0]


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


def final_caption(subset: SubsetConfig, raw: str, epoch: int, draw_key: int) -> str:
    """Returns the caption of one draw.

    Order: dropout of the whole caption; a random line; prefix and suffix; ``{a|b}`` choices; tag shuffling and dropout;
    the secondary separator.

    Args:
        subset: the rules.
        raw: text of the caption file, or the class tokens.
        epoch: counted from 1.
        draw_key: identity of the draw; equal keys give equal captions.
    """
    if not caption_varies(subset, raw):
        # The usual case for large datasets: no generator is needed.
        return undropped_caption(subset, raw, epoch) or ""
    rng = keyed_random.python_random("caption", draw_key)
    dropped = rng.random() < subset.caption_dropout_rate
    return "" if dropped or _is_dropped_epoch(subset, epoch) else _assemble(subset, raw, rng)


def undropped_caption(subset: SubsetConfig, raw: str, epoch: int) -> str | None:
    """Returns the caption of every draw of an epoch that chance does not drop, where nothing else is random.

    ``None`` where the epoch drops all captions.
    """
    return None if _is_dropped_epoch(subset, epoch) else _assemble(subset, raw, None)


def caption_varies(subset: SubsetConfig, raw: str) -> bool:
    """Tells whether draws of the same epoch can differ in their caption."""
    return subset.caption_dropout_rate > 0 or text_varies(subset, raw)


def text_varies(subset: SubsetConfig, raw: str) -> bool:
    """Tells whether captions that are not dropped as a whole can differ."""
    if subset.shuffle_caption or subset.caption_tag_dropout_rate > 0:
        return True
    whole = "".join((subset.caption_prefix or "", raw, subset.caption_suffix or ""))
    return subset.enable_wildcard and ("\n" in raw or "{" in whole)


def may_be_empty(subset: SubsetConfig) -> bool:
    """Tells whether whole captions can be dropped."""
    return subset.caption_dropout_rate > 0 or subset.caption_dropout_every_n_epochs > 0


def _is_dropped_epoch(subset: SubsetConfig, epoch: int) -> bool:
    every = subset.caption_dropout_every_n_epochs
    return every > 0 and epoch % every == 0


def _assemble(subset: SubsetConfig, raw: str, rng: random.Random | None) -> str:
    """Returns the caption that was not dropped; ``rng`` may be ``None`` where nothing is random."""
    lines = raw.split("\n")
    caption = rng.choice(lines) if rng and subset.enable_wildcard and len(lines) > 1 else lines[0]
    caption = " ".join(part for part in (subset.caption_prefix, caption, subset.caption_suffix) if part)
    if subset.enable_wildcard:
        caption = _choose(caption, rng)
    if rng and (subset.shuffle_caption or subset.caption_tag_dropout_rate > 0):
        caption = _rearrange(subset, caption, rng)
    elif subset.keep_tokens_separator and subset.keep_tokens_separator in caption:
        caption = _without_marks(subset, caption)
    if subset.secondary_separator:
        caption = caption.replace(subset.secondary_separator, subset.caption_separator)
    return caption


def _choose(caption: str, rng: random.Random | None) -> str:
    """Returns the text with each ``{a|b}`` replaced by one of its parts, and ``{{ }}`` by single braces."""
    caption = caption.replace("{{", _OPEN).replace("}}", _CLOSE)
    if rng:
        caption = _CHOICE.sub(lambda found: rng.choice(found[1].split("|")), caption)
    return caption.replace(_OPEN, "{").replace(_CLOSE, "}")


def _rearrange(subset: SubsetConfig, caption: str, rng: random.Random) -> str:
    """Returns the tags with the free ones shuffled and some of them dropped, joined by ``", "``."""
    mark = subset.keep_tokens_separator
    if mark and mark in caption:
        head_text, free_text, *tail_texts = caption.split(mark)
        head, free = _tags(subset, head_text), _tags(subset, free_text)
        tail = [tag for part in tail_texts for tag in _tags(subset, part)]
    else:
        tags = _tags(subset, caption)
        head, free, tail = tags[: subset.keep_tokens], tags[subset.keep_tokens :], []
    if subset.shuffle_caption:
        rng.shuffle(free)
    if subset.caption_tag_dropout_rate > 0:
        free = [tag for tag in free if rng.random() >= subset.caption_tag_dropout_rate]
    return ", ".join(head + free + tail)


def _tags(subset: SubsetConfig, text: str) -> list[str]:
    return [tag.strip() for tag in text.split(subset.caption_separator) if tag.strip()]


def _without_marks(subset: SubsetConfig, caption: str) -> str:
    """Returns the text with each keep_tokens_separator turned into a comma; the rest stays as it was written."""
    edges = subset.caption_separator + " \t"
    parts = [part.strip(edges) for part in caption.split(subset.keep_tokens_separator)]
    return ", ".join(part for part in parts if part)
