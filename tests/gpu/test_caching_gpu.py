"""Encoding on CUDA: what stays on the CPU, what is computed in place, and how much memory it takes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import build, make_pictures
from models_helpers import tiny_models

from library.data import images
from library.lumina.autoencoder import Autoencoder, build_autoencoder
from library.lumina.configs import AutoencoderConfig
from library.lumina.gemma2 import Gemma2Encoder, GemmaTokenizer, build_gemma2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
CUDA = torch.device("cuda")
CAPTIONS = ["a red disc on a blue background", "", "ring"]


def gemma2(dtype: torch.dtype) -> Gemma2Encoder:
    models = tiny_models()
    tensors = {name: models.gemma2[name].to(dtype).clone() for name in models.gemma2_config.tensor_shapes()}
    return Gemma2Encoder(build_gemma2(models.gemma2_config, tensors), GemmaTokenizer(models.tokenizer, 40), "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_embedding_stays_on_the_cpu_and_changes_no_bit(dtype: torch.dtype) -> None:
    encoder, whole = gemma2(dtype), gemma2(dtype)
    encoder.place(CUDA)
    assert encoder.model.embed_tokens.weight.device.type == "cpu"
    assert {tensor.device.type for block in encoder.blocks for tensor in block.parameters()} == {"cuda"}
    whole.place(CUDA)
    whole.model.embed_tokens.to(CUDA)
    for apart, together in zip(encoder.encode(CAPTIONS), whole.encode(CAPTIONS), strict=True):
        assert apart.device.type == "cuda"
        assert torch.equal(apart, together)
    encoder.place(torch.device("cpu"))
    assert encoder.encode(CAPTIONS)[0].device.type == "cpu"


def full_size(dtype: torch.dtype) -> Autoencoder:
    """Returns an autoencoder of the real sizes with random weights on CUDA."""
    config = AutoencoderConfig()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        # Small enough for activations to stay finite through all layers.
        name: (torch.randn(shape, generator=generator) * 0.02).to(dtype)
        for name, shape in config.tensor_shapes().items()
    }
    ae = Autoencoder(build_autoencoder(config, tensors), config)
    ae.model.to(CUDA)
    return ae


def test_residual_blocks_in_place_give_diffusers_bits() -> None:
    from diffusers.models.resnet import ResnetBlock2D

    ae = full_size(torch.bfloat16)
    pixels = torch.rand(1, 3, 256, 320, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = ae.encode(pixels)
    decoded = ae.decode(latents)
    for module in ae.model.modules():
        if isinstance(module, ResnetBlock2D):
            del module.forward
    assert torch.equal(ae.encode(pixels), latents)
    assert torch.equal(ae.decode(latents), decoded)


@pytest.mark.parametrize("side_px", [1024, 1536])
def test_memory_at_usual_sizes(side_px: int) -> None:
    ae = full_size(torch.bfloat16)
    pixels = torch.zeros(1, 3, side_px, side_px)
    for compute in (ae.encode, lambda _: ae.decode(torch.zeros(1, 16, side_px // 8, side_px // 8))):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        compute(pixels)
        # At 1024 px 1.38 GiB of tensors at most and 0.16 of weights; as much again for what convolutions work with and
        # for the allocator's rounding.
        assert torch.cuda.max_memory_reserved() / 2**30 < 3 * (side_px / 1024) ** 2


def test_what_is_cached_is_what_the_encoder_gave(tmp_path: Path) -> None:
    """The thread that writes takes latents from the device while the next batch is computed there."""
    make_pictures(tmp_path, {f"{number}.png": (64, 64) for number in range(24)})
    models = tiny_models()
    ae = Autoencoder(build_autoencoder(models.ae_config, dict(models.ae)), models.ae_config)
    ae.model.to(CUDA)
    given: list[torch.Tensor] = []

    def encode(pixels: torch.Tensor) -> Any:
        latents = ae.encode(pixels)
        given.append(latents.clone())
        return latents

    data = build(tmp_path, cache_latents=True, vae_batch_size=4)
    assert data.latents is not None
    data.fill_latents(encode, "ae")
    for number, item in enumerate(data.items):
        assert torch.equal(data.latents.get(item, False), given[number // 4][number % 4].bfloat16().cpu())
    pixels = images.load_pixels(data.items[0].path, data.items[0].placement, None)
    # Alone or among others, convolutions may sum in another order; entries are bf16, which has 8 bits.
    torch.testing.assert_close(
        data.latents.get(data.items[0], False).float(), ae.encode(pixels[None])[0].cpu(), rtol=2e-2, atol=2e-2
    )
