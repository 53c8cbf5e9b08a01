"""What the Linears that a LoRA can stand beside are called in the files of several programs; torch is not needed here.

A Linear has a path in its model (``layers.0.attention.qkv``), and these names in LoRA files:

* ``lora_unet_layers_0_attention_qkv``, Gemma2's ``lora_te_layers_0_mlp_up_proj``: kohya's, and those used inside;
* ``diffusion_model.layers.0.attention.qkv``, ``text_encoders.gemma2_2b.transformer.model.layers.0.mlp.up_proj``: ComfyUI's;
* ``transformer.layers.0.attn.to_q``, ``.to_k``, ``.to_v``: diffusers', which has q, k and v apart and its own words.
"""

from __future__ import annotations

import re

from networks.lora_lumina_args import GEMMA2, LINEAR_KINDS, LUMINA

# diffusers' words for a Linear's path, or for its part behind the block.
_DIFFUSERS: dict[str, str] = {
    "attention.out": "attn.to_out.0",
    "feed_forward.w1": "feed_forward.linear_1",
    "feed_forward.w2": "feed_forward.linear_2",
    "feed_forward.w3": "feed_forward.linear_3",
    "adaLN_modulation.1": "norm1.linear",
    "final_layer.linear": "norm_out.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    "x_embedder": "x_embedder",
    **{f"attention.to_{part}": f"attn.to_{part}" for part in "qkv"},
}
_ORIGINAL = {theirs: ours for ours, theirs in _DIFFUSERS.items()} | {"attention.to_out.0": "attention.out"}
_IN_BLOCK = re.compile(r"(?P<block>(?:layers|noise_refiner|context_refiner)\.\d+\.)(?P<rest>.+)")
_SPLIT = re.compile(r"(?P<attention>.+\.attention)\.to_(?P<part>[qkv])")
# First parts of names, and whose Linears they are.
_PREFIXES: tuple[tuple[str, str], ...] = (
    ("text_encoders.gemma2_2b.transformer.model.", GEMMA2.prefix),
    ("model.diffusion_model.", LUMINA.prefix),
    ("diffusion_model.", LUMINA.prefix),
    ("base_model.model.", LUMINA.prefix),
    ("transformer.", LUMINA.prefix),
)


def _numbered(kind: str) -> tuple[re.Pattern[str], str]:
    """Returns what finds the number of a kind's block in kohya's name, and the path to put it into."""
    pattern = re.escape(kind.replace(".0.", ".NUMBER.")).replace(r"\.NUMBER\.", r"_(\d+)_").replace(r"\.", "_")
    return re.compile(pattern), kind.replace(".0.", ".{}.")


_KINDS = [_numbered(kind) for kind in LINEAR_KINDS]
_NUMBERED_ENCODER = re.compile(r"^lora_te1(?=_layers_)")  # as LyCORIS counts text encoders, of which there is one
_GEMMA2_NAME = re.compile(r"layers_(\d+)_(self_attn|mlp)_((?:[qkvo]|gate|up|down)_proj)")


def kohya_name(name: str) -> str:
    """Returns kohya's name of a module; a separate q, k or v keeps its dots (``lora_unet.layers.0.attention.to_q``)."""
    if "." not in name and name.startswith("lora_"):
        return _NUMBERED_ENCODER.sub(GEMMA2.prefix, name)
    start, path = next(
        ((start, name.removeprefix(prefix)) for prefix, start in _PREFIXES if name.startswith(prefix)),
        (LUMINA.prefix, name),
    )
    block, rest = _block_and_rest(path)
    path = block + _ORIGINAL.get(rest, rest)
    return f"{start}.{path}" if _SPLIT.fullmatch(path) else f"{start}_{path.replace('.', '_')}"


def split_part(name: str) -> tuple[str, str] | None:
    """Returns the fused Linear that a separate q, k or v belongs to, and which it is; None for any other name.

    Args:
        name: as :func:`kohya_name` gives it.
    """
    start, dot, path = name.partition(".")
    match = _SPLIT.fullmatch(path) if dot else None
    return match and (f"{start}_{match['attention'].replace('.', '_')}_qkv", match["part"])


def model_path(name: str) -> str | None:
    """Returns the path of the Linear that kohya's name means, or None where neither model has one of that name."""
    rest = name.removeprefix(f"{GEMMA2.prefix}_")
    if rest != name:
        match = _GEMMA2_NAME.fullmatch(rest)
        return match and f"layers.{match[1]}.{match[2]}.{match[3]}"
    rest = name.removeprefix(f"{LUMINA.prefix}_")
    for pattern, path in _KINDS:
        if rest != name and (match := pattern.fullmatch(rest)):
            return path.format(*match.groups())
    return None


def comfyui_name(name: str) -> str:
    """Returns ComfyUI's name of a module of kohya's name, which either model must have."""
    if is_text_encoder(name):
        return f"text_encoders.gemma2_2b.transformer.model.{model_path(name)}"
    return f"diffusion_model.{model_path(name)}"


def diffusers_name(name: str, part: str = "") -> str:
    """Returns diffusers' name of a module of kohya's name, which the transformer must have.

    Args:
        name: kohya's name.
        part: ``q``, ``k`` or ``v`` of a fused Linear.
    """
    block, rest = _block_and_rest(str(model_path(name)))
    return f"transformer.{block}{_DIFFUSERS[f'attention.to_{part}' if part else rest]}"


def is_text_encoder(name: str) -> bool:
    """Returns whether kohya's name is that of a module of Gemma2."""
    return name.startswith(f"{GEMMA2.prefix}_")


def is_fused(name: str) -> bool:
    """Returns whether kohya's name is that of a Linear that holds q, k and v."""
    return LUMINA.is_fused(model_path(name) or "")


def _block_and_rest(path: str) -> tuple[str, str]:
    match = _IN_BLOCK.fullmatch(path)
    return (match["block"], match["rest"]) if match else ("", path)
