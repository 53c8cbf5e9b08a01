import pytest
import torch

from library.errors import NetworkError
from networks.lora_files import Factors
from networks.lora_sum import at_strength, reduced, summed

SHAPES = {"lora_unet_layers_0_attention_out": (48, 32), "lora_unet_x_embedder": (48, 6)}


def lora(rank, alpha, seed, names=tuple(SHAPES), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Factors(
            torch.randn(rank, SHAPES[name][1], generator=generator).to(dtype),
            torch.randn(SHAPES[name][0], rank, generator=generator).to(dtype),
            alpha,
        )
        for name in names
    }


def change(one):
    return one.alpha / one.down.shape[0] * one.up.double() @ one.down.double()


@pytest.mark.parametrize("multiplier", [1.0, 0.25, -1.5, 0.1])
@pytest.mark.parametrize("alpha", [1.0, 4.0, 3.0])
def test_the_strength_goes_into_the_factors(multiplier, alpha):
    one = lora(4, alpha, 0)["lora_unet_x_embedder"]
    down, up = at_strength(one, multiplier)
    # float32 rounds once where the strength is no power of two.
    torch.testing.assert_close(up.double() @ down.double(), multiplier * change(one), rtol=1e-6, atol=1e-6)
    if multiplier * alpha / 4 in (1.0, 0.25, 0.0625):
        assert torch.equal(up.double() @ down.double(), multiplier * change(one))


def test_a_sum_is_the_sum_of_the_changes():
    first, second = lora(4, 2.0, 1), lora(3, 3.0, 2, ["lora_unet_x_embedder"])
    total = summed([(first, 0.5), (second, -2.0)])
    assert list(total) == list(SHAPES)
    assert {name: one.down.shape[0] for name, one in total.items()} == dict(zip(SHAPES, (4, 7), strict=True))
    torch.testing.assert_close(
        change(total["lora_unet_layers_0_attention_out"]), 0.5 * change(first["lora_unet_layers_0_attention_out"])
    )
    expected = 0.5 * change(first["lora_unet_x_embedder"]) - 2 * change(second["lora_unet_x_embedder"])
    torch.testing.assert_close(change(total["lora_unet_x_embedder"]), expected, rtol=1e-6, atol=1e-6)


def test_a_multiplier_of_0_leaves_a_lora_out():
    first, second = lora(4, 2.0, 1, ["lora_unet_x_embedder"]), lora(3, 3.0, 2)
    total = summed([(first, 1.0), (second, 0.0)])
    assert {name: one.down.shape[0] for name, one in total.items()} == {"lora_unet_x_embedder": 4}
    assert summed([(first, 0.0)]) == {}


def test_files_of_different_models_are_refused():
    other = {"lora_unet_x_embedder": Factors(torch.ones(2, 6), torch.ones(40, 2), 2.0)}
    with pytest.raises(NetworkError, match="x_embedder: 48 x 6 and 40 x 6"):
        summed([(lora(4, 2.0, 1), 1.0), (other, 1.0)])


def test_a_smaller_rank_comes_as_close_as_any_can():
    whole = lora(16, 8.0, 3, ["lora_unet_layers_0_attention_out"])
    result = reduced(whole, 5)
    expected = change(whole["lora_unet_layers_0_attention_out"])
    found = result.factors["lora_unet_layers_0_attention_out"]
    assert (tuple(found.down.shape), tuple(found.up.shape)) == ((5, 32), (48, 5))
    left, sizes, right = torch.linalg.svd(expected)
    best = left[:, :5] * sizes[:5] @ right[:5]  # Eckart and Young
    torch.testing.assert_close(change(found), best, rtol=1e-5, atol=1e-5 * float(sizes[0]))
    kept = float(sizes[:5].norm() / sizes.norm())
    assert result.kept == pytest.approx({"lora_unet_layers_0_attention_out": kept})
    assert 0.5 < kept < 0.95


def test_the_same_lora_twice_has_its_own_rank_again():
    one = lora(4, 4.0, 4)
    twice = summed([(one, 0.5), (one, 0.5)])
    result = reduced(twice, 4)
    for name in one:
        torch.testing.assert_close(change(result.factors[name]), change(one[name]), rtol=1e-5, atol=1e-5)
        assert result.kept[name] == pytest.approx(1)


def test_a_rank_that_is_small_enough_already_stays_bit_for_bit():
    one = lora(4, 2.0, 5)
    result = reduced(one, 4)
    assert result.factors == one
    assert set(result.kept.values()) == {1.0}


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_have_no_smaller_rank(number):
    broken = {"lora_unet_x_embedder": Factors(torch.randn(4, 6), torch.full((48, 4), number), 4.0)}
    with pytest.raises(NetworkError, match=r"lora_unet_x_embedder holds numbers that are not finite"):
        reduced(broken, 2)


@pytest.mark.parametrize("rank", [1, 20])
def test_ranks_beyond_a_linears_size_and_zeros_are_no_trouble(rank):
    big = {"lora_unet_x_embedder": Factors(torch.randn(32, 6), torch.randn(48, 32), 32.0)}
    result = reduced(big, rank)
    assert result.factors["lora_unet_x_embedder"].down.shape[0] == min(rank, 6)
    zero = {"lora_unet_x_embedder": Factors(torch.randn(32, 6), torch.zeros(48, 32), 32.0)}
    assert reduced(zero, rank).kept == {"lora_unet_x_embedder": 1.0}
    assert not reduced(zero, rank).factors["lora_unet_x_embedder"].up.any()
