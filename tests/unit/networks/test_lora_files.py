import logging
import re

import pytest
import torch
from lora_helpers import GOLDEN, cases, fill, gemma2, metadata_of, small_next_dit, velocity
from safetensors.torch import load_file, save_file
from torch import nn

from library.errors import NetworkError
from networks.lora_files import content_hashes, qkv_rows_in, read_lora_file, to_factors
from networks.lora_lumina import create_network, create_network_from_weights

GOLDEN_LORA = GOLDEN / "lora.safetensors"


@pytest.fixture(scope="module")
def dit():
    return small_next_dit()


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN_LORA)


def make(dit, text_encoders=None, dim=4, alpha=1.0, **settings):
    return create_network(1.0, dim, alpha, None, text_encoders, dit, **settings)


def from_tensors(dit, tensors, text_encoders=None, **settings):
    return create_network_from_weights(1.0, None, None, text_encoders, dit, weights_sd=tensors, **settings)[0]


def state(network):
    return network.file_state_dict()


def assert_same(found, expected):
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---- saving and loading


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt"])
def test_what_is_saved_comes_back_exactly(dit, tmp_path, suffix):
    network = make(dit, [gemma2()], alpha=3.0)
    fill(network)
    file = tmp_path / f"lora{suffix}"
    network.save_weights(file, None, {"ss_network_dim": "4"})
    again = make(dit, [gemma2()], alpha=3.0)
    again.load_weights(file)
    assert_same(state(again), state(network))


def test_saving_casts_to_the_dtype_and_keeps_metadata(dit, tmp_path):
    network = make(dit)
    metadata = {"ss_network_dim": "4", "ss_training_comment": "Kommentar ü 日本", "modelspec.title": 'a "b"'}
    given = dict(metadata)
    network.save_weights(tmp_path / "lora.safetensors", torch.bfloat16, metadata)
    assert metadata == given, "the caller's dictionary must not change"
    saved = metadata_of(tmp_path / "lora.safetensors")
    assert {name: saved.pop(name) for name in given} == given
    assert set(saved) == {"sshs_model_hash", "sshs_legacy_hash"}
    assert {tensor.dtype for tensor in load_file(tmp_path / "lora.safetensors").values()} == {torch.bfloat16}
    network.save_weights(tmp_path / "bare.safetensors", torch.float16, None)
    assert set(metadata_of(tmp_path / "bare.safetensors")) == set(saved)


def test_hashes_are_taken_from_the_bytes_that_the_reference_takes(tmp_path):
    # More than 1 MiB, so that the legacy hash covers something; computed here from a file written by the library.
    import hashlib

    tensors = {f"m{i}.lora_up.weight": torch.randn(400, 300) for i in range(3)}
    metadata = {"ss_a": "1", "modelspec.title": "not counted"}
    save_file(tensors, tmp_path / "plain.safetensors", {"ss_a": "1"})
    data = (tmp_path / "plain.safetensors").read_bytes()
    behind_header = data[8 + int.from_bytes(data[:8], "little") :]
    assert content_hashes(tensors, metadata) == {
        "sshs_model_hash": hashlib.sha256(behind_header).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
    }


def test_loading_sets_alpha_and_the_scale_in_use(dit, tmp_path):
    saved = make(dit, alpha=16.0)
    saved.save_weights(tmp_path / "lora.safetensors")
    network = make(dit, alpha=1.0)
    network.load_weights(tmp_path / "lora.safetensors")
    assert {(float(lora.alpha), lora.scale) for lora in network.loras} == {(16.0, 4.0)}


def test_a_state_dict_sets_the_scale_too(dit):
    network = make(dit, alpha=1.0)
    network.load_state_dict(make(dit, alpha=16.0).state_dict())
    assert {lora.scale for lora in network.loras} == {4.0}


def test_a_network_from_a_file_has_its_modules_ranks_and_alphas(dit, golden):
    network, weights = create_network_from_weights(
        1.0, GOLDEN_LORA, None, None, dit, neuron_dropout=0.1, module_dropout="0.2"
    )
    assert set(weights) == set(golden)
    assert {lora.lora_dim for lora in network.loras} == {2, 3, 4, 5}
    assert {float(lora.alpha) for lora in network.loras} == {2.0}
    assert {(lora.dropout, lora.module_dropout) for lora in network.loras} == {(0.1, 0.2)}
    network.load_state_dict(weights, strict=True)


def test_ranks_beside_a_file_are_warned_about(dit, caplog):
    create_network_from_weights(1.0, GOLDEN_LORA, None, None, dit, attn_dim="4", train_blocks="transformer")
    assert "attn_dim, train_blocks: no effect" in caplog.text


def test_for_inference_nothing_is_trained(dit, golden):
    network = from_tensors(dit, golden, for_inference=True)
    assert not network.training
    assert not list(network.get_trainable_params())


def test_a_missing_alpha_is_the_rank(dit, golden):
    network = from_tensors(dit, {key: tensor for key, tensor in golden.items() if not key.endswith(".alpha")})
    assert {lora.scale for lora in network.loras} == {1.0}


def test_an_alpha_of_0_is_the_rank(dit, golden):
    zeros = {key: tensor * 0 if key.endswith(".alpha") else tensor for key, tensor in golden.items()}
    assert {lora.scale for lora in from_tensors(dit, zeros).loras} == {1.0}


# ---- what a file is


def test_the_last_gemma2_layer_of_a_file_is_named_once_and_left_out(dit, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    make(dit, [gemma2(3)]).save_weights(tmp_path / "three.safetensors")
    two = make(dit, [gemma2(2)])
    two.load_weights(tmp_path / "three.safetensors")
    lines = [record.getMessage() for record in caplog.records if "not used" in record.getMessage()]
    assert len(lines) == 1
    assert re.search("7 modules of the text encoder's last layer are not used", lines[0])
    assert lines[0].count("lora_te_layers_2_") == 7
    network, weights = create_network_from_weights(1.0, tmp_path / "three.safetensors", None, [gemma2(2)], dit)
    assert len(network.text_encoder_loras) == 14
    assert not any("layers_2_self" in key for key in weights)


def lora(name, down=(4, 8), up=(8, 4)):
    return {f"{name}.lora_down.weight": torch.zeros(down), f"{name}.lora_up.weight": torch.zeros(up)}


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        (lora("lora_unet_input_blocks_4_1_proj_in"), "an SDXL LoRA"),
        (lora("lora_te2_text_model_encoder_layers_0_mlp_fc1"), "an SDXL LoRA"),
        (lora("lora_unet_down_blocks_0_attentions_0_proj_in"), "a Stable Diffusion 1 or 2 LoRA"),
        (lora("lora_unet_double_blocks_0_img_attn_qkv"), "a FLUX LoRA"),
        (lora("lora_unet_joint_blocks_0_x_block_attn_qkv"), "a Stable Diffusion 3 LoRA"),
        (lora("diffusion_model.layers.29.attention.qkv", (4, 3840), (11520, 4)), "a Z-Image LoRA"),
        ({"lora_unet_layers_0_attention_qkv.lokr_w1": torch.zeros(2, 2)}, "LoHa, LoKr"),
        ({"lora_unet_layers_0_attention_qkv.diff": torch.zeros(2, 2)}, "LoHa, .* or full file"),
        ({"lora_unet_layers_0_attention_qkv.a1.weight": torch.zeros(2, 2)}, "GLoRA"),
        (
            {f"lora_unet_layers_0_attention_qkv.{part}": torch.zeros(2, 2) for part in ("weight", "on_input")},
            "IA3",
        ),
        ({"noise_refiner.0.attention.qkv.weight": torch.zeros(2, 2)}, "a whole Lumina checkpoint"),
        ({"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}, "a language model's file"),
    ],
)
def test_a_foreign_file_is_recognised(dit, tensors, what):
    for load in (lambda: from_tensors(dit, tensors), lambda: make(dit).load_tensors(tensors, "x.safetensors")):
        with pytest.raises(NetworkError, match=f"looks like .*{what}"):
            load()


def test_incomplete_and_inconsistent_modules_are_errors(dit, golden):
    name = "lora_unet_layers_0_attention_qkv"
    with pytest.raises(NetworkError, match=f"{name} has no lora_up"):
        from_tensors(dit, {key: tensor for key, tensor in golden.items() if key != f"{name}.lora_up.weight"})
    with pytest.raises(NetworkError, match="do not multiply"):
        from_tensors(dit, golden | {f"{name}.lora_up.weight": torch.zeros(96, 2)})


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_missing_broken_and_empty_files_are_errors_that_name_the_file(dit, tmp_path, suffix):
    file = tmp_path / f"lora{suffix}"
    with pytest.raises(NetworkError, match=r"lora\..* does not exist"):
        make(dit).load_weights(file)
    make(dit).save_weights(file)
    data = file.read_bytes()
    for broken in (data[: len(data) // 2], b"", b"hello"):
        file.write_bytes(broken)
        with pytest.raises(NetworkError, match=r"lora\..* cannot be read"):
            make(dit).load_weights(file)


def test_a_file_that_may_not_be_read_is_not_said_to_be_missing(tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(NetworkError, match="Permission denied"):
        read_lora_file(GOLDEN_LORA)


def test_a_folder_is_not_said_to_be_missing(tmp_path):
    with pytest.raises(NetworkError, match="is a folder; give the file in it"):
        read_lora_file(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {0: torch.ones(2)},
        {"a": torch.ones(2), "b": 2.0},
        {"a": torch.ones(2, device="meta")},
        {"a": torch.ones(2).to_sparse()},
        [torch.ones(2)],
    ],
    ids=["numbered", "number", "without data", "sparse", "list"],
)
def test_pickles_of_other_things_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(NetworkError, match="does not hold a table of tensors"):
        read_lora_file(tmp_path / "a.pt")


def test_a_pickle_that_ends_within_a_number_is_a_damaged_file(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"\x80\x02X\x01")
    with pytest.raises(NetworkError, match="is it complete"):
        read_lora_file(tmp_path / "a.pt")


def test_tensors_of_a_pickle_are_plain_and_each_its_own(tmp_path):
    parameter = nn.Parameter(torch.ones(2, 2))
    torch.save({"a": parameter, "b": parameter}, tmp_path / "a.pt")
    found = read_lora_file(tmp_path / "a.pt")
    assert not any(tensor.requires_grad for tensor in found.values())
    save_file(found, tmp_path / "a.safetensors")  # which refuses tensors that share memory


OUT, QKV = "layers.0.attention.out", "layers.0.attention.qkv"


def pair(name, rows=48):
    return {f"{name}.lora_A.weight": torch.ones(2, 48), f"{name}.lora_B.weight": torch.ones(rows, 2)}


@pytest.mark.parametrize(
    "tensors",
    [
        pair(f"diffusion_model.{OUT}") | pair("lora_unet_layers_0_attention_out"),
        pair(f"diffusion_model.{OUT}") | pair(f"model.diffusion_model.{OUT}"),
        pair(OUT) | {f"{OUT}.lora_down.weight": torch.ones(2, 48)},
        pair(OUT) | {f"{OUT}.alpha": torch.ones(1), "transformer.layers.0.attn.to_out.0.alpha": torch.ones(1)},
        pair("transformer.layers.0.attn.to_q") | pair("layers.0.attention.to_q"),
        pair("transformer.layers.0.attn.to_q") | pair(QKV, 96),
    ],
    ids=["programs", "prefixes", "suffixes", "alphas", "queries", "queries and all"],
)
def test_a_module_under_two_names_is_refused(tensors):
    with pytest.raises(NetworkError, match=r"layers.0.att.*under another name too.* give one of them"):
        to_factors(tensors, (48, 24, 24), "x.safetensors")


def test_a_pickle_that_holds_code_is_refused_without_advice_to_run_it(tmp_path):
    file = tmp_path / "lora.pt"
    torch.save({"lora_unet_final_layer_linear.alpha": print}, file)
    with pytest.raises(NetworkError, match="could run any code; give a") as caught:
        read_lora_file(file)
    assert "trust" not in str(caught.value)


# ---- other programs' forms


def native_path(name):
    """Returns the dotted path of a LoRA name of the small model."""
    path = name.removeprefix("lora_unet_")
    for part in ("noise_refiner", "context_refiner", "feed_forward", "adaLN_modulation", "final_layer"):
        path = path.replace(part, part.replace("_", "~"))
    for part in ("x_embedder", "t_embedder", "cap_embedder"):
        path = path.replace(part, part.replace("_", "~"))
    return path.replace("_", ".").replace("~", "_")


FORMS = {
    "lora_A.weight": ("lora_A.weight", "lora_B.weight"),
    "lora_A.default.weight": ("lora_A.default.weight", "lora_B.default.weight"),
    "lora.down": ("lora.down.weight", "lora.up.weight"),
    "lora_down": ("lora_down.weight", "lora_up.weight"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.diffusion_model.", "transformer.", ""])
def test_dotted_native_names_load_in_every_form(dit, golden, form, prefix):
    suffixes = dict(zip(("lora_down.weight", "lora_up.weight"), FORMS[form], strict=True)) | {"alpha": "alpha"}
    foreign = {}
    for key, tensor in golden.items():
        name, suffix = key.split(".", 1)
        foreign[f"{prefix}{native_path(name)}.{suffixes[suffix]}"] = tensor
    assert_same(state(from_tensors(dit, foreign)), state(from_tensors(dit, golden)))


def test_comfyui_names_of_gemma2_load(dit):
    network = make(dit, [gemma2()])
    fill(network)
    foreign = {}
    for key, tensor in state(network).items():
        if key.startswith("lora_te_"):
            name, suffix = key.split(".", 1)
            path = re.sub(r"layers_(\d+)_(self_attn|mlp)_", r"layers.\1.\2.", name.removeprefix("lora_te_"))
            key = f"text_encoders.gemma2_2b.transformer.model.{path}.{suffix}"
        foreign[key] = tensor
    assert_same(state(from_tensors(dit, foreign, [gemma2()])), state(network))


def diffusers_name(path):
    for old, new in (
        (".attention.out", ".attn.to_out.0"),
        (".feed_forward.w", ".feed_forward.linear_"),
        ("final_layer.adaLN_modulation.1", "norm_out.linear_1"),
        ("final_layer.linear", "norm_out.linear_2"),
        (".adaLN_modulation.1", ".norm1.linear"),
        ("t_embedder.mlp.0", "time_caption_embed.timestep_embedder.linear_1"),
        ("t_embedder.mlp.2", "time_caption_embed.timestep_embedder.linear_2"),
        ("cap_embedder.1", "time_caption_embed.caption_embedder.1"),
    ):
        path = path.replace(old, new)
    return "transformer." + path


def to_diffusers(golden, share_down):
    """Returns the LoRA with diffusers' names, q, k and v apart: of one down factor, or of three of ranks 1, 2 and 3."""
    generator = torch.Generator().manual_seed(1)
    foreign = {}
    for key, tensor in golden.items():
        name, suffix = key.split(".", 1)
        path = native_path(name)
        if not path.endswith(".qkv"):
            new = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}.get(suffix, suffix)
            foreign[f"{diffusers_name(path)}.{new}"] = tensor
        elif suffix == "lora_up.weight":
            block = "transformer." + path.replace(".attention.qkv", ".attn.to_")
            down = golden[f"{name}.lora_down.weight"]
            for rank, (part, rows) in enumerate(zip("qkv", tensor.split([48, 24, 24]), strict=True), 1):
                if share_down:
                    values = {"lora_A.weight": down, "lora_B.weight": rows, "alpha": golden[f"{name}.alpha"]}
                else:
                    values = {
                        "lora_A.weight": torch.randn(rank, 48, generator=generator),
                        "lora_B.weight": torch.randn(rows.shape[0], rank, generator=generator),
                        "alpha": torch.tensor(0.5 * rank if part != "k" else 3.0),
                    }
                foreign |= {f"{block}{part}.{suffix}": value for suffix, value in values.items()}
    return foreign


def test_diffusers_q_k_v_of_one_down_factor_become_the_fused_lora_again(dit, golden):
    assert_same(state(from_tensors(dit, to_diffusers(golden, share_down=True))), state(from_tensors(dit, golden)))


@pytest.mark.parametrize("left_out", ["", "qv", "k"])
def test_diffusers_q_k_v_of_different_ranks_and_strengths_are_joined_exactly(dit, golden, left_out):
    foreign = to_diffusers(golden, share_down=False)
    foreign = {key: tensor for key, tensor in foreign.items() if not any(f".to_{part}." in key for part in left_out)}
    network = from_tensors(dit, foreign)
    fused = network.get_submodule("lora_unet_layers_1_attention_qkv")
    down, up = fused.fused()
    found = fused.scale * up @ down
    for part, rows in zip("qkv", found.split([48, 24, 24]), strict=True):
        if part in left_out:
            assert not rows.any()
            continue
        name = f"transformer.layers.1.attn.to_{part}"
        a, b = foreign[f"{name}.lora_A.weight"], foreign[f"{name}.lora_B.weight"]
        expected = float(foreign[f"{name}.alpha"]) / a.shape[0] * b @ a
        torch.testing.assert_close(rows, expected)


def test_q_k_v_of_other_dtypes_and_strengths_are_joined_without_their_dtypes_rounding():
    """bf16 times a third, put beside float32: each rounded to bf16 would be off by 1 in 500."""
    parts = {"q": (48, torch.bfloat16, 1.0), "k": (24, torch.float32, 2.0), "v": (24, torch.float8_e4m3fn, 5.0)}
    generator = torch.Generator().manual_seed(3)
    tensors, expected = {}, []
    for part, (rows, dtype, alpha) in parts.items():
        down, up = (torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 48), (rows, 3)))
        name = f"transformer.layers.0.attn.to_{part}"
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.alpha": torch.tensor(alpha)}
        expected.append(alpha / 3 * (up.double() @ down.double()))
    found = to_factors(tensors, (48, 24, 24), "it")["lora_unet_layers_0_attention_qkv"]
    product = found.alpha / found.down.shape[0] * (found.up.double() @ found.down.double())
    # The strengths are rounded once in float32.
    torch.testing.assert_close(product, torch.cat(expected), rtol=1e-6, atol=1e-6)


def test_an_alpha_of_any_shape_says_nothing_about_rows():
    name = "transformer.layers.0.attn.to_k"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 48), f"{name}.lora_B.weight": torch.ones(24, 2)}
    assert qkv_rows_in(tensors | {f"{name}.alpha": torch.ones(1, 1)}, "it") == (48, 24, 24)


def test_q_k_v_of_another_model_are_refused(dit, golden):
    foreign = to_diffusers(golden, share_down=True)
    key = "transformer.layers.0.attn.to_k.lora_B.weight"
    with pytest.raises(NetworkError, match="to_k of lora_unet_layers_0_attention_qkv has 48 rows, this model has 24"):
        from_tensors(dit, foreign | {key: torch.zeros(48, foreign[key].shape[1])})


def test_alpha_in_diffusers_metadata_is_honoured(dit, golden, tmp_path):
    foreign = {key: value.clone() for key, value in to_diffusers(golden, True).items() if not key.endswith(".alpha")}
    save_file(foreign, tmp_path / "peft.safetensors", {"lora_adapter_metadata": '{"transformer.lora_alpha": 8}'})
    network, _ = create_network_from_weights(1.0, tmp_path / "peft.safetensors", None, None, dit)
    assert {float(lora.alpha) for lora in network.loras} == {8.0}


@pytest.mark.parametrize("text", ["not JSON", "[]", "[" * 100_000, '{"transformer.lora_alpha": "eight"}'])
def test_damaged_diffusers_metadata_is_named(dit, golden, tmp_path, text):
    foreign = {key: value.clone() for key, value in to_diffusers(golden, True).items() if not key.endswith(".alpha")}
    save_file(foreign, tmp_path / "peft.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(NetworkError, match=r"peft\.safetensors.*(lora_adapter_metadata|lora_alpha)"):
        create_network_from_weights(1.0, tmp_path / "peft.safetensors", None, None, dit)


# ---- split_qkv


def split_network(dit):
    network = make(dit, alpha=2.0, split_qkv="true")
    fill(network)
    return network


def test_split_trains_three_loras_and_saves_one(dit, tmp_path):
    # defect 18
    network = split_network(dit)
    lora = network.get_submodule("lora_unet_layers_0_attention_qkv")
    assert [tuple(up.shape) for _, up in lora.factors()] == [(48, 4), (24, 4), (24, 4)]
    assert [tuple(down.shape) for down, _ in lora.factors()] == [(4, 48)] * 3
    network.save_weights(tmp_path / "split.safetensors")
    saved = load_file(tmp_path / "split.safetensors")
    name = "lora_unet_layers_0_attention_qkv"
    assert saved[f"{name}.lora_down.weight"].shape == (12, 48)
    assert float(saved[f"{name}.alpha"]) == 6.0
    up = saved[f"{name}.lora_up.weight"]
    assert not up[:48, 4:].any()
    assert not up[48:72, :4].any()
    assert not up[48:72, 8:].any()
    assert not up[72:, :8].any()
    assert float(saved["lora_unet_layers_0_attention_out.alpha"]) == 2.0


def test_split_comes_back_exactly_and_draws_what_the_fused_file_draws(tmp_path):
    base = small_next_dit()
    network = split_network(base)
    file = tmp_path / "split.safetensors"
    network.save_weights(file)

    again = make(base, alpha=9.0, split_qkv="true")
    again.load_weights(file)
    assert all(
        torch.equal(found, expected) for found, expected in zip(again.parameters(), network.parameters(), strict=True)
    )
    assert [lora.scale for lora in again.loras] == [lora.scale for lora in network.loras]
    built, _ = create_network_from_weights(1.0, file, None, None, base, split_qkv="true")
    assert_same(state(built), state(network))
    assert all(type(one) is type(other) for one, other in zip(built.loras, network.loras, strict=True))

    recorded = cases()
    network.apply_to()
    split_output = velocity(base, recorded)
    fused_base = small_next_dit()
    fused, _ = create_network_from_weights(1.0, file, None, None, fused_base)
    fused.apply_to()
    # Same products, summed over 3r instead of r columns of which 2r are zero.
    torch.testing.assert_close(split_output, velocity(fused_base, recorded), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(split_output, recorded["ragged.velocity"], atol=1e-2)


def test_split_and_fused_start_from_strength_alpha_over_rank(dit):
    for split in ("true", "false"):
        network = make(dit, alpha=2.0, split_qkv=split)
        assert {lora.scale for lora in network.loras} == {0.5}


# ---- third-party use of the state dict


def test_the_network_is_a_module_whose_state_dict_round_trips(dit):
    network = split_network(dit)
    again = make(dit, split_qkv="true")
    again.load_state_dict(network.state_dict())
    assert_same(state(again), state(network))
    assert isinstance(network, nn.Module)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"down": torch.zeros(0, 4), "up": torch.zeros(3, 0)}, "is empty"),
        ({"down": torch.zeros(2, 0), "up": torch.zeros(3, 2)}, "is empty"),
        ({"down": torch.zeros(2, 4, 1, 1), "up": torch.zeros(3, 2, 1, 1)}, "do not multiply"),
        ({"down": torch.zeros(2, 4), "up": torch.zeros(3, 2), "alpha": torch.zeros(2)}, "alpha"),
        ({"down": torch.zeros(2, 4), "up": torch.zeros(3, 2), "alpha": torch.tensor(float("nan"))}, "alpha"),
        ({"down": torch.zeros(2, 4), "up": torch.zeros(3, 2), "alpha": torch.tensor(2j)}, "alpha"),
        (
            {"down": torch.zeros(2, 4), "up": torch.zeros(3, 2), "alpha": torch.tensor(1e300, dtype=torch.double)},
            "alpha",
        ),
        ({"down": torch.zeros(2, 4, dtype=torch.int8), "up": torch.zeros(3, 2)}, "int8"),
        ({"down": torch.empty(2, 4, dtype=torch.float4_e2m1fn_x2), "up": torch.zeros(3, 2)}, "float4"),
    ],
)
def test_damaged_modules_are_named(tensors: dict[str, torch.Tensor], says: str) -> None:
    names = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha"}
    file = {f"lora_unet_layers_0_attention_out.{names[part]}": tensor for part, tensor in tensors.items()}
    with pytest.raises(NetworkError, match=says):
        to_factors(file, None, "x.safetensors")
