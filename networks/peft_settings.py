"""PEFT's settings of a LoRA: they hold the alphas, which the keys of its files do not.

diffusers writes them into a file's metadata (``lora_adapter_metadata``), PEFT itself into ``adapter_config.json`` beside it.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.errors import NetworkError

logger = logging.getLogger(__name__)

_METADATA = "lora_adapter_metadata"
_BESIDE = "adapter_config.json"
_IN_DIFFUSERS, _IN_PEFT = "transformer.", "base_model.model."
# A module's path, or its end; others would be regular expressions.
_PATH = re.compile(r"\^?(?P<path>[\w.]+)")


def alphas_of(file: Path, metadata: Mapping[str, str], ranks: Mapping[str, int]) -> dict[str, float]:
    """Returns the alphas of those modules that PEFT's settings speak of.

    Args:
        file: the LoRA file.
        metadata: of its header.
        ranks: rank of each module that has no alpha in the file, by the name that it has there.

    Raises:
        NetworkError: the settings are damaged, or of a kind that is no plain LoRA.
    """
    if _METADATA in metadata:
        settings = _parsed(metadata[_METADATA], f"LoRA file {file}: its metadata entry {_METADATA}")
        prefix = _IN_DIFFUSERS
        settings = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
    elif any(name.startswith(_IN_PEFT) for name in ranks):
        beside, prefix = file.with_name(_BESIDE), _IN_PEFT
        if not beside.is_file():
            logger.warning(
                "%s: its names are PEFT's, which keeps alpha in %s beside the file, and that is not there; alpha = rank is"
                " taken, which may be another strength than in training",
                file,
                _BESIDE,
            )
            return {}
        settings = _parsed(
            beside.read_text(encoding="utf-8", errors="replace"), f"{beside}, the settings of {file.name},"
        )
    else:
        return {}
    if settings.get("use_dora"):
        raise NetworkError(
            f"LoRA file {file} is a DoRA by its settings, which is no plain LoRA and cannot be converted here"
        )
    if settings.get("lora_alpha") is None:
        return {}
    alphas = {}
    for name, rank in ranks.items():
        if name.startswith(prefix):
            alpha = _alpha(name.removeprefix(prefix), settings, file)
            alphas[name] = alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha
    return alphas


def _parsed(text: str, what: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NetworkError(
            f"{what} is not JSON ({error}), so the LoRA's strength is unknown; the file is damaged"
        ) from error
    if not isinstance(settings, dict):
        raise NetworkError(f"{what} is no table, so its strength is unknown; the file is damaged")
    return settings


def _alpha(path: str, settings: Mapping[str, Any], file: Path) -> float:
    found = settings["lora_alpha"]
    patterns = settings.get("alpha_pattern") or {}
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        match = _PATH.fullmatch(pattern)
        if match is None:
            raise NetworkError(
                f"LoRA file {file}: its settings give alphas by the pattern {pattern!r}, which is no module's name and"
                " cannot be read here"
            )
        if path == match["path"] or (not pattern.startswith("^") and path.endswith(f".{match['path']}")):
            found = value
            break
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not abs(found) < 1e9:
        raise NetworkError(f"LoRA file {file}: its settings say lora_alpha = {found!r}, which is no number")
    return float(found)
