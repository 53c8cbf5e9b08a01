from __future__ import annotations

import pytest

from library.lumina.configs import AutoencoderConfig, Gemma2TextConfig, NextDiTConfig
from library.lumina.model_guess import guess_model

LUMINA = NextDiTConfig().tensor_shapes()
GEMMA2_9B = Gemma2TextConfig(hidden_size=3584, num_attention_heads=16, num_key_value_heads=8)


def prefixed(prefix: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {prefix + name: shape for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (LUMINA, "Lumina Image 2.0 transformer"),
        (prefixed("model.diffusion_model.", LUMINA), "Lumina Image 2.0 transformer"),
        (NextDiTConfig(dim=3840).tensor_shapes(), "Z-Image"),
        (LUMINA | {"x_pad_token": (1, 3840)}, "Z-Image"),
        (LUMINA | {"clip_text_pooled_proj.0.weight": (1024,)}, "NewBie"),
        (Gemma2TextConfig().tensor_shapes(), "Gemma-2-2B"),
        (prefixed("model.", GEMMA2_9B.tensor_shapes()), "Gemma-2-9B"),
        (
            Gemma2TextConfig().tensor_shapes() | {"layers.0.self_attn.q_norm.weight": (256,)},
            "Gemma 3",
        ),
        ({"model.layers.0.self_attn.q_proj.weight": (4096, 4096)}, "not Gemma2"),
        (AutoencoderConfig().tensor_shapes(), "FLUX autoencoder"),
        (AutoencoderConfig(latent_channels=32).tensor_shapes(), "32 latent channels"),
        (prefixed("first_stage_model.", AutoencoderConfig(latent_channels=4).tensor_shapes()), "4 latent channels"),
        ({"conditioner.embedders.1.model.ln_final.weight": (1280,)}, "SDXL"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "Stable Diffusion 1.5"),
        ({"cond_stage_model.model.ln_final.weight": (1024,)}, "Stable Diffusion 2"),
        ({"double_blocks.0.img_attn.qkv.weight": (9216, 3072)}, "FLUX"),
        ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (1, 1)}, "Stable Diffusion 3"),
        ({"layers.0.attention.wq.weight": (2304, 2304)}, "Lumina-Next"),
        ({"lora_unet_layers_0_attention_qkv.lora_down.weight": (8, 2304)}, "LoRA"),
        ({"diffusion_model.layers.0.attention.qkv.lora_A.weight": (8, 2304)}, "LoRA"),
        ({"encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096)}, "T5"),
        ({"text_model.encoder.layers.0.mlp.fc1.weight": (1, 1)}, "CLIP"),
        ({}, "empty"),
    ],
)
def test_known_models_are_recognised(shapes: dict[str, tuple[int, ...]], words: str) -> None:
    assert words in (guess_model(shapes) or "nothing")


def test_unknown_tensors_are_not_given_a_name() -> None:
    assert guess_model({"some.weight": (3, 4)}) is None
