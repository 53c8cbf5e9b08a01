"""How each model's tensors are named in the files that people have: prefixes, and diffusers' names for the original.

Every map goes from the name that our model has to the name(s) that a file has, so the tensors of any file are checked
under the names that its user can look up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

# Part of other models in an all-in-one file: never belongs to a component whose own prefix is shorter.
_OTHER_COMPONENTS = (
    "model.diffusion_model.",
    "model_ema.",
    "first_stage_model.",
    "vae.",
    "text_encoders.",
    "cond_stage_model.",
    "conditioner.",
)

# Harmless extras: scales and markers of fp8 files (read with their weights), tensors of training programs.
_HARMLESS = re.compile(
    r"(^|\.)(scaled_fp8|scale_weight|weight_scale|scale_input|input_scale|comfy_quant|spiece_model|logit_scale|inv_freq)$"
    r"|^lm_head\.weight$|^loss\.|^model_ema\."
)


@dataclass(frozen=True)
class Layout:
    """One way of naming a model's tensors.

    Attributes:
        name: for messages.
        signatures: names that tell this layout; found behind any prefix.
        source_names: our name -> the file's names without prefix; several are joined along axis 0, none means that this
            layout has no such tensor.
    """

    name: str
    signatures: tuple[str, ...]
    source_names: Callable[[str], tuple[str, ...]]


@dataclass(frozen=True)
class Found:
    """A layout that matches a file, and the prefix in front of its names."""

    layout: Layout
    prefix: str

    def scope(self, names: Iterable[str]) -> set[str]:
        """Returns those of the file's names, without the prefix, that belong to this component."""
        others = tuple(other for other in _OTHER_COMPONENTS if not self.prefix.startswith(other))
        return {
            name[len(self.prefix) :] for name in names if name.startswith(self.prefix) and not name.startswith(others)
        }


def find_layout(names: Iterable[str], layouts: Iterable[Layout]) -> Found | None:
    """Returns the layout and prefix that most signatures agree on (the shortest prefix on a tie), or None."""
    names = list(names)
    votes: dict[tuple[int, str], int] = {}
    layouts = list(layouts)
    for index, layout in enumerate(layouts):
        for signature in layout.signatures:
            for name in names:
                if name == signature or name.endswith("." + signature):
                    key = (index, name[: -len(signature)])
                    votes[key] = votes.get(key, 0) + 1
    if not votes:
        return None
    index, prefix = min(votes, key=lambda key: (-votes[key], len(key[1])))
    return Found(layouts[index], prefix)


def is_harmless(name: str) -> bool:
    """Returns whether a tensor that no model has may stand in a file all the same."""
    return _HARMLESS.search(name) is not None


def _same(name: str) -> tuple[str, ...]:
    return (name,)


_DIFFUSERS_NEXT_DIT = (
    (r"^cap_embedder\.", "time_caption_embed.caption_embedder."),
    (r"^t_embedder\.mlp\.0\.", "time_caption_embed.timestep_embedder.linear_1."),
    (r"^t_embedder\.mlp\.2\.", "time_caption_embed.timestep_embedder.linear_2."),
    (r"^final_layer\.adaLN_modulation\.1\.", "norm_out.linear_1."),
    (r"^final_layer\.linear\.", "norm_out.linear_2."),
    (r"\.attention\.out\.", ".attn.to_out.0."),
    (r"\.attention\.([qk])_norm\.", r".attn.norm_\1."),
    (r"\.feed_forward\.w([123])\.", r".feed_forward.linear_\1."),
    (r"\.adaLN_modulation\.1\.", ".norm1.linear."),
    (r"^(context_refiner\.\d+)\.attention_norm1\.", r"\1.norm1."),
    (r"\.attention_norm1\.", ".norm1.norm."),
    (r"\.attention_norm2\.", ".norm2."),
)


def diffusers_next_dit_names(name: str) -> tuple[str, ...]:
    """Returns the name(s) of a Next-DiT tensor in diffusers' ``Lumina2Transformer2DModel``.

    ``attention.qkv`` is three tensors there, and ``norm_final``, which nothing uses, is left out.
    """
    if name == "norm_final.weight":
        return ()
    if name.endswith(".attention.qkv.weight"):
        block = name.removesuffix("attention.qkv.weight")
        return tuple(f"{block}attn.to_{part}.weight" for part in "qkv")
    for pattern, replacement in _DIFFUSERS_NEXT_DIT:
        name = re.sub(pattern, replacement, name)
    return (name,)


_ORIGINAL_AUTOENCODER = (
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r".down.\1.block.\2."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.(\d+)\.", r".up.\1.block.\2."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)


def original_autoencoder_name(name: str, num_levels: int) -> str:
    """Returns the original name of an ``AutoencoderKL`` tensor; the original counts decoder levels from the output."""
    for pattern, replacement in _ORIGINAL_AUTOENCODER:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"\.up\.(\d+)\.", lambda match: f".up.{num_levels - 1 - int(match[1])}.", name)


NEXT_DIT_LAYOUTS = (
    Layout(
        "the original names",
        ("cap_embedder.1.weight", "layers.0.attention.qkv.weight", "noise_refiner.0.attention.qkv.weight"),
        _same,
    ),
    Layout(
        "diffusers' names",
        (
            "time_caption_embed.caption_embedder.1.weight",
            "layers.0.attn.to_q.weight",
            "noise_refiner.0.attn.to_q.weight",
        ),
        diffusers_next_dit_names,
    ),
)

GEMMA2_LAYOUTS = (
    Layout(
        "transformers' names",
        ("embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "layers.0.pre_feedforward_layernorm.weight"),
        _same,
    ),
)


def autoencoder_layouts(num_levels: int) -> tuple[Layout, ...]:
    """Returns the two layouts of an autoencoder with this many resolution levels."""
    return (
        Layout(
            "the original names",
            (
                "encoder.down.0.block.0.conv1.weight",
                "decoder.up.0.block.0.conv1.weight",
                "encoder.mid.block_1.conv1.weight",
            ),
            lambda name: (original_autoencoder_name(name, num_levels),),
        ),
        Layout(
            "diffusers' names",
            (
                "encoder.down_blocks.0.resnets.0.conv1.weight",
                "decoder.up_blocks.0.resnets.0.conv1.weight",
                "encoder.mid_block.resnets.0.conv1.weight",
            ),
            _same,
        ),
    )
