"""Encoding on CUDA: what stays on the CPU, what is computed in place, and how much memory it takes."""

import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import build, make_pictures
from e2e_helpers import NUM_PICTURES, make_job, python
from models_helpers import tiny_models
from safetensors.torch import load_file

from library.data import images
from library.lumina.autoencoder import Autoencoder, build_autoencoder
from library.lumina.configs import AutoencoderConfig
from library.lumina.gemma2 import LARGE_MATRICES, Gemma2Encoder, GemmaTokenizer, build_gemma2
from library.lumina.strips import in_strips
from library.memory.prepare import stream_weights
from library.memory.quantised import quantise_block

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
pytest.importorskip("diffusers", reason="the autoencoder is its")
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


def medium_gemma2() -> Gemma2Encoder:
    """Returns an encoder of 8 layers of 30 MiB each in bfloat16, always with the same random weights."""
    models = tiny_models()
    config = dataclasses.replace(
        models.gemma2_config, hidden_size=1024, intermediate_size=4096, num_hidden_layers=9, num_attention_heads=8,
        num_key_value_heads=4, head_dim=128,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.02).bfloat16()
        for name, shape in config.tensor_shapes().items()
    }
    return Gemma2Encoder(build_gemma2(config, tensors), GemmaTokenizer(models.tokenizer, 40), "")


def features_of(encoder: Gemma2Encoder) -> list[torch.Tensor]:
    """Returns the features of several batches, on the CPU."""
    with torch.no_grad():
        return [feature.cpu() for batch in (CAPTIONS, CAPTIONS[:1], CAPTIONS[1:]) for feature in encoder.encode(batch)]


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_streamed_layers_give_the_same_bits_in_less_memory(kind: str) -> None:
    plain, encoder = medium_gemma2(), medium_gemma2()
    if kind == "fp8":
        for layer, other in zip(plain.blocks, encoder.blocks, strict=True):
            quantise_block(layer, LARGE_MATRICES, "fp8", CUDA)
            quantise_block(other, LARGE_MATRICES, "fp8", CUDA, place="cpu")
        del layer, other
    plain.place(CUDA)
    expected = features_of(plain)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    stream = stream_weights(encoder.blocks, CUDA, "layers")
    encoder.place(CUDA, besides=encoder.blocks)
    assert encoder.model.embed_tokens.weight.device.type == "cpu"
    found = features_of(encoder)
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.isfinite().all()
        assert torch.equal(ours, theirs)
    # Two of 8 layers. As much again is left for activations and for a matrix that fp8 makes whole for its product.
    assert stream.num_ring_bytes * 4 == stream.num_host_bytes
    assert torch.cuda.max_memory_allocated() - before < 2 * stream.num_ring_bytes
    stream.free()
    assert torch.cuda.memory_allocated() - before < 2**20  # the rotary frequencies
    host = [block.buffer for block in stream._hosts]
    assert all(buffer.is_pinned() for buffer in host)
    del encoder, stream
    gc.collect()
    assert not any(buffer.is_pinned() for buffer in host)


def test_caching_in_the_training_program(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job")
    entries = []
    for name, more in {
        "plain": [],
        "streamed": ["--blocks_to_swap=2"],
        "fp8": ["--blocks_to_swap=2", "--fp8_base"],
    }.items():
        cache = tmp_path / name / "cache"
        flags = job.train_flags(tmp_path / name, "--mixed_precision=bf16", "--max_train_epochs=1", *more)
        done = python("lumina_train_network.py", *flags, "--cache_text_encoder_outputs_to_disk", f"--cache_dir={cache}")
        assert done.returncode == 0, done.stderr
        assert ("The weights of 3 layers of Gemma2 are streamed" in done.stderr) == bool(more)
        entries.append({path.name: load_file(path) for path in cache.rglob("*.safetensors")})
    plain, streamed, fp8 = entries
    assert plain.keys() == streamed.keys()  # streaming changes no bit, so it makes no other entries
    assert len(plain) == len(fp8) == NUM_PICTURES
    assert not plain.keys() & fp8.keys()
    for name, tensors in plain.items():
        assert all(torch.equal(streamed[name][key], tensor) for key, tensor in tensors.items())


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
    latents = torch.zeros(1, 16, side_px // 8, side_px // 8)
    before = torch.cuda.memory_allocated()
    # Computed by the lifetimes of tensors, for 1024 px; with what lies in a strip.
    for compute, given, gib in ((ae.encode, pixels, 1.07), (ae.decode, latents, 1.44)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        compute(given)
        # PyTorch counts what convolutions work with as tensors. 0.25 GiB are left for that: without strips it is 0.5 to 1.
        beside = (torch.cuda.max_memory_allocated() - before) / 2**30
        assert beside < gib * (side_px / 1024) ** 2 + 0.25


def test_convolutions_in_strips_give_the_same_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    for layer in (
        torch.nn.Conv2d(64, 32, 3, padding=1),
        torch.nn.Conv2d(64, 64, 3, stride=2),
        torch.nn.Conv2d(64, 32, 1),
    ):
        layer = layer.requires_grad_(False).to(CUDA, torch.bfloat16)
        x = torch.randn(1, 64, 257, 320, generator=generator).to(CUDA, torch.bfloat16)
        whole = layer(x).float()
        # Sums in float32 in any order, rounded to 8 bits; numbers are about 1.
        torch.testing.assert_close(in_strips(layer, x, 2**20).float(), whole, rtol=2**-7, atol=2**-9)


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
