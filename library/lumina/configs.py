"""The sizes of the three models, and the tensors that each must have: plain Python, so files are checked at once.

A model file is inspected before anything heavy is imported. That needs the model's configuration, read off tensor
shapes (Next-DiT) or off a ``config.json`` (Gemma2, autoencoder), and the name and shape of every tensor it must have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

PATCH_SIZE = 2
ROPE_AXES = 3  # caption index, image row, image column
TIME_FREQUENCIES = 256

Shape = tuple[int, ...]


@dataclass(frozen=True)
class NextDiTConfig:
    """The sizes of a Next-DiT (defaults: Lumina Image 2.0); everything else about it is a constant of the family."""

    dim: int = 2304
    num_layers: int = 26
    num_noise_refiners: int = 2
    num_context_refiners: int = 2
    num_heads: int = 24
    num_kv_heads: int = 8
    head_dim: int = 96
    ffn_dim: int = 9216
    time_dim: int = 1024
    cap_dim: int = 2304
    channels: int = 16

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Shape]) -> NextDiTConfig:
        """Returns the configuration that a checkpoint's tensor shapes imply.

        Args:
            shapes: original parameter name -> shape.

        Raises:
            KeyError: a tensor that the sizes are read from is missing.
            ValueError: the shapes belong to no Next-DiT.
        """
        attention = "layers.0.attention."
        (head_dim,) = shapes[attention + "q_norm.weight"]
        dim, query_dim = shapes[attention + "out.weight"]
        qkv_dim = shapes[attention + "qkv.weight"][0]
        if head_dim % (2 * ROPE_AXES) or not head_dim:
            raise ValueError(f"a head dimension of {head_dim} cannot be split into {ROPE_AXES} rotary axes")
        num_heads = query_dim // head_dim
        num_kv_heads = (qkv_dim // head_dim - num_heads) // 2
        if (num_heads + 2 * num_kv_heads) * head_dim != qkv_dim or num_heads * head_dim != query_dim:
            raise ValueError(f"attention.qkv has {qkv_dim} rows, which heads of {head_dim} do not divide into q, k, v")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"{num_heads} heads cannot share {num_kv_heads} key/value heads")
        return cls(
            dim=dim,
            num_layers=_count_blocks(shapes, "layers"),
            num_noise_refiners=_count_blocks(shapes, "noise_refiner"),
            num_context_refiners=_count_blocks(shapes, "context_refiner"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            ffn_dim=shapes["layers.0.feed_forward.w1.weight"][0],
            time_dim=shapes["t_embedder.mlp.0.weight"][0],
            cap_dim=shapes["cap_embedder.1.weight"][1],
            channels=shapes["x_embedder.weight"][1] // PATCH_SIZE**2,
        )

    def tensor_shapes(self) -> dict[str, Shape]:
        """Returns every parameter's original name and shape."""
        patch = PATCH_SIZE**2 * self.channels
        shapes: dict[str, Shape] = {
            **_linear("x_embedder", patch, self.dim),
            **_linear("t_embedder.mlp.0", TIME_FREQUENCIES, self.time_dim),
            **_linear("t_embedder.mlp.2", self.time_dim, self.time_dim),
            "cap_embedder.0.weight": (self.cap_dim,),
            **_linear("cap_embedder.1", self.cap_dim, self.dim),
        }
        groups = {
            "noise_refiner": self.num_noise_refiners,
            "context_refiner": self.num_context_refiners,
            "layers": self.num_layers,
        }
        for group, count in groups.items():
            for index in range(count):
                shapes |= self._block_shapes(f"{group}.{index}.", modulated=group != "context_refiner")
        return shapes | {
            "norm_final.weight": (self.dim,),
            **_linear("final_layer.linear", self.dim, patch),
            **_linear("final_layer.adaLN_modulation.1", self.time_dim, self.dim),
        }

    def _block_shapes(self, block: str, modulated: bool) -> dict[str, Shape]:
        query_dim = self.num_heads * self.head_dim
        shapes: dict[str, Shape] = {
            block + "attention.qkv.weight": (query_dim + 2 * self.num_kv_heads * self.head_dim, self.dim),
            block + "attention.out.weight": (self.dim, query_dim),
            block + "attention.q_norm.weight": (self.head_dim,),
            block + "attention.k_norm.weight": (self.head_dim,),
            block + "feed_forward.w1.weight": (self.ffn_dim, self.dim),
            block + "feed_forward.w2.weight": (self.dim, self.ffn_dim),
            block + "feed_forward.w3.weight": (self.ffn_dim, self.dim),
        }
        for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            shapes[f"{block}{norm}.weight"] = (self.dim,)
        if modulated:
            shapes |= _linear(block + "adaLN_modulation.1", self.time_dim, 4 * self.dim)
        return shapes


def _count_blocks(shapes: Mapping[str, Shape], group: str) -> int:
    count = 0
    while f"{group}.{count}.attention.qkv.weight" in shapes:
        count += 1
    return count


def _linear(name: str, num_in: int, num_out: int) -> dict[str, Shape]:
    return {f"{name}.weight": (num_out, num_in), f"{name}.bias": (num_out,)}


@dataclass(frozen=True)
class Gemma2TextConfig:
    """What is used of a Gemma2 ``config.json`` (defaults: Gemma-2-2B)."""

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    hidden_activation: str = "gelu_pytorch_tanh"
    query_pre_attn_scalar: float = 256
    attn_logit_softcapping: float | None = 50.0
    sliding_window: int = 4096

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Gemma2TextConfig:
        """Returns the configuration that a ``config.json`` of transformers holds; what it leaves out is Gemma-2-2B's.

        Raises:
            ValueError: a value has the wrong type, or belongs to no model that could be built.
        """
        values = dict(config)
        rope = config.get("rope_parameters") or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"rope_parameters is {rope!r}, not a table")
        values["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", cls.rope_theta))
        values["hidden_activation"] = (
            config.get("hidden_activation") or config.get("hidden_act") or cls.hidden_activation
        )
        result = cls(**_known_values(cls, values))
        if result.hidden_activation not in _ACTIVATIONS:
            raise ValueError(f"hidden_activation is {result.hidden_activation!r}, none of {', '.join(_ACTIVATIONS)}")
        if result.num_attention_heads % result.num_key_value_heads:
            raise ValueError(
                f"{result.num_attention_heads} num_attention_heads cannot share {result.num_key_value_heads}"
                " num_key_value_heads"
            )
        if result.head_dim % 2:
            raise ValueError(f"head_dim is {result.head_dim}, which rotary positions cannot halve")
        return result

    @property
    def num_layers_used(self) -> int:
        """The features are the input of the last layer, so the last layer is never computed."""
        return self.num_hidden_layers - 1

    def tensor_shapes(self) -> dict[str, Shape]:
        """Returns name and shape of every tensor that computing the features needs, as ``Gemma2Model`` names them."""
        shapes: dict[str, Shape] = {"embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for index in range(self.num_layers_used):
            shapes |= self.layer_shapes(index)
        return shapes

    def unused_shapes(self) -> dict[str, Shape]:
        """Returns name and shape of what a whole checkpoint holds besides: the last layer and the final norm."""
        return self.layer_shapes(self.num_layers_used) | {"norm.weight": (self.hidden_size,)}

    def layer_shapes(self, index: int) -> dict[str, Shape]:
        """Returns name and shape of one layer's tensors."""
        layer, width = f"layers.{index}.", self.hidden_size
        query_dim, kv_dim = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes: dict[str, Shape] = {
            layer + "self_attn.q_proj.weight": (query_dim, width),
            layer + "self_attn.k_proj.weight": (kv_dim, width),
            layer + "self_attn.v_proj.weight": (kv_dim, width),
            layer + "self_attn.o_proj.weight": (width, query_dim),
            layer + "mlp.gate_proj.weight": (self.intermediate_size, width),
            layer + "mlp.up_proj.weight": (self.intermediate_size, width),
            layer + "mlp.down_proj.weight": (width, self.intermediate_size),
        }
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes[f"{layer}{norm}_layernorm.weight"] = (width,)
        return shapes


@dataclass(frozen=True)
class AutoencoderConfig:
    """What is used of an ``AutoencoderKL`` configuration (defaults: the FLUX autoencoder)."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> AutoencoderConfig:
        """Returns the configuration that a ``config.json`` of diffusers holds; what it leaves out is FLUX's.

        Raises:
            ValueError: a value has the wrong type, or belongs to no model that could be built.
        """
        values = dict(config)
        # diffusers' own defaults where its files say nothing: an old Stable Diffusion VAE has no shift, and both convs.
        if config.get("_class_name") == "AutoencoderKL":
            values = {"use_quant_conv": True, "use_post_quant_conv": True, "shift_factor": 0.0} | values
        if values.get("shift_factor", 0.0) is None:
            values["shift_factor"] = 0.0
        result = cls(**_known_values(cls, values))
        if any(width % result.norm_num_groups for width in result.block_out_channels):
            raise ValueError(
                f"block_out_channels {list(result.block_out_channels)} cannot be divided into {result.norm_num_groups}"
                " norm_num_groups"
            )
        return result

    def tensor_shapes(self) -> dict[str, Shape]:
        """Returns every tensor's name and shape as diffusers' ``AutoencoderKL`` names them."""
        widths, latent = self.block_out_channels, self.latent_channels
        shapes: dict[str, Shape] = _conv("encoder.conv_in", self.in_channels, widths[0], 3)
        width = widths[0]
        for index, out in enumerate(widths):
            for layer in range(self.layers_per_block):
                shapes |= _resnet(f"encoder.down_blocks.{index}.resnets.{layer}", width, out)
                width = out
            if index < len(widths) - 1:
                shapes |= _conv(f"encoder.down_blocks.{index}.downsamplers.0.conv", width, width, 3)
        shapes |= _middle("encoder.mid_block", width) | _norm("encoder.conv_norm_out", width)
        shapes |= _conv("encoder.conv_out", width, 2 * latent, 3)
        if self.use_quant_conv:
            shapes |= _conv("quant_conv", 2 * latent, 2 * latent, 1)
        if self.use_post_quant_conv:
            shapes |= _conv("post_quant_conv", latent, latent, 1)
        shapes |= _conv("decoder.conv_in", latent, width, 3) | _middle("decoder.mid_block", width)
        for index, out in enumerate(reversed(widths)):
            for layer in range(self.layers_per_block + 1):
                shapes |= _resnet(f"decoder.up_blocks.{index}.resnets.{layer}", width, out)
                width = out
            if index < len(widths) - 1:
                shapes |= _conv(f"decoder.up_blocks.{index}.upsamplers.0.conv", width, width, 3)
        return shapes | _norm("decoder.conv_norm_out", width) | _conv("decoder.conv_out", width, self.out_channels, 3)


def _conv(name: str, num_in: int, num_out: int, size: int) -> dict[str, Shape]:
    return {f"{name}.weight": (num_out, num_in, size, size), f"{name}.bias": (num_out,)}


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _resnet(name: str, num_in: int, num_out: int) -> dict[str, Shape]:
    shapes = _norm(f"{name}.norm1", num_in) | _conv(f"{name}.conv1", num_in, num_out, 3)
    shapes |= _norm(f"{name}.norm2", num_out) | _conv(f"{name}.conv2", num_out, num_out, 3)
    if num_in != num_out:
        shapes |= _conv(f"{name}.conv_shortcut", num_in, num_out, 1)
    return shapes


def _middle(name: str, width: int) -> dict[str, Shape]:
    attention = f"{name}.attentions.0"
    shapes = _resnet(f"{name}.resnets.0", width, width) | _norm(f"{attention}.group_norm", width)
    for projection in ("to_q", "to_k", "to_v", "to_out.0"):
        shapes |= _linear(f"{attention}.{projection}", width, width)
    return shapes | _resnet(f"{name}.resnets.1", width, width)


def _known_values(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of ``values`` that are fields of ``cls``, with lists as tuples.

    Raises:
        ValueError: a value's type is not that of the field's default, or a size is beyond every model's.
    """
    known: dict[str, Any] = {}
    for field in fields(cls):
        if field.name not in values:
            continue
        value = values[field.name]
        if isinstance(value, list):
            value = tuple(value)
        if isinstance(field.default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        may_be_none = field.name == "attn_logit_softcapping"
        if isinstance(value, float) and value.is_integer() and isinstance(field.default, int):
            value = int(value)
        if type(value) is not type(field.default) and not (may_be_none and value is None):
            raise ValueError(f"{field.name} is {values[field.name]!r}, not of type {type(field.default).__name__}")
        _check_size(field.name, value)
        known[field.name] = value
    return known


_MOST_BLOCKS = 1000
_LARGEST_SIZE = 2**24
_ACTIVATIONS = ("gelu_pytorch_tanh", "gelu", "gelu_new", "relu", "silu")


def _check_size(name: str, value: Any) -> None:
    """Raises ``ValueError`` for sizes with which building a model would fail, or only seem to hang."""
    if isinstance(value, tuple):
        if not 1 <= len(value) <= 16 or not all(type(item) is int for item in value):
            raise ValueError(f"{name} is {list(value)!r}, not a list of whole numbers")
        for item in value:
            _check_size(name, item)
    elif isinstance(value, int) and not isinstance(value, bool):
        limit = _MOST_BLOCKS if "layers" in name else _LARGEST_SIZE
        if not 1 <= value <= limit:
            raise ValueError(f"{name} is {value}, which is outside 1 to {limit}")
    elif isinstance(value, float) and not (math.isfinite(value) and (value > 0 or name == "shift_factor")):
        raise ValueError(f"{name} is {value}, which is not a number above 0")
