"""The one table of dataset settings: every key that a dataset file may hold, where, and what its value must be.

The command line and the dataset file share this table: :class:`library.data.settings.DataSettings` checks its flags
with the same readers that check the file. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

GENERAL, DATASET, SUBSET = "[general]", "[[datasets]]", "[[datasets.subsets]]"
EVERYWHERE = (GENERAL, DATASET, SUBSET)

_LARGEST_SIDE_PX = 16384
# The model folds 8 x 8 pixels into a latent cell and 2 x 2 cells into a token.
PIXEL_MULTIPLE = 16

RESIZE_NAMES = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")

Reader = Callable[[Any], Any]


@dataclass(frozen=True)
class Key:
    """One key of the dataset file.

    Attributes:
        name: the key as users write it.
        levels: the tables that may hold it.
        read: returns the checked value; raises ``ValueError`` saying what is expected.
        flag: the field of ``DataSettings`` that gives the value where no table does; ``None``: there is no such flag.
    """

    name: str
    levels: tuple[str, ...]
    read: Reader
    flag: str | None = None


_LARGEST = 10_000_000  # repeats, batch sizes, bucket sides: beyond it a run only seems to hang


def boolean(value: Any) -> bool:
    """Returns a bool; raises ``ValueError`` for everything else."""
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def text(value: Any) -> str:
    """Returns a string; raises ``ValueError`` for everything else."""
    if not isinstance(value, str):
        raise ValueError("expected a text in quotes")
    return value


def filled_text(value: Any) -> str:
    """Returns a string that is not empty."""
    if not text(value):
        raise ValueError("expected a text that is not empty")
    return str(value)


def extension(value: Any) -> str:
    """Returns a file extension with its leading dot."""
    name = filled_text(value)
    if set(name) & set('/\\\0:*?"<>|'):
        raise ValueError('expected an extension such as ".txt"')
    return name if name.startswith(".") else f".{name}"


def whole(minimum: int | None = None, multiple_of: int = 1) -> Reader:
    """Returns a reader of whole numbers (``4.0`` is one) from ``minimum`` upward."""
    expected = "expected a whole number"
    if multiple_of > 1:
        expected += f" that is a multiple of {multiple_of}"
    if minimum is not None:
        expected += f", at least {minimum}"

    def read(value: Any) -> int:
        is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not is_whole or value % multiple_of or (minimum is not None and value < minimum):
            raise ValueError(expected)
        if value > _LARGEST:
            raise ValueError(f"{expected}, at most {_LARGEST}")
        return int(value)

    return read


def number(low: float, high: float) -> Reader:
    """Returns a reader of numbers in [low, high]; whole numbers are fine."""

    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(f"expected a number from {low:g} to {high:g}")
        return float(value)

    return read


def one_of(names: Iterable[str]) -> Reader:
    """Returns a reader of one of the given names."""
    allowed = tuple(names)

    def read(value: Any) -> str:
        if value not in allowed:
            raise ValueError(f"expected one of {', '.join(allowed)}")
        return str(value)

    return read


def resolution(value: Any) -> tuple[int, int]:
    """Returns (width, height) in pixels from a number, ``"N"``, ``"W,H"`` or a list of one or two of them."""
    expected = "expected a number, or width and height as in 768,512"
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    if len(parts) not in (1, 2) or any(isinstance(part, bool) for part in parts):
        raise ValueError(expected)
    try:
        sides = [int(part) for part in parts]
        exact = all(float(part) == side for part, side in zip(parts, sides, strict=True))
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(expected) from error
    if not exact or min(sides) < 1:
        raise ValueError(expected)
    if max(sides) > _LARGEST_SIDE_PX:
        raise ValueError(f"{expected}, at most {_LARGEST_SIDE_PX}")
    return sides[0], sides[-1]


def count_or_share(value: Any) -> int | float:
    """Returns a number of steps, or a share of all steps where it is below 1."""
    try:
        number = float(value)
    except (ValueError, TypeError) as error:
        raise ValueError("expected a number of steps, or a share below 1") from error
    if isinstance(value, bool) or not 0 <= number <= _LARGEST or (number >= 1 and not number.is_integer()):
        raise ValueError("expected a whole number of steps, or a share below 1")
    return int(number) if number.is_integer() else number


def face_crop_range(value: Any) -> tuple[float, float]:
    """Returns (low, high), factors of the face's size, from ``"lo,hi"`` or a list of two numbers."""
    expected = "expected two numbers such as 2.0,4.0, the first above 0 and not above the second"
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or any(isinstance(part, bool) for part in parts):
        raise ValueError(expected)
    try:
        low, high = (float(part) for part in parts)
    except (ValueError, TypeError) as error:
        raise ValueError(expected) from error
    if not 0 < low <= high < 1e6:
        raise ValueError(expected)
    return low, high


ATTRIBUTES = ("diff_output_preservation",)


def attributes(value: Any) -> dict[str, bool]:
    """Returns ``custom_attributes``, a table of :data:`ATTRIBUTES`."""
    if not isinstance(value, dict):
        raise ValueError("expected a table such as { diff_output_preservation = true }")
    for name, setting in value.items():
        if name not in ATTRIBUTES or not isinstance(setting, bool):
            raise ValueError(f"expected {ATTRIBUTES[0]} = true or false and nothing else")
    return dict(value)


def _anything(value: Any) -> Any:
    return value


DATASET_KEYS = (
    Key("resolution", (GENERAL, DATASET), resolution, flag="resolution"),
    Key("batch_size", (GENERAL, DATASET), whole(1), flag="train_batch_size"),
    Key("enable_bucket", (GENERAL, DATASET), boolean, flag="enable_bucket"),
    Key("min_bucket_reso", (GENERAL, DATASET), whole(1), flag="min_bucket_reso"),
    Key("max_bucket_reso", (GENERAL, DATASET), whole(1), flag="max_bucket_reso"),
    Key("bucket_reso_steps", (GENERAL, DATASET), whole(PIXEL_MULTIPLE, PIXEL_MULTIPLE), flag="bucket_reso_steps"),
    Key("bucket_no_upscale", (GENERAL, DATASET), boolean, flag="bucket_no_upscale"),
)

SUBSET_KEYS = (
    Key("image_dir", (SUBSET,), filled_text),
    Key("metadata_file", (SUBSET,), filled_text),
    Key("conditioning_data_dir", (SUBSET,), filled_text),
    Key("is_reg", (SUBSET,), boolean),
    Key("class_tokens", EVERYWHERE, text),
    Key("num_repeats", EVERYWHERE, whole(), flag="dataset_repeats"),
    Key("caption_extension", EVERYWHERE, extension, flag="caption_extension"),
    Key("caption_separator", EVERYWHERE, filled_text, flag="caption_separator"),
    Key("shuffle_caption", EVERYWHERE, boolean, flag="shuffle_caption"),
    Key("keep_tokens", EVERYWHERE, whole(0), flag="keep_tokens"),
    Key("keep_tokens_separator", EVERYWHERE, text, flag="keep_tokens_separator"),
    Key("secondary_separator", EVERYWHERE, text, flag="secondary_separator"),
    Key("enable_wildcard", EVERYWHERE, boolean, flag="enable_wildcard"),
    Key("join_caption_lines", EVERYWHERE, boolean, flag="join_caption_lines"),
    Key("caption_prefix", EVERYWHERE, text, flag="caption_prefix"),
    Key("caption_suffix", EVERYWHERE, text, flag="caption_suffix"),
    Key("caption_dropout_rate", EVERYWHERE, number(0, 1), flag="caption_dropout_rate"),
    Key("caption_dropout_every_n_epochs", EVERYWHERE, whole(0), flag="caption_dropout_every_n_epochs"),
    Key("caption_tag_dropout_rate", EVERYWHERE, number(0, 1), flag="caption_tag_dropout_rate"),
    Key("token_warmup_min", EVERYWHERE, whole(0), flag="token_warmup_min"),
    Key("token_warmup_step", EVERYWHERE, count_or_share, flag="token_warmup_step"),
    Key("color_aug", EVERYWHERE, boolean, flag="color_aug"),
    Key("flip_aug", EVERYWHERE, boolean, flag="flip_aug"),
    Key("random_crop", EVERYWHERE, boolean, flag="random_crop"),
    Key("face_crop_aug_range", EVERYWHERE, face_crop_range, flag="face_crop_aug_range"),
    Key("alpha_mask", EVERYWHERE, boolean, flag="alpha_mask"),
    Key("custom_attributes", EVERYWHERE, attributes),
    Key("validation_split", EVERYWHERE, number(0, 1), flag="validation_split"),
    Key("validation_seed", EVERYWHERE, whole(0), flag="validation_seed"),
    Key("cache_info", EVERYWHERE, boolean, flag="cache_info"),
    Key("resize_interpolation", EVERYWHERE, one_of(RESIZE_NAMES), flag="resize_interpolation"),
)

# Accepted because dataset files in circulation hold it; sd-scripts never used its value either.
WITHOUT_EFFECT = Key("network_multiplier", (GENERAL, DATASET), _anything)

KEYS = {key.name: key for key in (*DATASET_KEYS, *SUBSET_KEYS, WITHOUT_EFFECT)}
