from __future__ import annotations

import dataclasses
import logging
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from models_helpers import tiny_models
from torch.utils._python_dispatch import TorchDispatchMode

from configs.quickstart.make_models import ae_in_original_names, ae_json
from library.files import write_json
from library.lumina import autoencoder as autoencoder_module
from library.lumina.autoencoder import Autoencoder, build_autoencoder
from library.lumina.configs import AutoencoderConfig


def autoencoder(dtype: torch.dtype = torch.float32, **changes: float) -> Autoencoder:
    models = tiny_models()
    config = dataclasses.replace(models.ae_config, **changes)
    tensors = {name: tensor.to(dtype) for name, tensor in models.ae.items()}
    return Autoencoder(build_autoencoder(config, tensors), config)


def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_latents_are_the_shifted_and_scaled_mode() -> None:
    ae = autoencoder()
    latents = ae.encode(pixels())
    assert latents.shape == (2, 16, 4, 6)
    with torch.no_grad():
        mode = ae.model.encode(pixels()).latent_dist.mean
    torch.testing.assert_close(latents, (mode - 0.1159) * 0.3611)
    assert torch.equal(latents, ae.encode(pixels()))
    assert ae.latent_channels == 16


def test_decoding_undoes_shift_and_scale_exactly_once() -> None:
    ae = autoencoder()
    latents = ae.encode(pixels())
    with torch.no_grad():
        expected = ae.model.decode(latents / 0.3611 + 0.1159).sample
    torch.testing.assert_close(ae.decode(latents), expected)
    other = autoencoder(scaling_factor=2.0, shift_factor=-1.0)
    # Other scales cancel: the pixels are the same (float32 rounding).
    torch.testing.assert_close(other.decode(other.encode(pixels())), expected, atol=1e-4, rtol=1e-4)


def test_reduced_precision_gives_float32_tensors_near_the_exact_ones() -> None:
    exact, rounded = autoencoder(), autoencoder(torch.bfloat16)
    latents = rounded.encode(pixels())
    assert latents.dtype == rounded.decode(latents).dtype == torch.float32
    # bfloat16 has 8 bits; a dozen convolutions.
    assert (latents - exact.encode(pixels())).norm() / exact.encode(pixels()).norm() < 0.05


def test_it_equals_diffusers_own_loading_of_the_original_names(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    models = tiny_models()
    levels = len(models.ae_config.block_out_channels)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    write_json(tmp_path / "config.json", ae_json(models) | blocks)
    theirs = AutoencoderKL.from_single_file(
        {name: tensor.clone() for name, tensor in ae_in_original_names(models).items()}, config=str(tmp_path)
    ).eval()
    latents = autoencoder().encode(pixels())
    with torch.no_grad():
        expected = (theirs.encode(pixels()).latent_dist.mode() - 0.1159) * 0.3611
        torch.testing.assert_close(latents, expected)
        torch.testing.assert_close(autoencoder().decode(latents), theirs.decode(latents / 0.3611 + 0.1159).sample)


def test_it_is_frozen_and_takes_no_gradient() -> None:
    ae = autoencoder()
    assert not any(parameter.requires_grad for parameter in ae.model.parameters())
    assert not ae.encode(pixels().requires_grad_()).requires_grad


def test_the_real_constants_are_the_defaults() -> None:
    config = AutoencoderConfig()
    assert (config.scaling_factor, config.shift_factor, config.latent_channels) == (0.3611, 0.1159, 16)
    assert sum(math.prod(shape) for shape in config.tensor_shapes().values()) == 83_819_683


@pytest.mark.parametrize("size", [(8, 8), (24, 40)])
def test_any_size_divisible_by_eight_works(size: tuple[int, int]) -> None:
    ae = autoencoder()
    latents = ae.encode(torch.zeros(1, 3, *size))
    assert latents.shape[-2:] == (size[0] // 8, size[1] // 8)
    assert ae.decode(latents).shape == (1, 3, *size)


def test_residual_blocks_compute_in_place_with_the_same_bits() -> None:
    from diffusers.models.resnet import ResnetBlock2D

    ae = autoencoder()
    latents = ae.encode(pixels())
    decoded = ae.decode(latents)
    blocks = [module for module in ae.model.modules() if isinstance(module, ResnetBlock2D)]
    assert any(block.conv_shortcut is not None for block in blocks)
    for block in blocks:
        assert "forward" in vars(block)
        del block.forward  # diffusers' own is back
    assert torch.equal(ae.encode(pixels()), latents)
    assert torch.equal(ae.decode(latents), decoded)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result

    def _freed(self, known: int, num_bytes: int) -> None:
        self._known.discard(known)
        self.now -= num_bytes


@pytest.mark.parametrize(
    ("side_px", "tiled", "encode_gib", "decode_gib"),
    # As the module's docstring says; without in-place blocks 1.26 and 1.50. A tile of 1024 pixels needs what a picture of
    # that size needs, and the parts of 2048 x 2048 pixels themselves are small.
    [(1024, False, 1.05, 1.42), (2048, True, 1.1, 1.5), (2048, False, 4.1, 5.6)],
)
def test_memory_of_the_real_model(
    side_px: int, tiled: bool, encode_gib: float, decode_gib: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AutoencoderConfig()
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in config.tensor_shapes().items()
    }
    ae = Autoencoder(build_autoencoder(config, tensors), config, tiled=tiled)
    # On the meta device attention is written out; the kernels that run on real devices keep no scores.
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, *_, **__: torch.empty_like(q))
    pixels = torch.empty(1, 3, side_px, side_px, dtype=torch.bfloat16, device="meta")
    with _LiveBytes() as encoding:
        latents = ae.encode(pixels)
    with _LiveBytes() as decoding:
        ae.decode(latents)
    assert 0.9 * encode_gib < encoding.peak / 2**30 < encode_gib
    assert 0.9 * decode_gib < decoding.peak / 2**30 < decode_gib


def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder_module, "WHOLE_PX", 72)
    monkeypatch.setattr(autoencoder_module, "TILE_PX", 64)
    monkeypatch.setattr(autoencoder_module, "_TILES_PX", (64, 32))


def test_tiles_on_request_leave_pictures_of_usual_size_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _small_tiles(monkeypatch)
    ae, tiled = autoencoder(), autoencoder()
    tiled.tiled = True
    for shape, is_whole in (((64, 80), True), ((72, 72), True), ((80, 72), False)):
        picture = torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(4)) * 2 - 1
        latents = ae.encode(picture)
        assert torch.equal(tiled.encode(picture), latents) == is_whole
        assert torch.equal(tiled.decode(latents), ae.decode(latents)) == is_whole
        assert tiled.encode(picture).shape == latents.shape
        assert tiled.decode(latents).shape == (1, 3, *shape)


def test_a_tile_inside_a_picture_equals_that_part_encoded_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _small_tiles(monkeypatch)
    ae = autoencoder()
    ae.tiled = True
    picture = torch.rand(1, 3, 112, 112, generator=torch.Generator().manual_seed(4)) * 2 - 1
    # Three quarters of a tile of 64 pixels lie before the overlap.
    assert torch.equal(ae.encode(picture)[..., :6, :6], ae.encode(picture[..., :64, :64])[..., :6, :6])


def _too_large(longest: int, most: int, real: Any) -> Any:
    """Stands for a device whose memory takes ``most`` pictures of sides of up to ``longest``."""

    def part(tensor: torch.Tensor, *more: Any) -> Any:
        if max(tensor.shape[-2:]) > longest or len(tensor) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(tensor, *more)

    return part


def test_a_batch_that_does_not_fit_is_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    ae = autoencoder()
    latents, one_by_one = ae.encode(pixels()), torch.cat([ae.encode(one) for one in pixels().split(1)])
    decoded = torch.cat([ae.decode(one) for one in latents.split(1)])
    monkeypatch.setattr(ae.model.encoder, "forward", _too_large(48, 1, ae.model.encoder.forward))
    monkeypatch.setattr(ae.model.decoder, "forward", _too_large(6, 1, ae.model.decoder.forward))
    assert torch.equal(ae.encode(pixels()), one_by_one)
    assert torch.equal(ae.decode(latents), decoded)


def test_a_picture_that_does_not_fit_is_decoded_in_tiles_and_never_encoded_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _small_tiles(monkeypatch)
    caplog.set_level(logging.INFO)
    ae = autoencoder()
    picture = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(4)) * 2 - 1
    latents = ae.encode(picture)
    encoder, decoder = ae.model.encoder.forward, ae.model.decoder.forward
    monkeypatch.setattr(ae.model.encoder, "forward", _too_large(64, 1, encoder))
    with pytest.raises(torch.OutOfMemoryError):  # what is cached must not depend on the memory that was free
        ae.encode(picture)
    for longest, tile in ((8, 64), (4, 32)):
        monkeypatch.setattr(ae.model.decoder, "forward", _too_large(longest, 1, decoder))
        first = ae.decode(latents)
        assert first.shape == (1, 3, 64, 96)
        assert torch.isfinite(first).all()
        assert torch.equal(first, ae.decode(latents))
        assert (
            caplog.text.count(
                f"A picture of 96x64 pixels does not fit into the device's memory, so it and others as"
                f" large are decoded in tiles of {tile} pixels"
            )
            == 1
        )
    monkeypatch.setattr(ae.model.decoder, "forward", _too_large(2, 1, decoder))
    with pytest.raises(torch.OutOfMemoryError):
        ae.decode(latents)
