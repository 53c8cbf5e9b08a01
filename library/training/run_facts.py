"""What a run's course follows from, as plain values: kept in training states, and compared when one is continued."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.data import schema
from library.settings import specs_of
from library.training.shown_settings import without_folders
from library.training.state import StateHeader

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from library.data.dataset import TrainingData
    from library.training.arguments import TrainConfig
    from library.training.report import RunPlan

# Groups of settings that training depends on, and what in them it does not depend on.
_COMPARED = ("model", "data", "network", "flow", "optimizer", "memory", "quantisation")
_NEUTRAL = {
    "tokenizer_cache_dir",
    "disable_mmap_load_safetensors",
    "dataset_config",  # what the file says is compared as the pictures' fingerprint
    "train_data_dir",
    "reg_data_dir",
    "in_json",
    "conditioning_data_dir",
    "cache_info",
    "debug_dataset",
    "cache_latents_to_disk",
    "cache_text_encoder_outputs_to_disk",
    "vae_batch_size",
    "text_encoder_batch_size",
    "cache_dir",
    "max_data_loader_n_workers",
    "network_weights",  # the state's weights take their place
    "dim_from_weights",
    "gradient_checkpointing",
    "gradient_checkpointing_level",
    "torch_compile",
    "dynamo_backend",
    "blocks_to_swap",
    "cpu_offload_checkpointing",
    "vram_gb",
    "use_8bit_adam",
    "use_lion_optimizer",
    "optimizer_type",  # compared as the class
}
_DATA_FLAGS = {key.flag for key in schema.KEYS.values() if key.flag is not None}
_IN_SCHEDULE = ("learning_rate", "unet_lr", "text_encoder_lr", "lr_")
_FACT_NAMES = {
    "seed": "--seed",
    "accumulation": "--gradient_accumulation_steps",
    "processes": "number of processes",
    "batch_sizes": "batch sizes",
    "num_pictures": "number of pictures",
    "pictures": "pictures, captions or their settings",
    "device": "device",
    "attention": "attention kernel",
}


@dataclass(frozen=True)
class Change:
    """Something that is not as it was when the state was written."""

    name: str
    before: Any
    now: Any
    in_schedule: bool = False
    optimizer_arguments: tuple[str, ...] = ()


def run_facts(
    seed: int,
    plan: RunPlan,
    accumulation: int,
    num_processes: int,
    data: TrainingData,
    optimizer: Optimizer,
    device: str,
    attention: str,
) -> dict[str, Any]:
    """Returns what a run's course follows from besides its settings: its pictures and their order, and what computes.

    ``--attn_mode auto`` takes another kernel on another machine, so the kernel is compared and not the flag.
    """
    return {
        "seed": seed,
        **dataclasses.asdict(plan),
        "accumulation": accumulation,
        "processes": num_processes,
        "batch_sizes": [dataset.batch_size for dataset in data.datasets],
        "num_pictures": len(data.items),
        "pictures": data_fingerprint(data),
        "optimizer": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
        "device": device,
        "attention": attention,
    }


def data_fingerprint(data: TrainingData) -> str:
    """Returns a hash of the pictures' names, captions, sizes, places and settings, but not of where their folders are."""
    digest = hashlib.blake2b(digest_size=16)
    settings: dict[int, str] = {}
    for item in data.items:
        subset = item.subset
        if id(subset) not in settings:
            fields = {field.name: getattr(subset, field.name) for field in dataclasses.fields(subset)}
            settings[id(subset)] = repr({name: one for name, one in fields.items() if not isinstance(one, Path)})
        entries = (item.index, item.name, item.caption, item.size_px, item.bucket_px, item.dataset_index)
        digest.update(f"{entries}\0{settings[id(subset)]}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def plain_settings(config: TrainConfig) -> dict[str, Any]:
    """Returns every setting by name as JSON holds it, without secrets and folders: states may be uploaded."""
    from library.training.arguments import GROUPS

    groups = [getattr(config, name) for name in GROUPS]
    return {
        spec.name: without_folders(getattr(group, spec.name))
        for group in groups
        for spec in specs_of(type(group))
        if not spec.secret
    }


def versions() -> dict[str, str]:
    """Returns the versions of what computes."""
    import torch

    from library.training.metadata import VERSION

    return {"program": VERSION, "torch": str(torch.__version__), "python": platform.python_version()}


def changes(header: StateHeader, facts: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Change]:
    """Returns what makes a continued run differ from one that was not interrupted."""
    found = [
        Change(words, header.facts.get(name), facts[name])
        for name, words in _FACT_NAMES.items()
        if header.facts.get(name) != facts[name] and (name in header.facts or name != "attention")  # new in states
    ]
    if any(change.name == _FACT_NAMES["num_pictures"] for change in found):
        found = [change for change in found if change.name != _FACT_NAMES["pictures"]]
    torch_before, torch_now = header.versions.get("torch"), versions()["torch"]
    if torch_before != torch_now:
        found.append(Change("torch", torch_before, torch_now))
    same_data = all(header.facts.get(name) == facts[name] for name in ("pictures", "batch_sizes"))
    for name in _compared_settings():
        if same_data and name in _DATA_FLAGS:
            continue  # the dataset file says otherwise, so the flag changes nothing
        if name in header.settings and name in settings and header.settings[name] != settings[name]:
            before, now = header.settings[name], settings[name]
            arguments = _changed_arguments(before, now) if name == "optimizer_args" else ()
            found.append(Change(f"--{name}", before, now, name.startswith(_IN_SCHEDULE), arguments))
    return found


def in_words(changed: Iterable[Change]) -> str:
    """Returns ``"--learning_rate 0.001 -> 0.0005, ..."``."""
    parts = []
    for change in changed:
        if change.name == _FACT_NAMES["pictures"]:  # hashes say nothing to a reader
            parts.append(change.name)
        else:
            parts.append(f"{change.name} {_shown(change.before)} -> {_shown(change.now)}")
    return ", ".join(parts)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "(none)"
    return "(none)" if value in (None, "") else str(value)


def _compared_settings() -> list[str]:
    from library.training.arguments import GROUPS

    names = (spec.name for group in _COMPARED for spec in specs_of(GROUPS[group][1]))
    return [name for name in names if name not in _NEUTRAL]


def _changed_arguments(before: Iterable[str], now: Iterable[str]) -> tuple[str, ...]:
    first, second = (dict(one.partition("=")[::2] for one in arguments) for arguments in (before, now))
    return tuple(name.strip() for name in {**first, **second} if first.get(name) != second.get(name))
