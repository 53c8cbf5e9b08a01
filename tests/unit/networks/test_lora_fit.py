"""A LoRA file that does not fit a network: nothing of it is loaded, and the error says what would help."""

import pytest
import torch
from lora_helpers import GOLDEN, fill, gemma2, small_next_dit
from safetensors.torch import load_file

from library.errors import NetworkError
from networks.lora_lumina import create_network, create_network_from_weights


@pytest.fixture(scope="module")
def dit():
    return small_next_dit()


def make(dit, text_encoders=None, dim=4, alpha=1.0, **settings):
    return create_network(1.0, dim, alpha, None, text_encoders, dit, **settings)


def test_missing_unexpected_and_misshaped_modules_are_counted_and_named(dit, tmp_path):
    make(dit, dim=3).save_weights(tmp_path / "rank3.safetensors")
    with pytest.raises(NetworkError, match=r"36 modules of other shapes \(lora_unet_.* --dim_from_weights"):
        make(dit).load_weights(tmp_path / "rank3.safetensors")
    make(dit, attn_dim="0").save_weights(tmp_path / "no_attention.safetensors")
    with pytest.raises(NetworkError, match=r"no weights for 12 modules \(lora_unet_context_refiner_0_attention_qkv, "):
        make(dit).load_weights(tmp_path / "no_attention.safetensors")
    make(dit).save_weights(tmp_path / "all.safetensors")
    with pytest.raises(NetworkError, match=r"12 modules that this network does not have \(.*attention_qkv"):
        make(dit, attn_dim="0").load_weights(tmp_path / "all.safetensors")


def test_nothing_is_loaded_in_part(dit, tmp_path):
    make(dit, attn_dim="0", alpha=7.0).save_weights(tmp_path / "part.safetensors")
    network = make(dit)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(NetworkError):
        network.load_weights(tmp_path / "part.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_text_encoder_lora_without_a_text_encoder_says_so(dit, tmp_path):
    make(dit, [gemma2()]).save_weights(tmp_path / "both.safetensors")
    for load in (
        lambda: make(dit).load_weights(tmp_path / "both.safetensors"),
        lambda: create_network_from_weights(1.0, tmp_path / "both.safetensors", None, [], dit),
    ):
        with pytest.raises(NetworkError, match=r"14 modules .* holds a LoRA of the text encoder"):
            load()


def test_more_than_one_layer_too_many_is_an_error(dit, tmp_path):
    make(dit, [gemma2(4)]).save_weights(tmp_path / "four.safetensors")
    with pytest.raises(NetworkError, match="7 modules that this network does not have"):
        make(dit, [gemma2(2)]).load_weights(tmp_path / "four.safetensors")


def test_a_file_that_is_not_split_is_refused_for_split(dit):
    golden = load_file(GOLDEN / "lora.safetensors")
    with pytest.raises(NetworkError, match="not trained with split_qkv"):
        create_network_from_weights(1.0, None, None, None, dit, weights_sd=golden, split_qkv="true")
    network = make(dit, split_qkv="true")
    fill(network)
    dense = network.file_state_dict()
    dense["lora_unet_layers_1_attention_qkv.lora_up.weight"][0, -1] = 1e-6
    with pytest.raises(NetworkError, match="lora_unet_layers_1_attention_qkv was not trained with split_qkv"):
        make(dit, split_qkv="true").load_tensors(dense, "dense.safetensors")
