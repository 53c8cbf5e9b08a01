"""LoRA files: reading them, bringing the key forms of other programs into one, and the hashes that identify them.

Known forms, by example of one module:

* ``lora_unet_layers_0_attention_qkv.lora_down.weight`` with ``.alpha``: kohya's, and the form that is written here;
* ``diffusion_model.layers.0.attention.qkv.lora_A.weight``: ComfyUI, ai-toolkit, diffusion-pipe;
* ``transformer.layers.0.attn.to_q.lora_A.weight``: diffusers and PEFT, with q, k and v apart;

each with ``lora_A/lora_B``, ``lora_down/lora_up`` or ``lora.down/lora.up``. A missing alpha means alpha = rank, as in
the programs that leave it out. Separate q, k and v are joined into one LoRA of the fused Linear: exactly, but for one
rounding in float32 where their strengths differ.
"""

from __future__ import annotations

import hashlib
import logging
import math
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.errors import NetworkError, some
from library.files import read_safetensors_header
from networks import peft_settings
from networks.lora_keys import kohya_name, split_part

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Factors:
    """One module's LoRA: ``down`` (r,in) and ``up`` (out,r) in float32, strength alpha / r."""

    down: Tensor
    up: Tensor
    alpha: float


_KEY = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"lora_(?P<ab>[AB])(?:\.default)?(?:\.weight)?|lora_(?P<kohya>down|up)\.weight|"
    r"lora(?:_linear_layer)?\.(?P<dotted>down|up)\.weight|(?P<alpha>alpha))"
)
_KEYS_OF_WIDTH = {2304: 768}  # the 2.6 B model has 24 heads of queries and 8 of keys


def read_lora_file(file: Path) -> dict[str, Tensor]:
    """Returns the tensors of a ``.safetensors``, ``.ckpt`` or ``.pt`` LoRA file, on the CPU.

    Alphas that stand in PEFT's settings, and not among the tensors, become ``<module>.alpha`` entries.

    Raises:
        NetworkError: the file is missing, damaged, or of another kind.
    """
    if not file.is_file():
        what = "is a folder; give the file in it" if file.is_dir() else "does not exist; check the path"
        raise NetworkError(f"LoRA file {file} {what}")
    tensors, metadata = _read_safetensors(file) if file.suffix.lower() == ".safetensors" else (_unpickle(file), {})
    ranks = {
        match["module"]: tensor.shape[0]
        for key, tensor in tensors.items()
        if (match := _KEY.fullmatch(key)) and _kind(match) == "down" and tensor.dim() > 0
    }
    without = {name: rank for name, rank in ranks.items() if f"{name}.alpha" not in tensors}
    alphas = peft_settings.alphas_of(file, metadata, without)
    return tensors | {f"{name}.alpha": torch.tensor(alpha) for name, alpha in alphas.items()}


def _unpickle(file: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's text advises to let the file run its code
        raise NetworkError(
            f"LoRA file {file} cannot be read: it is damaged, or holds more than tensors, which could run any code; give a"
            " .safetensors file"
        ) from error
    except Exception as error:  # bytes that are no pickle, or half of one, end in errors of many kinds
        raise NetworkError(f"LoRA file {file} cannot be read: {_first_line(error)}; is it complete?") from error
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]
    if not isinstance(tensors, dict) or not all(_is_named_tensor(*entry) for entry in tensors.items()):
        raise NetworkError(f"LoRA file {file} does not hold a table of tensors; it is not a LoRA file")
    # Unlike those of a .safetensors file they may be parameters, and share memory.
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _is_named_tensor(name: object, value: object) -> bool:
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    return isinstance(name, str) and dense


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        # safe_open says of every file that it cannot open that there is none; open says why.
        with file.open("rb"), safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            return tensors, opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise NetworkError(f"LoRA file {file} cannot be read: {_first_line(error)}; is it complete?") from error


def read_metadata(file: Path) -> dict[str, str]:
    """Returns a LoRA file's metadata for a file that is made from it: without entries that speak of its tensors.

    Only ``.safetensors`` files have any.
    """
    if file.suffix.lower() != ".safetensors":
        return {}
    of_tensors = ("lora_adapter_metadata", "sshs_model_hash", "sshs_legacy_hash", "format")
    metadata = read_safetensors_header(file)[0].get("__metadata__", {})
    return {name: text for name, text in metadata.items() if name not in of_tensors}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def to_factors(tensors: Mapping[str, Tensor], qkv_rows: Sequence[int] | None, source: str) -> dict[str, Factors]:
    """Returns the LoRA of each module under kohya's names, whatever the form of the keys.

    Args:
        tensors: a LoRA file's tensors.
        qkv_rows: how many rows of the model's fused Linear are q, k and v; None if the model has none.
        source: the file, for messages.

    Raises:
        NetworkError: keys that belong to no LoRA, or modules that are incomplete, misshaped, or there twice.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    foreign, twice = [], []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            foreign.append(key)
            continue
        parts, kind = modules.setdefault(kohya_name(match["module"]), {}), _kind(match)
        if kind in parts:
            twice.append(key)
        parts[kind] = tensor
    if foreign:
        raise NetworkError(
            f"{source}: {len(foreign)} of {len(tensors)} keys are no LoRA keys ({some(foreign)})"
            f"{guess(tensors) or '; give a file that holds a LoRA and nothing else'}"
        )
    if twice:
        raise NetworkError(_is_there_twice(source, twice))
    factors = {name: _one(name, parts, source) for name, parts in modules.items()}
    return _join_qkv(factors, qkv_rows, source)


def _is_there_twice(source: str, names: Sequence[str]) -> str:
    return (
        f"{source}: {some(names)}: the file holds the same under another name too, so it is unclear which of the two counts;"
        " two files were put into one, give one of them"
    )


def _kind(match: re.Match[str]) -> str:
    """Returns what a key holds: down, up or alpha."""
    return {"A": "down", "B": "up"}.get(match["ab"] or "") or match["kohya"] or match["dotted"] or "alpha"


def qkv_rows_in(tensors: Mapping[str, Tensor], source: str) -> tuple[int, int, int] | None:
    """Returns how many rows q, k and v have in a file that holds them apart, or None where it does not.

    There are as many queries as the Linear has inputs, and as many values as keys.

    Raises:
        NetworkError: the file has queries alone, and is not for the 2.6 B model.
    """
    rows: dict[str, int] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        split = split_part(kohya_name(match["module"])) if match else None
        if match is None or split is None or tensor.dim() != 2:
            continue
        if _kind(match) == "up":
            rows[split[1]] = tensor.shape[0]
        elif _kind(match) == "down":
            rows["q"] = tensor.shape[1]
    if "q" not in rows:
        return None
    others = rows.get("k", rows.get("v", _KEYS_OF_WIDTH.get(rows["q"])))
    if others is None:
        raise NetworkError(
            f"{source}: it holds LoRAs of queries alone, {rows['q']} wide, which is not the 2.6 B model, so it is unknown"
            " how many keys belong to them"
        )
    return rows["q"], others, others


def _one(name: str, parts: Mapping[str, Tensor], source: str) -> Factors:
    missing = [kind for kind in ("down", "up") if kind not in parts]
    if missing:
        raise NetworkError(f"{source}: the LoRA of {name} has no lora_{missing[0]}; the file is incomplete")
    down, up = parts["down"], parts["up"]
    if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
        raise NetworkError(
            f"{source}: the LoRA of {name} has the shapes {tuple(down.shape)} and {tuple(up.shape)}, which do not"
            " multiply as (rank, in) and (out, rank)"
        )
    if 0 in (*down.shape, *up.shape):
        raise NetworkError(
            f"{source}: the LoRA of {name} is empty (lora_down {tuple(down.shape)}, lora_up {tuple(up.shape)}); the file is"
            " damaged"
        )
    given = parts.get("alpha", torch.tensor(0.0))
    alpha = float(given.float()) if given.numel() == 1 and not given.is_complex() else math.nan
    if not math.isfinite(alpha):
        raise NetworkError(f"{source}: the alpha of {name} is no number; the file is damaged")
    if not all(part.is_floating_point() and "float4" not in str(part.dtype) for part in (down, up)):
        raise NetworkError(
            f"{source}: the LoRA of {name} holds {down.dtype} and {up.dtype} instead of fractions; give the LoRA in"
            " float, fp16 or bf16"
        )
    # sd-scripts reads an alpha of 0 as the rank; as a factor it would make a LoRA that does nothing.
    return Factors(down.float(), up.float(), alpha or float(down.shape[0]))


def _join_qkv(factors: Mapping[str, Factors], qkv_rows: Sequence[int] | None, source: str) -> dict[str, Factors]:
    joined: dict[str, Factors] = {}
    groups: dict[str, dict[str, Factors]] = {}
    for name, one in factors.items():
        split = split_part(name)
        if split is None:
            joined[name] = one
            continue
        fused, part = split
        groups.setdefault(fused, {})[part] = one
    for name, parts in groups.items():
        if name in joined:
            raise NetworkError(_is_there_twice(source, [name]))
        if qkv_rows is None:
            raise NetworkError(f"{source}: {name} cannot be joined from separate q, k and v")
        joined[name] = _fuse(name, parts, qkv_rows, source)
    return joined


def _fuse(name: str, parts: Mapping[str, Factors], qkv_rows: Sequence[int], source: str) -> Factors:
    """Returns one LoRA that equals those of q, k and v (some may be missing) on the fused Linear."""
    for part, rows in zip("qkv", qkv_rows, strict=True):
        if part in parts and parts[part].up.shape[0] != rows:
            raise NetworkError(
                f"{source}: to_{part} of {name} has {parts[part].up.shape[0]} rows, this model has {rows}{_OTHER_MODEL}"
            )
    ordered = [parts[part] for part in "qkv" if part in parts]
    first = ordered[0]
    if len({one.down.shape[1] for one in ordered}) > 1:
        raise NetworkError(f"{source}: the LoRAs that make up {name} have inputs of different widths")
    same = all(one.alpha == first.alpha and torch.equal(one.down, first.down) for one in ordered)
    if same:
        # All three share one down factor, as after diffusers' own conversion: stacking the rows undoes it.
        blocks = [
            parts[part].up if part in parts else first.up.new_zeros(rows, first.up.shape[1])
            for part, rows in zip("qkv", qkv_rows, strict=True)
        ]
        return Factors(first.down, torch.cat(blocks), first.alpha)
    scales = {part: one.alpha / one.down.shape[0] for part, one in parts.items()}
    equal = len(set(scales.values())) == 1
    ups = {part: one.up if equal else one.up * scales[part] for part, one in parts.items()}
    # A missing one has rows and no ranks.
    up = torch.block_diag(
        *(ups.get(part, first.up.new_zeros(rows, 0)) for part, rows in zip("qkv", qkv_rows, strict=True))
    )
    rank = up.shape[1]
    alpha = first.alpha / first.down.shape[0] * rank if equal else float(rank)
    return Factors(torch.cat([one.down for one in ordered]), up, alpha)


_OTHER_MODEL = "; the LoRA is for another model"

# What a file's keys give away about the model it is for: the first pattern that is found in a key names it.
_SIGNS: tuple[tuple[str, str], ...] = (
    (
        r"hada_w1|lokr_w1|oft_blocks|dora_scale|lora_magnitude_vector|\.(diff|on_input|lambda_layer|[ab]1\.weight)$",
        "a LoHa, LoKr, OFT, GLoRA, IA3, T-LoRA, DoRA or full file, which only training takes, with --network_module"
        " lycoris.kohya",
    ),
    (r"lora_te2_|input_blocks|down_blocks_\d_attentions_\d_transformer_blocks_[1-9]", "an SDXL LoRA"),
    (r"lora_unet_(down|up|mid)_block|lora_te_text_model", "a Stable Diffusion 1 or 2 LoRA"),
    (r"double_blocks|single_blocks|single_transformer_blocks", "a FLUX LoRA"),
    (r"joint_blocks", "a Stable Diffusion 3 LoRA"),
    (r"transformer_blocks", "a LoRA for another diffusers transformer"),
    (r"cap_embedder|noise_refiner", "a whole Lumina checkpoint"),
    (r"model\.layers\.\d+|self_attn|embed_tokens", "a language model's file"),
    (r"encoder\.down|decoder\.up", "an autoencoder's file"),
)


# Z-Image's Linears go by Lumina's names and are 3840 wide where Lumina's are 2304.
_Z_IMAGE_KEY = re.compile(r"(attention|feed_forward).*(lora_A|lora[_.]down)")


def guess(tensors: Mapping[str, Tensor]) -> str:
    """Returns ``"; it looks like ..."`` for a file that is not a LoRA for this model, or ``""``."""
    lora = any(_KEY.fullmatch(key) for key in tensors)
    for pattern, what in _SIGNS:
        if lora and what.endswith(("checkpoint", "file")):
            continue
        if any(re.search(pattern, key) for key in tensors):
            return f"; it looks like {what}"
    inputs = {tensor.shape[1] for key, tensor in tensors.items() if tensor.dim() == 2 and _Z_IMAGE_KEY.search(key)}
    return "; it looks like a Z-Image LoRA" if 3840 in inputs else ""


def drop_unused_layers(factors: Mapping[str, Factors], prefix: str, num_layers: int, source: str) -> dict[str, Factors]:
    """Returns the factors without those of the text encoder's last layer, and names these once in the log.

    The transformer reads the text encoder's next-to-last layer, so the last one is not built here and a LoRA on it
    never had any effect; other programs save it all the same.
    """
    unused = [name for name in factors if num_layers and name.startswith(f"{prefix}_layers_{num_layers}_")]
    if unused:
        logger.info(
            "%s: %d modules of the text encoder's last layer are not used, because its output is never read: %s",
            source,
            len(unused),
            ", ".join(unused),
        )
    return {name: one for name, one in factors.items() if name not in unused}


def content_hashes(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Returns the two hashes by which other programs recognise a LoRA file, as sd-scripts computes them.

    Both are taken from a serialisation with the ``ss_`` entries of the metadata alone: ``sshs_model_hash`` is the
    SHA-256 of everything behind its header, ``sshs_legacy_hash`` the first 8 digits of that of the 64 KiB at 1 MiB.
    """
    from safetensors.torch import save

    data = save(dict(state), {name: text for name, text in metadata.items() if name.startswith("ss_")})
    header_end = 8 + int.from_bytes(data[:8], "little")
    with memoryview(data) as view:
        return {
            "sshs_model_hash": hashlib.sha256(view[header_end:]).hexdigest(),
            "sshs_legacy_hash": hashlib.sha256(view[0x100000:0x110000]).hexdigest()[:8],
        }
