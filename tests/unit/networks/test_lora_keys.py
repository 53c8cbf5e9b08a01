import pytest
from lora_helpers import full_next_dit_on_meta

from library.lumina.key_maps import diffusers_next_dit_names
from networks.lora_keys import comfyui_name, diffusers_name, is_fused, kohya_name, model_path, split_part
from networks.lora_lumina_args import GEMMA2, LUMINA
from networks.lora_plan import linears


@pytest.fixture(scope="module")
def paths():
    """Every Linear of the 2.6 B model."""
    return list(linears(full_next_dit_on_meta()))


GEMMA2_PATHS = [
    *(f"layers.{layer}.self_attn.{part}_proj" for layer in (0, 25) for part in "qkvo"),
    *(f"layers.{layer}.mlp.{part}_proj" for layer in (0, 25) for part in ("gate", "up", "down")),
]


def test_every_linear_is_found_again_by_its_name_in_each_program(paths):
    assert len(paths) == 30 * 5 + 28 + 6
    for path in paths:
        name = LUMINA.lora_name(path)
        assert model_path(name) == path
        assert comfyui_name(name) == f"diffusion_model.{path}"
        assert kohya_name(comfyui_name(name)) == name
        if not is_fused(name):
            assert kohya_name(diffusers_name(name)) == name
            continue
        for part in "qkv":
            assert split_part(kohya_name(diffusers_name(name, part))) == (name, part)


def test_diffusers_names_are_those_of_its_model(paths):
    """The names by which model files are read, which are tested against its model."""
    for path in paths:
        name = LUMINA.lora_name(path)
        found = [diffusers_name(name, part) for part in ("qkv" if is_fused(name) else [""])]
        assert found == [
            f"transformer.{theirs}".removesuffix(".weight") for theirs in diffusers_next_dit_names(f"{path}.weight")
        ]


@pytest.mark.parametrize("path", GEMMA2_PATHS)
def test_gemma2(path):
    name = GEMMA2.lora_name(path)
    assert model_path(name) == path
    assert comfyui_name(name) == f"text_encoders.gemma2_2b.transformer.model.{path}"
    assert kohya_name(comfyui_name(name)) == name


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_unet_layers_0_attention_to_q",
        "lora_unet_layers_x_attention_qkv",
        "lora_unet_layers_0_attention_qkv_0",
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "lora_te_layers_0_mlp_w1",
        "layers_0_attention_qkv",
        "lora_unet",
        "",
    ],
)
def test_other_models_names_have_no_path(name):
    assert model_path(name) is None


def test_names_of_other_trainers_lead_to_the_same_module():
    expected = "lora_unet_layers_3_attention_out"
    for name in (
        "model.diffusion_model.layers.3.attention.out",
        "base_model.model.layers.3.attn.to_out.0",
        "transformer.layers.3.attention.to_out.0",
        "layers.3.attn.to_out.0",
        expected,
    ):
        assert kohya_name(name) == expected


def test_lycoris_counts_text_encoders():
    assert kohya_name("lora_te1_layers_3_mlp_up_proj") == "lora_te_layers_3_mlp_up_proj"
    stable_diffusions = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    assert kohya_name(stable_diffusions) == stable_diffusions
