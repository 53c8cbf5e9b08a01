"""Merging LoRAs into a model file, whatever else the file holds, with no more than a tensor of it in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from library.errors import ModelFileError, some
from library.files import read_safetensors_header, write_safetensors_in_parts
from networks.lora_files import Factors
from networks.lora_keys import is_text_encoder, model_path
from networks.lora_sum import at_strength

# What stands before a Linear's path in the files that people have: of the transformer or Gemma2 alone, and all-in-one.
_TRANSFORMER = ("", "model.diffusion_model.", "diffusion_model.")
_GEMMA2 = ("model.", "text_encoders.gemma2_2b.transformer.model.", "")
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DIFFUSERS_NAME = "layers.0.attn.to_q.weight"


@dataclass(frozen=True)
class Entry:
    """What a model file's header says of a tensor: dtype in the format's words, shape, size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def read_entries(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Returns what the header of a model file says: its tensors in the file's order, and its metadata.

    Raises:
        ModelFileError: it is missing, a folder, or no safetensors file.
    """
    if file.is_dir():
        raise ModelFileError(
            f"{file} is a folder; LoRAs are merged into single files (for diffusers: pipe.load_lora_weights and"
            " pipe.fuse_lora)"
        )
    if not file.is_file():
        raise ModelFileError(f"{file} does not exist; check the path")
    try:
        # safetensors itself compares the header with the file's size.
        with safe_open(file, framework="pt"):
            header, _ = read_safetensors_header(file)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelFileError(f"{file} cannot be read as safetensors ({error}); is it complete?") from error
    metadata = dict(header.pop("__metadata__", {}))
    entries = {
        name: Entry(entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    }
    return entries, metadata


def places_of(names: Iterable[str], keys: Iterable[str], file: Path) -> dict[str, str]:
    """Returns LoRA module -> name of its weight in a model file; modules of a model that the file lacks are left out.

    Args:
        names: modules by kohya's names.
        keys: names of the file's tensors.
        file: for messages.

    Raises:
        ModelFileError: the file has neither model, is in diffusers' layout, or lacks some of a model's modules.
    """
    keys, names = set(keys), list(names)
    places: dict[str, str] = {}
    for prefixes, ours in (
        (_TRANSFORMER, [name for name in names if not is_text_encoder(name)]),
        (_GEMMA2, [name for name in names if is_text_encoder(name)]),
    ):
        found = max(
            ({name: f"{prefix}{model_path(name)}.weight" for name in ours} for prefix in prefixes),
            key=lambda candidates: len(keys.intersection(candidates.values())),
        )
        there = {name: key for name, key in found.items() if key in keys}
        if there and len(there) < len(ours):
            missing = [name for name in ours if name not in there]
            raise ModelFileError(
                f"{file}: {len(missing)} of {len(ours)} LoRA modules have no place in it ({some(missing)}); it is another"
                " model than the LoRA was made for"
            )
        places |= there
    if not places:
        if any(key.endswith(_DIFFUSERS_NAME) for key in keys):
            raise ModelFileError(
                f"{file} is in diffusers' layout; give the model as a single file in the original one (for diffusers:"
                " pipe.load_lora_weights and pipe.fuse_lora)"
            )
        raise ModelFileError(f"{file}: no LoRA module has a place in it; give a Lumina Image 2.0 or Gemma2 model file")
    return places


def require_fit(
    entries: Mapping[str, Entry], factors: Mapping[str, Factors], places: Mapping[str, str], file: Path
) -> None:
    """Checks that the weights have the shapes of their LoRAs and a dtype that can take a small change.

    Raises:
        ModelFileError: they do not.
    """
    for name, key in places.items():
        one, weight = factors[name], entries[key]
        shape = one.up.shape[0], one.down.shape[1]
        if weight.dtype not in _FLOATS:
            raise ModelFileError(
                f"{file}: {key} is {weight.dtype}, in which a LoRA's small changes would be lost; give it in bf16, fp16 or"
                " fp32"
            )
        if weight.shape != shape:
            raise ModelFileError(
                f"{file}: {key} is {' x '.join(map(str, weight.shape))} and its LoRA {shape[0]} x {shape[1]}; it is another"
                " model than the LoRA was made for"
            )


def write_merged(
    file: Path,
    target: Path,
    factors: Mapping[str, Factors],
    places: Mapping[str, str],
    precision: str | None,
    metadata: Mapping[str, str],
) -> None:
    """Writes a model file with alpha / rank * up @ down added to its weights, tensor by tensor.

    Sums are made in float32 and rounded once.

    Args:
        file: the model file.
        target: the file to write.
        factors: the LoRA by kohya's names.
        places: module -> name of its weight, see :func:`places_of`.
        precision: the format's word for the dtype of all weights in the new file; None keeps each one's.
        metadata: of the new file.

    Raises:
        ModelFileError: a weight has another shape than its LoRA, or is quantised, or a number that changes is not finite.
        OSError: the new file cannot be written.
    """
    entries, _ = read_entries(file)
    require_fit(entries, factors, places, file)
    modules = {key: name for name, key in places.items()}
    dtypes = {
        name: precision if precision and entry.dtype in _FLOATS else entry.dtype for name, entry in entries.items()
    }
    sizes = {
        name: math.prod(entry.shape) * _FLOATS[dtypes[name]].itemsize if entry.dtype in _FLOATS else entry.num_bytes
        for name, entry in entries.items()
    }
    with safe_open(file, framework="pt") as opened, tqdm(total=len(entries), desc=target.name) as progress:

        def parts_of(name: str) -> Iterator[memoryview]:
            tensor = opened.get_tensor(name)
            if name in modules:
                down, up = at_strength(factors[modules[name]])
                tensor = torch.addmm(tensor.float(), up, down)
            if entries[name].dtype in _FLOATS:
                tensor = tensor.to(_FLOATS[dtypes[name]])
            changes = name in modules or dtypes[name] != entries[name].dtype
            if changes and not bool(torch.isfinite(tensor).all()):
                raise ModelFileError(
                    f"{file}: {name} would hold numbers that are not finite; a file is damaged, --ratios are too large, or"
                    " the range of --save_precision is too small"
                )
            progress.update()
            yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data

        layout = {name: (dtypes[name], entry.shape, sizes[name]) for name, entry in entries.items()}
        write_safetensors_in_parts(target, layout, parts_of, metadata)
