import copy

import pytest
import torch
from lora_helpers import fill
from torch import nn

from networks.lora import DropoutKeys, LoRAModule, kept, mix, number_of


def linear(width_in=6, width_out=5, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(width_in, width_out).to(dtype).requires_grad_(False)


def make(base, name="lora_unet_x", rank=3, keys=None, **settings):
    lora = LoRAModule(name, base, rank=rank, dropout_keys=keys, **settings)
    lora.apply_to()
    return lora


def splitmix64(state):
    """The published generator in Python's own integers: next value of a splitmix64 stream."""
    mask = 2**64 - 1
    z = state & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


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


def test_mix_is_splitmix64():
    states = [0, 1, 2**63 - 1, -1, -(2**63), 0x9E3779B97F4A7C15 - 2**64]
    found = [value & (2**64 - 1) for value in mix(torch.tensor(states)).tolist()]
    assert found == [splitmix64(state) for state in states]


def test_kept_is_the_published_stream_seeded_by_key_module_and_purpose():
    key, module, purpose, gamma = 12345, 678, 2, 0x9E3779B97F4A7C15
    found = kept(torch.tensor([key]), torch.tensor(module), purpose, 50, 0.3)[0].tolist()
    seed = splitmix64(splitmix64(key ^ module) + purpose)
    expected = [splitmix64(seed + (i + 1) * gamma) >> 32 >= int(0.3 * 2**32) for i in range(50)]
    assert found == expected


def test_no_position_is_multiplied_before_something_that_is_read_is_added():
    """torch.compile makes index arithmetic of positions and constants alone, and Triton does it in int32."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def draw(keys, module):
        return kept(keys, module, 1, 40, 0.3)

    graph = make_fx(draw)(torch.arange(3), torch.tensor(7)).graph
    is_read = {}
    for node in graph.nodes:
        is_read[node] = node.op == "placeholder" or any(is_read[given] for given in node.all_input_nodes)
    products = [node for node in graph.nodes if node.target is torch.ops.aten.mul.Tensor]
    assert len(products) == 8  # three mixes of two, and two of the states
    assert all(is_read[node] for node in products)
    assert not all(is_read.values())  # the positions themselves


@pytest.mark.parametrize("drop", [0.01, 0.5, 0.9])
def test_the_share_that_is_dropped_is_right_for_every_key_module_and_position(drop):
    # Small, consecutive keys and module numbers: the worst case for a weak hash.
    num_keys, positions = 1024, 256
    for module in (0, 1, 2**40):
        for purpose in (1, 2, 3):
            dropped = ~kept(torch.arange(num_keys), torch.tensor(module), purpose, positions, drop)
            share = dropped.double()
            spread = (drop * (1 - drop)) ** 0.5
            # Six standard deviations; rows and columns: 1280 draws of one in 5e8 each stay inside.
            assert abs(share.mean() - drop) < 6 * spread / (num_keys * positions) ** 0.5
            assert (share.mean(0) - drop).abs().max() < 6 * spread / num_keys**0.5
            assert (share.mean(1) - drop).abs().max() < 6 * spread / positions**0.5


def test_draws_of_neighbouring_keys_positions_modules_and_purposes_are_independent():
    keys = torch.arange(2048)

    def draws(module, purpose, drop=0.5):
        return kept(keys, torch.tensor(module), purpose, 128, drop).double() * 2 - 1

    reference = draws(7, 1)
    pairs = {
        "keys": (reference[:-1], reference[1:]),
        "positions": (reference[:, :-1], reference[:, 1:]),
        "modules": (reference, draws(8, 1)),
        "modules that differ in a high bit": (reference, draws(7 + 2**62, 1)),
        "neuron and rank": (reference, draws(7, 2)),
        "rank and module": (draws(7, 2), draws(7, 3)),
    }
    for what, (one, other) in pairs.items():
        correlation = (one * other).mean() * one.numel() ** 0.5  # a standard normal number if independent
        assert abs(correlation) < 5, what


def test_runs_of_kept_positions_are_as_long_as_chance_makes_them():
    # Pairs of bits over 2^18 positions of one key: a chi-square of 3 degrees of freedom exceeds 30 once in 700 000.
    draws = kept(torch.tensor([42]), torch.tensor(7), 1, 2**18, 0.5)[0]
    pairs = draws[0::2].long() * 2 + draws[1::2].long()
    counts = torch.bincount(pairs, minlength=4).double()
    expected = counts.sum() / 4
    assert ((counts - expected) ** 2 / expected).sum() < 30


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
