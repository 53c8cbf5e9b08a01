"""The tensors that a configuration promises are those that the real model classes have."""

from __future__ import annotations

import math

import pytest
import torch
from models_helpers import tiny_models

from library.lumina.autoencoder import build_autoencoder
from library.lumina.configs import AutoencoderConfig, Gemma2TextConfig, NextDiTConfig
from library.lumina.gemma2 import build_gemma2
from library.lumina.key_maps import original_autoencoder_name
from library.lumina.next_dit import NextDiT


def zeros(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def test_next_dit() -> None:
    config = NextDiTConfig(
        dim=48, num_layers=3, num_noise_refiners=1, num_context_refiners=2, num_heads=2, num_kv_heads=2, head_dim=12,
        ffn_dim=20, time_dim=28, cap_dim=36, channels=4,
    )  # fmt: skip
    with torch.device("meta"):
        state = NextDiT(config).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == config.tensor_shapes()
    assert NextDiTConfig.from_shapes(config.tensor_shapes()) == config


def test_gemma2() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = tiny_models().gemma2_config
    with torch.device("meta"):
        whole = Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
            )
        ).model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.items()}
    assert config.tensor_shapes() | config.unused_shapes() == shapes
    assert not config.tensor_shapes().keys() & config.unused_shapes().keys()
    build_gemma2(config, zeros(config.tensor_shapes()))  # loads strictly
    real = Gemma2TextConfig().tensor_shapes() | Gemma2TextConfig().unused_shapes()
    assert (len(real), sum(math.prod(shape) for shape in real.values())) == (288, 2_614_341_888)


@pytest.mark.parametrize("quant_convs", [False, True])
def test_autoencoder(quant_convs: bool) -> None:
    config = AutoencoderConfig(
        block_out_channels=(4, 8, 8), layers_per_block=2, latent_channels=6, norm_num_groups=2,
        use_quant_conv=quant_convs, use_post_quant_conv=quant_convs,
    )  # fmt: skip
    build_autoencoder(config, zeros(config.tensor_shapes()))  # loads strictly


def test_the_original_names_are_those_of_flux() -> None:
    names = {original_autoencoder_name(name, 4) for name in AutoencoderConfig().tensor_shapes()}
    assert len(names) == 244
    assert {
        "encoder.down.1.block.0.nin_shortcut.weight",
        "encoder.down.2.downsample.conv.bias",
        "encoder.mid.attn_1.proj_out.weight",
        "encoder.norm_out.weight",
        "decoder.up.0.block.2.conv2.weight",
        "decoder.up.0.block.0.nin_shortcut.weight",
        "decoder.up.3.upsample.conv.weight",
        "decoder.mid.block_2.norm1.bias",
        "decoder.conv_out.bias",
    } <= names
    # The original counts decoder levels from the output, which has no upsampling of its own.
    assert "decoder.up.0.upsample.conv.weight" not in names


def test_configurations_of_other_programs_are_read() -> None:
    newer = Gemma2TextConfig.from_config({"model_type": "gemma2", "rope_parameters": {"rope_theta": 5000}})
    older = Gemma2TextConfig.from_config({"rope_theta": 5000.0, "hidden_act": "gelu", "attn_logit_softcapping": None})
    assert newer.rope_theta == older.rope_theta == 5000.0
    assert (older.hidden_activation, older.attn_logit_softcapping) == ("gelu", None)
    flux = AutoencoderConfig.from_config(
        {
            "_class_name": "AutoencoderKL",
            "block_out_channels": [128, 256, 512, 512],
            "latent_channels": 16,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        }
    )
    assert flux == AutoencoderConfig()
    with pytest.raises(ValueError, match="layers_per_block is 'two'"):
        AutoencoderConfig.from_config({"layers_per_block": "two"})
