"""Prompt files and prompt lines: what to draw, at which size, from which seed.

One parser for prompt files (.txt, .toml, .json), of previews and of ``lumina_minimal_inference.py``, and for that
program's interactive lines.
"""

from __future__ import annotations

import json
import logging
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.errors import UserError, nearest

logger = logging.getLogger(__name__)

SIZE_STEP_PX = 16  # two latent cells a token, eight pixels a cell
_MIN_SIZE_PX = 64
MAX_SIZE_PX = 16384
MAX_STEPS = 1000


class PromptError(UserError):
    """A prompt line or file is wrong."""


@dataclass(frozen=True)
class Prompt:
    """One picture to draw."""

    prompt: str = ""
    negative_prompt: str = ""
    width: int = 1024
    height: int = 1024
    seed: int | None = None
    sample_steps: int = 36
    scale: float = 3.5
    cfg_trunc_ratio: float = 0.25
    renorm_cfg: float = 1.0
    multipliers: tuple[float, ...] = ()

    def rounded(self) -> Prompt:
        """Returns the prompt with sizes the model can draw: multiples of 16 px, at least 64, with a notice."""
        width, height = (max(_MIN_SIZE_PX, side // SIZE_STEP_PX * SIZE_STEP_PX) for side in (self.width, self.height))
        if (width, height) != (self.width, self.height):
            logger.warning(
                "Prompt size %dx%d becomes %dx%d: sides are multiples of %d px, at least %d",
                self.width,
                self.height,
                width,
                height,
                SIZE_STEP_PX,
                _MIN_SIZE_PX,
            )
        return replace(self, width=width, height=height)


def parse_multiplier(text: str) -> float:
    """Returns a finite number; raises ``ValueError`` for everything else."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is expected")
    return number


def _multipliers(text: str) -> tuple[float, ...]:
    return tuple(parse_multiplier(part) for part in text.split(","))


MAX_SEED = 2**63 - 1


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError("a whole number is expected") from error


def _seed(text: str) -> int | None:
    seed = _whole(text)
    if seed == -1:
        return None  # many programs' word for none; sd-scripts' prompt files know digits only, and pass it over
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seeds go from 0 to {MAX_SEED}, and -1 is none")
    return seed


def _steps(text: str) -> int:
    steps = _whole(text)
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"1 to {MAX_STEPS} steps are possible")
    return steps


def _size(text: str) -> int:
    size = _whole(text)
    if not 0 < size <= MAX_SIZE_PX:
        raise ValueError(f"sizes go from 1 to {MAX_SIZE_PX}")
    return size


_OPTIONS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "n": ("negative_prompt", str),
    "w": ("width", _size),
    "h": ("height", _size),
    "d": ("seed", _seed),
    "s": ("sample_steps", _steps),
    "l": ("scale", parse_multiplier),
    "g": ("scale", parse_multiplier),
    "ctr": ("cfg_trunc_ratio", parse_multiplier),
    "rcfg": ("renorm_cfg", parse_multiplier),
    "m": ("multipliers", _multipliers),
}
"""Option of a prompt line -> (field, conversion)."""

TYPED_OPTIONS = frozenset(_OPTIONS)
FILE_OPTIONS = TYPED_OPTIONS - {"g"}  # in prompt files --g is another model's distilled guidance
PREVIEW_OPTIONS = FILE_OPTIONS - {"m"}  # previews have the one LoRA that is trained
_FOREIGN = ("g", "ss", "fs", "cn", "am", "of")
_FOREIGN_KEYS = ("guidance_scale", "sample_sampler", "flow_shift", "controlnet_image", "enum")


@dataclass(frozen=True)
class PromptFileKind:
    """What a prompt file is for.

    Attributes:
        flag: that names it, for messages.
        options: that its prompts may have.
        defaults: what is left out of a prompt.
    """

    flag: str = "--sample_prompts"
    options: frozenset[str] = PREVIEW_OPTIONS
    defaults: Prompt = Prompt()


def options_within(text: str) -> list[str]:
    """Returns what looks like options in a text that is drawn as it stands: ``--d`` of ``a cat --d 5``."""
    found = re.findall(r"(?:^|\s)--([A-Za-z]+)(?=\s|$)", text)
    return [f"--{name}" for name in dict.fromkeys(found) if name.lower() in _OPTIONS]


def batches_of(prompts: Sequence[Prompt], batch_size: int, num_processes: int = 1) -> list[list[int]]:
    """Returns the prompts' indexes in lists that are drawn at a time: of one size and one set of options.

    Lists are shorter than ``batch_size`` where that gives every process its share.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        options = (prompt.sample_steps, prompt.scale, prompt.cfg_trunc_ratio, prompt.renorm_cfg, prompt.multipliers)
        groups.setdefault((prompt.width, prompt.height, *options), []).append(index)
    batches = []
    for group in groups.values():
        size = min(batch_size, -(-len(group) // num_processes))
        batches += [group[start : start + size] for start in range(0, len(group), size)]
    return batches


def parse_line(line: str, defaults: Prompt, origin: str, known: frozenset[str] = PREVIEW_OPTIONS) -> Prompt:
    """Returns the prompt of a line such as ``a cat --w 512 --h 512 --d 1 --s 20``.

    Args:
        line: text, then options, each behind `` --``.
        defaults: what options that are left out are.
        origin: file and line, or how the line came, for messages.
        known: the options' letters; others are warned about and left out.

    Raises:
        PromptError: an option has a wrong value.
    """
    text, *options = re.split(r"(?:^|\s)--(?=[A-Za-z])", line.strip())
    values: dict[str, Any] = {"prompt": text.strip()}
    for option in options:
        name, _, value = option.strip().partition(" ")
        name, value = name.lower(), value.strip()
        if name not in known:
            foreign = _WITHOUT_LORAS if name == "m" else "has no effect for this model"
            unknown = f"is no option and is left out{nearest(name, known)}"
            logger.warning("%s: --%s %s", origin, name, foreign if name in (*_FOREIGN, "m") else unknown)
            continue
        field, convert = _OPTIONS[name]
        if field == "negative_prompt" and value == "-":
            value = ""
        try:
            values[field] = convert(value)
        except ValueError as error:
            raise PromptError(f"{origin}: --{name} {value!r} is not valid: {error}") from error
    return replace(defaults, **values)


_WITHOUT_LORAS = "has no effect in previews, which have no LoRA files"


def _from_table(table: Any, defaults: Prompt, origin: str, known: frozenset[str]) -> Prompt:
    if not isinstance(table, Mapping):
        raise PromptError(f"{origin}: {table!r} is no prompt; write a table of keys such as prompt, width and seed")
    fields: dict[str, Callable[[str], Any]] = {"prompt": str, **dict(_OPTIONS[name] for name in known)}
    values = {}
    for key, value in table.items():
        if key in _FOREIGN_KEYS:
            logger.warning("%s: %s has no effect for this model", origin, key)
        elif key == "multipliers" and key not in fields:
            logger.warning("%s: %s %s", origin, key, _WITHOUT_LORAS)
        elif not isinstance(value, (str, int, float)) or isinstance(value, bool):
            raise PromptError(f"{origin}: {key} = {value!r} is neither a text nor a number")
        elif key not in fields:
            raise PromptError(f"{origin}: {key!r} is no key of a prompt{nearest(key, fields)}; mend or remove it")
        elif fields[key] is str and not isinstance(value, str):
            raise PromptError(f"{origin}: {key} = {value!r} is no text; put it in quotes")
        else:
            try:
                values[key] = fields[key](str(value))
            except ValueError as error:
                raise PromptError(f"{origin}: {key} = {value!r} is not valid: {error}") from error
    return replace(defaults, **values)


def read_prompt_file(path: Path, kind: PromptFileKind | None = None, may_be_empty: bool = False) -> list[Prompt]:
    """Returns the prompts of a .txt, .toml or .json file, sizes rounded to what the model can draw.

    A .txt file has one prompt a line, ``#`` begins a comment line. A .toml file has common keys in ``[prompt]`` and
    prompts in ``[[prompt.subset]]``. A .json file has a list of texts (like .txt lines) or objects.

    Raises:
        PromptError: the file has another ending, is broken, holds a wrong value, or no prompt (unless it may be empty).
    """
    kind = kind or PromptFileKind()
    told = f"{kind.flag}: {path}"
    try:
        text = path.read_text(encoding="utf-8-sig")
        prompts = _READERS[path.suffix.lower()](text, kind, path)
    except KeyError as error:
        raise PromptError(f"{told} is neither .txt, .toml nor .json; rename or convert it") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"{told} is not UTF-8 text: {error}; save it as UTF-8") from error
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise PromptError(f"{told} cannot be read: {error}") from error
    if not prompts and not may_be_empty:
        raise PromptError(f"{told} holds no prompt; add one, or leave {kind.flag} out")
    return [prompt.rounded() for prompt in prompts]


def _read_txt(text: str, kind: PromptFileKind, path: Path) -> list[Prompt]:
    lines = enumerate(text.splitlines(), start=1)
    return [
        parse_line(line, kind.defaults, f"{path}, line {number}", kind.options)
        for number, line in lines
        if line.strip() and not line.startswith("#")
    ]


def _read_toml(text: str, kind: PromptFileKind, path: Path) -> list[Prompt]:
    content = tomllib.loads(text).get("prompt", {})
    if not isinstance(content, dict):
        raise PromptError(f"{kind.flag}: {path}: prompt is no table; write [[prompt.subset]] and its keys below")
    subsets = content.pop("subset", [])
    if not isinstance(subsets, list):
        raise PromptError(f"{kind.flag}: {path}: subset is no list of tables; write [[prompt.subset]]")
    common = _from_table(content, kind.defaults, f"{path}: [prompt]", kind.options)
    origins = [f"{path}: prompt.subset[{index}]" for index in range(len(subsets))]
    return [_from_table(table, common, origin, kind.options) for table, origin in zip(subsets, origins, strict=True)]


def _read_json(text: str, kind: PromptFileKind, path: Path) -> list[Prompt]:
    content = json.loads(text)
    if not isinstance(content, list):
        raise PromptError(f"{kind.flag}: {path} holds no list; write [{{...}}, ...]")
    return [
        parse_line(entry, kind.defaults, f"{path}: [{index}]", kind.options)
        if isinstance(entry, str)
        else _from_table(entry, kind.defaults, f"{path}: [{index}]", kind.options)
        for index, entry in enumerate(content)
    ]


_READERS: dict[str, Callable[[str, PromptFileKind, Path], list[Prompt]]] = {
    ".txt": _read_txt,
    ".toml": _read_toml,
    ".json": _read_json,
}
