"""What model a file really holds, guessed from its tensors' names and shapes, for the message that refuses it."""

from __future__ import annotations

import re
from collections.abc import Mapping

NEXT_DIT = "a Lumina Image 2.0 transformer"
GEMMA2 = "Gemma-2-2B, the text encoder"
AUTOENCODER = "the FLUX autoencoder"

Shapes = Mapping[str, tuple[int, ...]]

_LORA = re.compile(r"(lora_(down|up|A|B|a|b)\b|lora\.(down|up)\.|\.hada_w1_a|\.lokr_w[12]|\.dora_scale|\.oft_blocks)")

# Name endings in order, the most telling first: the first row that some tensor's name matches is the answer.
_BY_NAME: tuple[tuple[str, str], ...] = (
    (r"clip_text_pooled_proj\.0\.weight$", "NewBie, a model derived from Lumina Image 2.0 with other conditioning"),
    (r"double_blocks\.0\.img_attn\.qkv\.weight$", "a FLUX transformer (or a model built like it)"),
    (r"^(transformer\.)?single_transformer_blocks\.0\.", "a FLUX transformer in diffusers' naming"),
    (r"joint_blocks\.0\.x_block\.attn\.qkv\.weight$", "Stable Diffusion 3"),
    (r"(conditioner\.embedders\.1\.|label_emb\.0\.0\.weight$|add_embedding\.linear_1\.weight$)", "SDXL"),
    (r"cond_stage_model\.model\.", "Stable Diffusion 2"),
    (r"(cond_stage_model\.transformer\.|input_blocks\.0\.0\.weight$)", "Stable Diffusion 1.5"),
    (r"down_blocks\.[01]\.attentions\.0\.", "the U-Net of a Stable Diffusion model"),
    (r"layers\.0\.attention\.w[qkv]\.weight$", "Lumina-Next, the model before Lumina Image 2.0"),
    (r"transformer_blocks\.0\.img_mlp\.", "Qwen-Image"),
    (r"blocks\.0\.cross_attn\.norm_k\.weight$", "a Wan video transformer"),
    (r"transformer_blocks\.0\.attn1\.to_q\.weight$", "a PixArt-like or video transformer"),
    (r"block\.0\.layer\.0\.SelfAttention\.q\.weight$", "a T5 text encoder"),
    (r"text_model\.encoder\.layers\.0\.", "a CLIP text encoder"),
)


def guess_model(shapes: Shapes) -> str | None:
    """Returns a few words on what a file with these tensors is, or None where nothing is recognised."""
    if not shapes:
        return "an empty file"
    if any(_LORA.search(name) for name in shapes):
        return "a LoRA, not a whole model"
    return _next_dit(shapes) or _by_name(shapes) or _language_model(shapes) or _autoencoder(shapes)


def _find(shapes: Shapes, ending: str) -> tuple[int, ...] | None:
    return next((shape for name, shape in shapes.items() if name == ending or name.endswith("." + ending)), None)


def _by_name(shapes: Shapes) -> str | None:
    for pattern, model in _BY_NAME:
        if any(re.search(pattern, name) for name in shapes):
            return model
    return None


def is_other_next_dit(shapes: Shapes) -> str | None:
    """Returns the name of a model with Next-DiT's layout that is not Lumina Image 2.0, or None."""
    if _find(shapes, "clip_text_pooled_proj.0.weight"):
        return _BY_NAME[0][1]
    width = (_find(shapes, "cap_embedder.1.weight") or (0,))[0]
    if width == 3840 or _find(shapes, "x_pad_token") or _find(shapes, "cap_pad_token"):
        return "Z-Image, whose layout is that of Lumina Image 2.0 but whose sizes and text encoder differ"
    return None


def _next_dit(shapes: Shapes) -> str | None:
    if not (_find(shapes, "cap_embedder.1.weight") or _find(shapes, "time_caption_embed.caption_embedder.1.weight")):
        return _by_name(shapes) if _find(shapes, "clip_text_pooled_proj.0.weight") else None
    other = is_other_next_dit(shapes)
    if other:
        return other
    if _find(shapes, "layers.0.attention.qkv.weight") or _find(shapes, "layers.0.attn.to_q.weight"):
        return NEXT_DIT
    return None


def _language_model(shapes: Shapes) -> str | None:
    query = _find(shapes, "layers.0.self_attn.q_proj.weight")
    if not query:
        return None
    if not _find(shapes, "layers.0.pre_feedforward_layernorm.weight"):
        return "a language model that is not Gemma2 (Llama, Qwen, Gemma 1 ...)"
    if _find(shapes, "layers.0.self_attn.q_norm.weight"):
        return "Gemma 3"
    sizes = {2304: "2B", 3584: "9B", 4608: "27B"}
    size = sizes.get(query[-1])
    if size == "2B":
        return GEMMA2
    return f"Gemma-2-{size}; Lumina Image 2.0 needs Gemma-2-2B" if size else f"a Gemma2 of width {query[-1]}"


def _autoencoder(shapes: Shapes) -> str | None:
    if not (_find(shapes, "encoder.conv_in.weight") and _find(shapes, "decoder.conv_in.weight")):
        return None
    latent = _find(shapes, "decoder.conv_in.weight") or (0, 0)
    if latent[1] == 4:
        return "the autoencoder of Stable Diffusion or SDXL (4 latent channels); Lumina Image 2.0 needs FLUX's (16)"
    return AUTOENCODER if latent[:2] == (512, 16) else f"an autoencoder with {latent[1]} latent channels"
