"""A picture drawn in a batch is the picture drawn alone."""

from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from library.lumina.drawing import conditioning, draw_latents, to_pictures
from library.lumina.gemma2 import PromptTemplate
from library.lumina.loading import ModelPaths, inspect_models, load_autoencoder, load_gemma2, load_next_dit
from library.lumina.sampler import SamplingOptions, initial_noise, sample
from library.memory.attention import sdpa_attention

MODELS = Path(__file__).parents[2] / "configs" / "quickstart" / "models"
PROMPTS = ["a red disc on a green background", "", "a yellow cross, drawn in the centre of a dark picture", "ring"]
NEGATIVES = ["", "", "blurry", "a red disc on a green background"]
SEEDS = [0, 7, 0, 3]


def _drawn(dtype: torch.dtype, indexes: list[int], options: SamplingOptions) -> tuple[Tensor, list[numpy.ndarray]]:
    paths = ModelPaths(*(MODELS / f"quickstart_{part}.safetensors" for part in ("dit", "gemma2", "ae")))
    files = inspect_models(paths)
    encoder = load_gemma2(files, dtype, 256, PromptTemplate.of_captions("You are an assistant."))
    with torch.no_grad():
        prompts = [encoder.encode([PROMPTS[index]])[0] for index in indexes]
        negatives = [encoder.encode([NEGATIVES[index]], PromptTemplate())[0] for index in indexes]
        seeds = [SEEDS[index] for index in indexes]
        dit = load_next_dit(files.dit, dtype, sdpa_attention)
        latents = draw_latents(dit, prompts, negatives, (128, 96), seeds, options, torch.device("cpu"), False)
        pictures = to_pictures(load_autoencoder(files.ae, torch.float32).decode, latents)
    return latents, [numpy.asarray(picture).astype(int) for picture in pictures]


@pytest.mark.parametrize("options", [SamplingOptions(steps=12), SamplingOptions(steps=6, guidance_scale=1.0)])
@pytest.mark.parametrize(
    ("dtype", "tolerance", "levels"),
    [
        # Float32: sums of another order, over the steps. Measured 1e-6; a level of 255 may turn.
        (torch.float32, 1e-5, 1),
        # bfloat16 keeps 8 bits, and another batch size or padding rounds elsewhere. Measured 0.02 and 6; other prompts
        # and seeds give latents that are as far apart as they are large, and pictures 60 levels apart on average.
        (torch.bfloat16, 0.06, 20),
    ],
)
def test_a_batch_draws_what_each_prompt_draws_alone(
    options: SamplingOptions, dtype: torch.dtype, tolerance: float, levels: int
) -> None:
    together, pictures = _drawn(dtype, [0, 1, 2, 3], options)
    for index in range(4):
        alone, (picture,) = _drawn(dtype, [index], options)
        assert float((together[index] - alone[0]).norm() / alone.norm()) < tolerance
        assert numpy.abs(pictures[index] - picture).max() <= levels


def test_guidance_in_one_batch_draws_what_two_passes_draw() -> None:
    """Prompts and negative prompts of different lengths, some padded in their own batch too."""
    paths = ModelPaths(*(MODELS / f"quickstart_{part}.safetensors" for part in ("dit", "gemma2", "ae")))
    dit = load_next_dit(inspect_models(paths).dit, torch.float32, sdpa_attention)
    generator = torch.Generator().manual_seed(3)
    width = dit.config.cap_dim
    device = torch.device("cpu")
    for prompt_lengths, negative_lengths in (((7,), (7,)), ((19,), (2,)), ((4, 11), (6, 6)), ((5, 5), (1, 30))):
        prompt, negative = (
            conditioning([torch.randn(length, width, generator=generator) for length in lengths], dit, device)
            for lengths in (prompt_lengths, negative_lengths)
        )
        noise = initial_noise(range(len(prompt_lengths)), dit.config.channels, 64, 96)
        one, two = (
            sample(
                lambda latents, time, features, mask: dit(latents, time, features, mask),
                noise,
                prompt,
                negative,
                SamplingOptions(steps=6),
                together=together,
            )
            for together in (True, False)
        )
        # As above: float32 sums of another order, over the steps.
        assert float((one - two).norm() / two.norm()) < 1e-5
        assert not torch.equal(one, noise)
