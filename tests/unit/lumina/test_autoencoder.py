from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from models_helpers import tiny_models

from configs.quickstart.make_models import ae_in_original_names, ae_json
from library.files import write_json
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
