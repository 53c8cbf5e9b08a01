from __future__ import annotations

import pytest
import torch

from library.lumina.next_dit import NextDiT, NextDiTConfig, patchify, rope_table, unpatchify

CONFIG = NextDiTConfig(
    dim=48, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=24, ffn_dim=64, time_dim=48, cap_dim=32
)
# Kernels sum in another order when a batch or a mask changes; float32 through six blocks.
ROUNDING = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def model() -> NextDiT:
    torch.manual_seed(0)
    return NextDiT(CONFIG).eval().requires_grad_(False)


def inputs(lengths: list[int], height: int = 8, width: int = 12) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    batch = len(lengths)
    latents = torch.randn(batch, 16, height, width, generator=generator)
    features = torch.randn(batch, max(lengths), CONFIG.cap_dim, generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return latents, torch.rand(batch, generator=generator), features, mask


def test_classes_are_called_as_in_the_reference_program(model: NextDiT) -> None:
    """LyCORIS and its users' presets find what they train by these names."""
    (block, *_), final_layer = model.layers, model.final_layer
    parts = (block, block.attention, block.feed_forward, final_layer)
    names = ["JointTransformerBlock", "JointAttention", "FeedForward", "FinalLayer"]
    assert [type(part).__name__ for part in parts] == names
    assert {type(part).__name__ for part in (*model.noise_refiner, *model.context_refiner)} == {names[0]}


def test_a_full_mask_is_the_same_as_none(model: NextDiT) -> None:
    latents, time, features, mask = inputs([9, 9])
    torch.testing.assert_close(model(latents, time, features, mask), model(latents, time, features), **ROUNDING)


def test_a_ragged_batch_gives_what_each_sample_gives_alone(model: NextDiT) -> None:
    lengths = [17, 5, 1]
    latents, time, features, mask = inputs(lengths)
    together = model(latents, time, features, mask)
    for index, length in enumerate(lengths):
        one = slice(index, index + 1)
        alone = model(latents[one], time[one], features[one, :length])
        torch.testing.assert_close(together[one], alone, **ROUNDING)


def test_what_stands_in_the_padding_does_not_matter(model: NextDiT) -> None:
    latents, time, features, mask = inputs([12, 6])
    other = torch.where(mask[..., None], features, torch.full_like(features, 1e3))
    torch.testing.assert_close(model(latents, time, features, mask), model(latents, time, other, mask), **ROUNDING)


def test_every_input_matters(model: NextDiT) -> None:
    latents, time, features, _ = inputs([6])
    before = model(latents, time, features)
    for changed in (
        model(latents + 0.1, time, features),
        model(latents, time * 0.5, features),
        model(latents, time, features.flip(1)),
        model(latents, time, features[:, :5]),
    ):
        assert (changed - before).abs().max() > 1e-3


def test_captions_may_be_longer_than_300_tokens(model: NextDiT) -> None:
    latents, time, features, _ = inputs([700])
    longer = model(latents, time, features)
    assert longer.isfinite().all()
    assert (longer - model(latents, time, features[:, :699])).abs().max() > 0


def test_the_residual_stream_has_the_weights_dtype() -> None:
    torch.manual_seed(0)
    model = NextDiT(CONFIG).to(torch.bfloat16)
    latents, time, features, mask = inputs([8, 3])
    dtypes = []
    model.layers[0].register_forward_hook(lambda module, args, output: dtypes.append((args[0].dtype, output.dtype)))
    assert model(latents, time, features, mask).dtype == torch.bfloat16
    assert dtypes == [(torch.bfloat16, torch.bfloat16)]


@pytest.mark.parametrize("masked", [False, True])
def test_nothing_in_a_forward_pass_reads_a_value(masked: bool) -> None:
    """Tensors on the meta device have no values, so a host synchronisation or a data-dependent shape would raise."""
    with torch.device("meta"):
        model = NextDiT(CONFIG)
    latents, time, features, mask = (tensor.to("meta") for tensor in inputs([9, 4]))
    assert model(latents, time, features, mask if masked else None).shape == latents.shape


@pytest.mark.parametrize("masked", [False, True])
def test_it_compiles_into_one_graph(model: NextDiT, masked: bool) -> None:
    latents, time, features, mask = inputs([9, 4] if masked else [9, 9])
    caption_mask = mask if masked else None
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = model(latents, time, features, caption_mask)
    torch.testing.assert_close(compiled(latents, time, features, caption_mask), expected, **ROUNDING)


def test_gradients_reach_the_features_and_every_weight_but_the_unused_norm() -> None:
    torch.manual_seed(0)
    model = NextDiT(CONFIG)
    latents, time, features, mask = inputs([8, 3])
    features.requires_grad_()
    model(latents, time, features, mask).square().mean().backward()
    untouched = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert untouched == ["norm_final.weight"]
    assert features.grad is not None
    assert features.grad[mask].abs().min() > 0
    assert features.grad[~mask].abs().max() == 0


def test_the_given_attention_is_used_and_sees_a_mask_only_where_there_is_padding() -> None:
    seen = []

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
        seen.append((tuple(q.shape), tuple(k.shape), None if key_mask is None else tuple(key_mask.shape)))
        return q

    model = NextDiT(CONFIG, attention)
    latents, time, features, mask = inputs([7, 4])
    model(latents, time, features, mask)
    image, caption, joint = (2, 24, 2, 24), (2, 7, 2, 24), (2, 31, 2, 24)
    assert [(shape, key_mask) for shape, _, key_mask in seen] == [
        (image, None), (image, None), (caption, (2, 7)), (caption, (2, 7)), (joint, (2, 31)), (joint, (2, 31)),
    ]  # fmt: skip
    assert all(k_shape[2] == 1 for _, k_shape, _ in seen)
    seen.clear()
    model(latents, time, features)
    assert all(key_mask is None for _, _, key_mask in seen)


def test_patches_are_rows_then_columns_then_channels() -> None:
    latents = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)
    patches = patchify(latents)
    assert patches.shape == (2, 6, 12)
    corner = torch.stack([latents[0, :, 2, 4], latents[0, :, 2, 5], latents[0, :, 3, 4], latents[0, :, 3, 5]])
    assert torch.equal(patches[0, 5], corner.flatten())
    assert torch.equal(unpatchify(patches, 2, 3), latents)


def test_odd_latents_are_refused() -> None:
    with pytest.raises(ValueError, match="7 x 12"):
        patchify(torch.zeros(1, 16, 7, 12))


def test_each_tokens_angles_follow_from_its_position() -> None:
    rope = rope_table(torch.tensor([5, 2]), length=5, rows=2, columns=3, head_dim=12)
    assert rope.shape == (2, 11, 1, 6, 2)
    assert rope.dtype == torch.float32
    frequencies = 10000.0 ** -(torch.arange(0, 4, 2, dtype=torch.float64) / 4)
    # Sample 1, image token 4: behind a caption of two, row 1, column 1. Caption token 3: only its index counts.
    for token, position in ((4, (2, 1, 1)), (6 + 3, (3, 0, 0))):
        angles = torch.cat([frequencies * axis for axis in position])
        expected = torch.stack([angles.cos(), angles.sin()], dim=-1)
        # Float32 rounding of angles up to 3.
        torch.testing.assert_close(rope[1, token, 0].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.0.attention.q_norm.weight": (25,)}, "rotary axes"),
        ({"layers.0.attention.qkv.weight": (97, 48)}, "97 rows"),
        ({"layers.0.attention.qkv.weight": (48, 48)}, "0 key/value heads"),
    ],
)
def test_shapes_of_no_next_dit_are_refused(change: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NextDiTConfig.from_shapes(CONFIG.tensor_shapes() | change)
