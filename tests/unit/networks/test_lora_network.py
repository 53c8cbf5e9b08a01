import logging
import math
import weakref

import pytest
import torch
from lora_helpers import fill, gemma2, small_next_dit

from library.errors import NetworkError
from networks.lora_lumina import create_network


@pytest.fixture(scope="module")
def dit():
    return small_next_dit()


def make(dit, text_encoders=None, dim=4, alpha=1.0, **settings):
    return create_network(1.0, dim, alpha, None, text_encoders, dit, **settings)


def test_text_encoder_modules_exist_only_where_it_is_given(dit):
    assert make(dit).text_encoder_loras == []
    assert make(dit, [None]).text_encoder_loras == []
    assert len(make(dit, [gemma2()]).text_encoder_loras) == 2 * 7


def test_defaults_are_rank_4_and_alpha_1(dit):
    network = create_network(1.0, None, None, None, None, dit)
    assert {(lora.lora_dim, lora.scale) for lora in network.loras} == {(4, 0.25)}


def test_apply_to_forgets_what_is_not_trained():
    dit, encoder = small_next_dit(), gemma2()
    network = make(dit, [encoder])
    network.apply_to([encoder], dit, apply_text_encoder=False)
    assert network.text_encoder_loras == []
    assert all(name.startswith("lora_unet_") for name in network.state_dict())
    assert "forward" not in vars(encoder.layers[0].self_attn.q_proj)
    assert "forward" in vars(dit.layers[0].attention.qkv)


def test_removing_gives_the_models_back():
    dit, encoder = small_next_dit(), gemma2()
    network = make(dit, [encoder])
    network.apply_to([encoder], dit)
    network.remove()
    assert not [module for model in (dit, encoder) for module in model.modules() if "forward" in vars(module)]
    gone = weakref.ref(network.loras[0])
    del network
    assert gone() is None  # and its memory at once, without the collector


def test_forgetting_everything_or_rank_zero_everywhere_is_an_error(dit):
    with pytest.raises(NetworkError, match="nothing is left to train"):
        make(dit).apply_to(apply_unet=False)
    with pytest.raises(NetworkError, match="no LoRA module"):
        make(dit, dim=0)


def test_rank_zero_for_the_network_leaves_the_named_ranks(dit):
    assert {lora.lora_name.split("_attention_")[1] for lora in make(dit, dim=0, attn_dim="2").loras} == {"qkv", "out"}


def test_another_model_is_refused_by_the_name_of_its_linear():
    with pytest.raises(NetworkError, match=r"its Linear 'layers\.0\.self_attn\.q_proj' belongs to no component"):
        make(gemma2())


def test_convolution_arguments_are_warned_about_once_each(dit, caplog):
    make(dit, conv_dim="4", conv_alpha="1")
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "conv_dim has no effect" in caplog.text


def test_a_ratio_for_a_text_encoder_that_is_not_trained_is_warned_about(dit, caplog):
    make(dit, [gemma2()], loraplus_text_encoder_lr_ratio="2")
    assert not caplog.records
    make(dit, loraplus_text_encoder_lr_ratio="2")
    assert "loraplus_text_encoder_lr_ratio has no effect" in caplog.text


def test_verbose_lists_every_module(dit, caplog):
    caplog.set_level(logging.INFO)
    network = make(dit, verbose="true")
    assert all(lora.lora_name in caplog.text for lora in network.loras)


def test_describe_counts_modules_ranks_and_parameters(dit):
    network = make(dit, [gemma2()], attn_dim="2", refiner_dim="3", embedder_dims="1,2,3", split_qkv="true")
    rows = {row.component: row for row in network.describe()}
    assert rows["attention"].num_modules == 4
    assert rows["attention"].ranks == "3 x 2, 2"
    assert rows["refiner mlp"].ranks == "3"
    assert rows["time embedder"].num_modules == 2
    assert rows["Gemma2 attention"].num_modules == 8
    assert sum(row.num_modules for row in rows.values()) == len(network.loras)
    assert sum(row.num_parameters for row in rows.values()) == sum(p.numel() for p in network.parameters())


# ---- parameter groups


def ids(params):
    return {id(parameter) for parameter in params}


def test_groups_have_their_learning_rates_and_descriptions(dit):
    network = make(dit, [gemma2()])
    groups, descriptions = network.prepare_optimizer_params_with_multiple_te_lrs([1e-5], 1e-4, 1e-3)
    assert descriptions == ["textencoder", "unet"]
    assert [group["lr"] for group in groups] == [1e-5, 1e-4]
    assert ids(groups[0]["params"]) == ids(p for lora in network.text_encoder_loras for p in lora.parameters())
    assert ids(groups[1]["params"]) == ids(p for lora in network.unet_loras for p in lora.parameters())


@pytest.mark.parametrize("text_encoder_lr", [None, [], 1e-3])
def test_a_missing_learning_rate_is_the_default(dit, text_encoder_lr):
    groups, _ = make(dit, [gemma2()]).prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, None, 1e-3)
    assert [group["lr"] for group in groups] == [1e-3, 1e-3]


@pytest.mark.parametrize("split", ["true", "false"])
def test_lora_plus_raises_the_rate_of_the_up_factors_and_the_specific_ratio_wins(dit, split):
    network = make(dit, [gemma2()], loraplus_lr_ratio="4", loraplus_unet_lr_ratio="16", split_qkv=split)
    groups, descriptions = network.prepare_optimizer_params_with_multiple_te_lrs([1e-5], 1e-4, 1e-3)
    assert descriptions == ["textencoder", "textencoder plus", "unet", "unet plus"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-5, 4e-5, 1e-4, 16e-4])
    assert ids(groups[3]["params"]) == ids(p for lora in network.unet_loras for p in lora.lora_up.parameters())
    everything = [parameter for group in groups for parameter in group["params"]]
    assert len(everything) == len(ids(everything))
    assert ids(everything) == ids(network.parameters())


def test_a_learning_rate_of_zero_leaves_out_and_freezes_with_one_line(dit, caplog):
    caplog.set_level(logging.INFO)
    network = make(dit, [gemma2()])
    _, descriptions = network.prepare_optimizer_params_with_multiple_te_lrs([0.0], 1e-4, 1e-3)
    network.prepare_grad_etc(None, None)
    assert descriptions == ["unet"]
    assert not any(p.requires_grad for lora in network.text_encoder_loras for p in lora.parameters())
    assert ids(network.get_trainable_params()) == ids(p for lora in network.unet_loras for p in lora.parameters())
    assert [record.getMessage() for record in caplog.records] == [
        "14 LoRA modules (textencoder) are not trained: --text_encoder_lr is 0.0"
    ]
    assert not any(row.component.startswith("Gemma2") for row in network.describe())


def test_no_learning_rate_at_all_is_an_error(dit):
    with pytest.raises(NetworkError, match="no learning rate is above 0"):
        make(dit).prepare_optimizer_params_with_multiple_te_lrs(None, 0.0, None)


# ---- max norm


@pytest.mark.parametrize("split", ["true", "false"])
def test_max_norm_equals_the_reference_formula(dit, split):
    network = make(dit, alpha=2.0, split_qkv=split)
    fill(network, size=0.3)
    with torch.no_grad():
        for lora in network.loras[::2]:
            lora.lora_down.weight.mul_(0.02)
    limit = 1.5
    before = {
        lora.lora_name: [(down.detach().clone(), up.detach().clone()) for down, up in lora.factors()]
        for lora in network.loras
    }
    scaled, mean, largest = network.apply_max_norm_regularization(limit, "cpu")
    expected_scaled, norms = 0, []
    for lora in network.loras:
        for (down, up), (new_down, new_up) in zip(before[lora.lora_name], lora.factors(), strict=True):
            product = lora.scale * (up.double() @ down.double())
            norm = product.norm().clamp(min=limit / 2)
            ratio = norm.clamp(max=limit) / norm
            expected_scaled += int(ratio != 1)
            norms.append(float(product.norm() * ratio))
            # float32 sums of some thousand terms, and r x r products instead of the whole one
            torch.testing.assert_close(new_down.detach().double(), down.double() * ratio.sqrt(), rtol=1e-5, atol=0)
            torch.testing.assert_close(new_up.detach().double(), up.double() * ratio.sqrt(), rtol=1e-5, atol=0)
    assert 0 < scaled < len(norms), "the limit must lie among the norms"
    assert scaled == expected_scaled
    assert mean == pytest.approx(sum(norms) / len(norms), rel=1e-5)
    assert largest == pytest.approx(max(norms), rel=1e-5)


def test_max_norm_leaves_small_and_zero_weights_untouched(dit):
    network = make(dit)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert network.apply_max_norm_regularization(1.0) == (0, 0.0, 0.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not math.isnan(sum(float(tensor.sum()) for tensor in network.state_dict().values()))


# ---- the calls that trainers make


def test_modes_multiplier_and_hooks(dit):
    network = make(dit)
    network.eval()
    network.on_epoch_start(None, dit)
    assert all(lora.training for lora in network.loras)
    network.set_multiplier(0.25)
    assert {lora.multiplier for lora in network.loras} == {0.25}
    network.enable_gradient_checkpointing()
    assert network.is_mergeable()


def test_dropout_settings_and_keys_reach_every_module(dit):
    network = make(dit, [gemma2()], neuron_dropout=0.1, rank_dropout="0.2", module_dropout="0.3")
    assert {(lora.dropout, lora.rank_dropout, lora.module_dropout) for lora in network.loras} == {(0.1, 0.2, 0.3)}
    keys = torch.tensor([1, 2])
    network.set_dropout_keys(keys)
    assert all(lora.dropout_keys.keys is keys for lora in network.loras)
    assert len({int(lora.dropout_number) for lora in network.loras}) == len(network.loras)
