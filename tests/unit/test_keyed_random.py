"""Draws depend on their key and on nothing else."""

import torch

from library import keyed_random


def test_keys_tell_parts_apart() -> None:
    keys = {
        keyed_random.key("a", 1, 2),
        keyed_random.key("a", 2, 1),
        keyed_random.key("a", 12),
        keyed_random.key("a", "12"),
        keyed_random.key("a1", 2),
    }
    assert len(keys) == 5
    assert all(0 <= key < 2**63 for key in keys)


def test_key_is_the_same_on_every_machine() -> None:
    # A changed value would give every seed another run.
    assert keyed_random.key("draw", 42, 1, 0, 0) == 998248485450383642


def test_rows_do_not_depend_on_their_neighbours() -> None:
    together = keyed_random.normal("noise", [5, 6, 7], (4, 2, 2))
    alone = keyed_random.normal("noise", [6], (4, 2, 2))
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(keyed_random.normal("other", [6], (4, 2, 2)), alone)


def test_draws_have_their_distributions() -> None:
    normal = keyed_random.normal("n", range(2000), (4,))
    uniform = keyed_random.uniform("u", range(2000), (4,))
    # 8000 draws: standard error of the mean is 0.011 and 0.003; four of them are allowed.
    assert abs(normal.mean()) < 0.045
    assert abs(normal.std() - 1) < 0.045
    assert abs(uniform.mean() - 0.5) < 0.013
    assert 0 <= uniform.min() < uniform.max() < 1
