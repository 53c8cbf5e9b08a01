import itertools

import pytest
import torch
from lora_helpers import GOLDEN, gemma2, small_next_dit
from safetensors.torch import load_file

from library.errors import NetworkError
from networks.lora_files import to_factors
from networks.lora_forms import FORMS, dtype_of, factors_of, form_of, to_form
from networks.lora_lumina import create_network

QKV_ROWS = (48, 24, 24)
LORA = "lora_unet_layers_0_attention_out"


@pytest.fixture(scope="module")
def golden():
    """A LoRA of sd-scripts with ranks 2 to 5 and alpha 2."""
    return load_file(GOLDEN / "lora.safetensors")


def converted(tensors, form, dtype=None):
    factors = factors_of(tensors, "it")
    return to_form(factors, form, dtype or dtype_of(tensors), "it")


def changes(tensors):
    """What each Linear's weight gains."""
    factors = to_factors(tensors, QKV_ROWS, "it")
    return {
        name: one.alpha / one.down.shape[0] * (one.up.double() @ one.down.double()) for name, one in factors.items()
    }


def pair(name, down, up, alpha=None):
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    return tensors if alpha is None else tensors | {f"{name}.alpha": torch.tensor(alpha)}


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("second", FORMS)
def test_forms_lead_into_each_other_without_loss(golden, first, second):
    twice = converted(converted(golden, first).tensors, second).tensors
    assert form_of(list(twice)).lower() == second
    expected, found = changes(golden), changes(twice)
    assert set(found) == set(expected)
    for name in expected:
        # alpha / rank is 2 / 3 and 2 / 5 in some modules: rounded once in float32.
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", ["sd-scripts", "comfyui"])
def test_forms_with_alpha_change_no_bit(golden, form):
    again = converted(converted(golden, form).tensors, "sd-scripts").tensors
    assert set(again) == set(golden)
    assert all(torch.equal(again[key], tensor.float()) for key, tensor in golden.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [0.25, 1.0, 4.0, 64.0, -4.0])
def test_a_strength_that_is_a_power_of_two_goes_into_the_factors_exactly(dtype, alpha):
    # fp16 holds 2**-14 exactly, and its neighbours down to 2**-24 no longer to all digits: both factors stay above.
    down, up = (torch.full(shape, 0.0003).to(dtype) * torch.arange(1, 5) for shape in ((4, 4), (6, 4)))
    tensors = pair(LORA, down.to(dtype), up.to(dtype), alpha)
    found = converted(tensors, "diffusers").tensors
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    assert torch.equal(changes(found)[LORA], changes(tensors)[LORA])


def test_all_ranks_are_equal_for_diffusers_and_stay_themselves_elsewhere(golden):
    ranks = {tensor.shape[0] for key, tensor in converted(golden, "diffusers").tensors.items() if "lora_A" in key}
    assert ranks == {5}
    ranks = {tensor.shape[0] for key, tensor in converted(golden, "comfyui").tensors.items() if "lora_A" in key}
    assert ranks == {2, 3, 4, 5}


def qkv(up):
    return pair("lora_unet_layers_0_attention_qkv", torch.randn(up.shape[1], 48), up, float(up.shape[1]))


def test_q_k_v_that_were_trained_apart_are_apart_again():
    network = create_network(1.0, 4, 4.0, None, None, small_next_dit(), split_qkv="true", mlp_dim="0", mod_dim="0")
    with torch.no_grad():
        for lora in network.loras:
            for parameter in lora.parameters():
                parameter.normal_()
    found = converted(network.file_state_dict(), "diffusers").tensors
    assert found["transformer.layers.0.attn.to_k.lora_A.weight"].shape == (4, 48)
    assert found["transformer.layers.0.attn.to_k.lora_B.weight"].shape == (24, 4)


def test_one_of_q_k_v_alone_stays_alone():
    up = torch.zeros(96, 4)
    up[48:72] = torch.randn(24, 4)
    found = converted(qkv(up), "diffusers").tensors
    assert {key.split(".")[4] for key in found} == {"to_k"}
    fused = converted(found, "sd-scripts").tensors
    assert torch.equal(fused["lora_unet_layers_0_attention_qkv.lora_up.weight"], up)


@pytest.mark.parametrize("up", [torch.randn(96, 4), torch.zeros(96, 4)], ids=["shared", "untrained"])
def test_a_common_down_goes_to_all_three(up):
    tensors = qkv(up)
    found = converted(tensors, "diffusers").tensors
    downs = [found[f"transformer.layers.0.attn.to_{part}.lora_A.weight"] for part in "qkv"]
    assert all(torch.equal(down, tensors["lora_unet_layers_0_attention_qkv.lora_down.weight"]) for down in downs)
    assert not any(first.data_ptr() == second.data_ptr() for first, second in itertools.pairwise(downs))


def test_queries_alone_of_the_full_model_are_joined_and_of_another_refused():
    def queries(width):
        return pair("transformer.layers.0.attn.to_q", torch.randn(2, width), torch.randn(width, 2))

    found = converted(queries(2304), "sd-scripts").tensors
    assert found["lora_unet_layers_0_attention_qkv.lora_up.weight"].shape == (3840, 2)
    with pytest.raises(NetworkError, match="queries alone, 48 wide"):
        converted(queries(48), "sd-scripts")


@pytest.fixture(scope="module")
def with_gemma2():
    return create_network(1.0, 4, 1.0, None, [gemma2()], small_next_dit()).file_state_dict()


def test_gemma2_goes_to_comfyui_and_not_to_diffusers(with_gemma2):
    found = converted(with_gemma2, "comfyui")
    assert found.left_out == ()
    assert "text_encoders.gemma2_2b.transformer.model.layers.1.mlp.up_proj.lora_A.weight" in found.tensors
    found = converted(with_gemma2, "diffusers")
    assert len(found.left_out) == 14
    assert all(key.startswith("transformer.") for key in found.tensors)


def test_a_precision_is_that_of_the_factors_and_alpha_is_never_rounded():
    tensors = pair(LORA, torch.ones(4, 8), torch.ones(8, 4), 257.0)
    found = converted(tensors, "comfyui", torch.bfloat16).tensors
    assert found["diffusion_model.layers.0.attention.out.lora_A.weight"].dtype == torch.bfloat16
    assert float(found["diffusion_model.layers.0.attention.out.alpha"]) == 257


@pytest.mark.parametrize("other", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_fp8_becomes_bf16_which_has_room_for_a_strength(other):
    tensors = pair(LORA, torch.full((4, 8), 2.0**-6).to(torch.float8_e4m3fn), torch.ones(8, 4).to(other), 2.0**-6)
    found = converted(tensors, "diffusers").tensors
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert torch.equal(changes(found)[LORA], torch.full((8, 8), 2.0**-12, dtype=torch.double))


def test_dtypes_that_do_not_hold_each_others_numbers_become_float32():
    tensors = pair(LORA, torch.ones(4, 8).half(), torch.ones(8, 4).bfloat16(), 2.0)
    found = converted(tensors, "sd-scripts").tensors
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_what_no_precision_can_hold_is_refused():
    tensors = pair(LORA, torch.full((4, 8), 60000.0), torch.ones(8, 4), 4096.0)
    with pytest.raises(NetworkError, match=r"1 of 2 tensors .*--save_precision"):
        converted(tensors, "diffusers", torch.float16)
    with pytest.raises(NetworkError, match="not finite"):
        converted(pair(LORA, torch.full((4, 8), torch.nan), torch.ones(8, 4)), "comfyui")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "it holds nothing; give"),
        (pair("lora_unet_layers_0_attention_out", torch.ones(2, 3840), torch.ones(3840, 2)), "sizes .*a Z-Image LoRA"),
        (pair("lora_unet_layers_0_feed_forward_w1", torch.ones(2, 3840), torch.ones(9, 2)), "sizes .*a Z-Image LoRA"),
        (pair("lora_unet_double_blocks_0_img_attn_qkv", torch.ones(2, 8), torch.ones(24, 2)), "FLUX"),
        (pair("lora_unet_layers_0_attention_to_q", torch.ones(2, 8), torch.ones(8, 2)), "1 of 1 modules are none"),
        (pair("lora_unet_layers_0_attention_qkv", torch.ones(2, 48), torch.ones(95, 2)), "48 inputs and 95 outputs"),
        (pair("lora_unet_layers_0_attention_qkv", torch.ones(2, 48), torch.ones(48, 2)), "48 inputs and 48 outputs"),
        (pair("lora_te_layers_0_mlp_up_proj", torch.ones(2, 8), torch.ones(8, 2)), "nothing is left for diffusers"),
        ({"lora_unet_layers_0_feed_forward_w1.hada_w1_a": torch.ones(2, 2)}, "LoHa"),
    ],
)
def test_other_files_are_refused_with_the_reason(tensors, message):
    with pytest.raises(NetworkError, match=message):
        converted(tensors, "diffusers")


def test_whose_names_a_file_has():
    assert form_of(["layers.0.attention.qkv.lora_A.weight"]) == "other programs"
    assert form_of(["lora_unet_x.alpha", "lora_te_x.alpha"]) == "sd-scripts"
