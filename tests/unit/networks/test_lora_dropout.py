"""The hash that decides what dropouts keep: a published generator, with draws as independent as chance."""

import pytest
import torch

from networks.lora_dropout import kept, mix


def splitmix64(state):
    """The published generator in Python's own integers: next value of a splitmix64 stream."""
    mask = 2**64 - 1
    z = state & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


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
