import copy

import pytest
import torch
from lora_helpers import fill
from torch import nn

from networks.lora import LoRAModule
from networks.lora_dropout import DropoutKeys, number_of


def linear(width_in=6, width_out=5, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(width_in, width_out).to(dtype).requires_grad_(False)


def make(base, name="lora_unet_x", rank=3, keys=None, **settings):
    lora = LoRAModule(name, base, rank=rank, dropout_keys=keys, **settings)
    lora.apply_to()
    return lora


def test_output_is_base_plus_scaled_product():
    base = linear()
    x = torch.randn(2, 4, 6)
    expected_base = base(x)
    lora = make(base, alpha=2.0, multiplier=0.5)
    assert torch.equal(base(x), expected_base), "a new LoRA (up = 0) must not change the output"
    fill(lora, size=1.0)
    expected = expected_base + 0.5 * 2.0 / 3 * x @ lora.lora_down.weight.T @ lora.lora_up.weight.T
    torch.testing.assert_close(base(x), expected)  # default float32 tolerance: only the order of factors differs


def test_alpha_none_or_zero_means_alpha_equals_rank():
    assert LoRAModule("a", linear(), rank=3).scale == 1
    assert LoRAModule("a", linear(), rank=3, alpha=0).scale == 1
    assert LoRAModule("a", linear(), rank=4, alpha=1).scale == 0.25


def test_parameters_are_float32_and_alpha_is_a_scalar():
    lora = LoRAModule("a", linear(dtype=torch.bfloat16), rank=3, alpha=0.3)
    assert {parameter.dtype for parameter in lora.parameters()} == {torch.float32}
    assert lora.alpha.shape == ()
    assert set(lora.state_dict()) == {"alpha", "lora_down.weight", "lora_up.weight"}


def test_a_bf16_base_works_without_autocast_and_keeps_its_dtype():
    base = linear(dtype=torch.bfloat16)
    lora = make(base)
    fill(lora)
    out = base(torch.randn(2, 6, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert lora.lora_down.weight.grad.dtype == torch.float32


def test_base_and_lora_keep_their_own_state_dict_keys():
    model = nn.Sequential(linear())
    keys = set(model.state_dict())
    lora = make(model[0])
    assert set(model.state_dict()) == keys
    assert len(list(model.modules())) == 2
    assert len(list(lora.parameters())) == 2


def test_multiplier_zero_gives_the_base_output_bit_for_bit():
    base = linear()
    x = torch.randn(3, 6)
    expected = base(x)
    fill(make(base, multiplier=0.0), size=10)
    assert torch.equal(base(x), expected)


def test_initial_values_depend_on_seed_and_name_alone():
    base = nn.Linear(64, 5, device="meta")

    def down(seed, name, draws_before=0):
        torch.manual_seed(seed)
        torch.rand(draws_before)
        state = torch.get_rng_state()
        lora = LoRAModule(name, base, rank=8)
        assert torch.equal(torch.get_rng_state(), state), "making a module must not use the global generator"
        assert torch.equal(lora.lora_up.weight, torch.zeros(5, 8))
        return lora.lora_down.weight

    first = down(5, "lora_unet_a")
    assert torch.equal(down(5, "lora_unet_a", draws_before=7), first)
    assert not torch.equal(down(6, "lora_unet_a"), first)
    assert not torch.equal(down(5, "lora_unet_b"), first)
    # kaiming_uniform with a = sqrt(5) is uniform in +-1/sqrt(in); 512 draws come within 2 % of the bounds.
    assert 0.98 / 8 < first.abs().max() <= 1 / 8


def test_a_cast_network_keeps_alpha_exact_through_a_state_dict():
    lora = LoRAModule("a", linear(), rank=3, alpha=0.3).to(torch.bfloat16)
    assert lora.lora_down.weight.dtype == torch.bfloat16
    assert lora.alpha.dtype == torch.float32
    other = LoRAModule("a", linear(), rank=3, alpha=5.0)
    other.load_state_dict(lora.state_dict())
    assert other.scale == lora.scale


def test_applying_twice_and_merging_what_is_applied_are_refused():
    lora = make(linear())
    with pytest.raises(RuntimeError, match="applied already"):
        lora.apply_to()
    with pytest.raises(RuntimeError, match="count it twice"):
        lora.merge()


# ---- dropouts


def with_dropouts(keys, **settings):
    base = linear(16, 8)
    lora = make(base, rank=4, keys=keys, **settings)
    fill(lora, size=1.0)
    return base, lora


ALL = {"dropout": 0.3, "rank_dropout": 0.2, "module_dropout": 0.3}


def test_a_batch_is_the_same_as_its_samples_alone():
    keys = DropoutKeys()
    base, _ = with_dropouts(keys, **ALL)
    x = torch.randn(6, 5, 16)
    ids = torch.tensor([number_of("sample", i) for i in range(6)])
    keys.keys = ids
    together = base(x)
    for i in range(6):
        keys.keys = ids[i : i + 1]
        # Batched and single matrix products may round differently; the masks are exact.
        torch.testing.assert_close(base(x[i : i + 1]), together[i : i + 1])


def test_tokens_drop_the_same_however_far_the_batch_is_padded():
    keys = DropoutKeys()
    keys.keys = torch.tensor([3, 4])
    base, _ = with_dropouts(keys, **ALL)
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(base(x)[:, :5], base(x[:, :5]))


def test_time_embeddings_of_two_dimensions_work():
    keys = DropoutKeys()
    keys.keys = torch.tensor([3, 4])
    base, _ = with_dropouts(keys, **ALL)
    assert base(torch.randn(2, 16)).shape == (2, 8)


def test_each_kind_drops_what_it_is_for_and_scales_what_it_keeps():
    samples, tokens = 64, 3
    x = torch.ones(samples, tokens, 4)
    keys = DropoutKeys()
    keys.keys = torch.arange(samples)

    def rank_activations(**settings):
        """Returns the rank activations themselves: base 0, both factors the identity."""
        base = nn.Linear(4, 4, bias=False).requires_grad_(False)
        base.weight.zero_()
        lora = make(base, rank=4, keys=keys, **settings)
        for factor in (lora.lora_down, lora.lora_up):
            factor.weight.data = torch.eye(4)
        return base(x).detach()

    neuron = rank_activations(dropout=0.5)
    assert set(neuron.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(neuron[:, 0], neuron[:, 1])
    rank = rank_activations(rank_dropout=0.75)
    assert set(rank.unique().tolist()) == {0.0, 4.0}
    assert torch.equal(rank[:, 0], rank[:, 1])
    assert not torch.equal(rank[0], rank[1])
    module = rank_activations(module_dropout=0.5)
    assert set(module.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(module.amax((1, 2)), module.amin((1, 2)))


def test_eval_mode_drops_nothing_and_needs_no_keys():
    base, lora = with_dropouts(DropoutKeys(), **ALL)
    plain = copy.deepcopy(lora)
    lora.eval()
    x = torch.randn(2, 3, 16)
    expected = base.__class__.forward(base, x) + x @ plain.lora_down.weight.T @ plain.lora_up.weight.T
    torch.testing.assert_close(base(x), expected)


def test_training_without_keys_or_with_too_few_is_an_error():
    keys = DropoutKeys()
    base, _ = with_dropouts(keys, dropout=0.1)
    with pytest.raises(RuntimeError, match="set_dropout_keys"):
        base(torch.randn(2, 3, 16))
    keys.keys = torch.tensor([1])
    with pytest.raises(RuntimeError, match="1 dropout keys do not fit a batch of 2"):
        base(torch.randn(2, 3, 16))


def test_without_dropout_no_keys_are_needed():
    base, _ = with_dropouts(DropoutKeys())
    assert base(torch.randn(2, 3, 16)).shape == (2, 3, 8)


def test_a_removed_lora_leaves_its_linear_as_it_was():
    base = linear()
    x = torch.randn(3, 6)
    expected = base(x)
    first = make(base)
    fill(first, size=1)
    with_first = base(x)
    second = make(base)
    fill(second, size=1)
    with pytest.raises(RuntimeError, match="not the last LoRA"):
        first.remove()
    second.remove()
    assert torch.equal(base(x), with_first)
    first.remove()
    assert torch.equal(base(x), expected)
    assert "forward" not in vars(base)
    with pytest.raises(RuntimeError, match="not the last LoRA"):
        first.remove()
    second.apply_to()
    assert not torch.equal(base(x), expected)
