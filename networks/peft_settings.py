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
# Beginnings for which PEFT changes the model's own weights too.
_CHANGING_STARTS = ("pissa", "corda", "olora", "loftq")
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
        place, prefix = f"its metadata entry {_METADATA}", _IN_DIFFUSERS
        settings = _parsed(metadata[_METADATA], f"LoRA file {file}: {place}")
        settings = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
    elif any(name.startswith(_IN_PEFT) for name in ranks):
        place, prefix = f"{_BESIDE} beside it", _IN_PEFT
        beside = file.with_name(_BESIDE)
        settings = _parsed(beside.read_bytes(), f"{beside}, the settings of {file.name},") if beside.is_file() else {}
    else:
        return {}
    if settings.get("use_dora"):
        raise NetworkError(
            f"LoRA file {file} is a DoRA by its settings, which is more than a LoRA and cannot be read here; give a plain"
            " LoRA"
        )
    start = str(settings.get("init_lora_weights")).lower()
    if start.startswith(_CHANGING_STARTS):
        raise NetworkError(
            f"LoRA file {file}: its settings say init_lora_weights = {start}, which also changed the model that it was"
            " trained on, so it does not fit the unchanged one; have PEFT save it with"
            " path_initial_model_for_weight_conversion"
        )
    ours = {name: rank for name, rank in ranks.items() if name.startswith(prefix)}
    if settings.get("lora_alpha") is None:
        if ours:
            logger.warning(
                "%s: the strength of such a LoRA stands in %s as lora_alpha, and is not there; alpha = rank is taken, which"
                " may be another strength than in training",
                file,
                place,
            )
        return {}
    alphas = {name: _alpha(name.removeprefix(prefix), settings, file) for name in ours}
    if settings.get("use_rslora"):
        alphas = {name: alpha * math.sqrt(ours[name]) for name, alpha in alphas.items()}
    return alphas


def _parsed(text: str | bytes, what: str) -> dict[str, Any]:
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
    if not isinstance(patterns, dict):
        raise NetworkError(
            f"LoRA file {file}: its settings say alpha_pattern = {patterns!r}, which is no table, so its strength is unknown"
        )
    for pattern, value in patterns.items():
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
        raise NetworkError(
            f"LoRA file {file}: its settings say lora_alpha = {found!r}, which is no number, so its strength is unknown"
        )
    return float(found)
