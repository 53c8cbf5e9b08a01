"""From caption features to pictures: noise, sampler, autoencoder. Previews and inference both draw with this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from library.errors import DrawingError
from library.lumina.gemma2 import pad_features
from library.lumina.next_dit import NextDiT
from library.lumina.placement import copied_to
from library.lumina.sampler import Conditioning, SamplingOptions, initial_noise, sample

if TYPE_CHECKING:
    from PIL.Image import Image


def conditioning(features: Sequence[Tensor], model: NextDiT, device: torch.device) -> Conditioning:
    """Returns captions' features (L_i,D) as a batch on the device and in the model's dtype."""
    return Conditioning(*pad_features([copied_to(feature, device).to(model.dtype) for feature in features]))


def draw_latents(
    model: NextDiT,
    prompts: Sequence[Tensor],
    negatives: Sequence[Tensor],
    size_px: tuple[int, int],
    seeds: Sequence[int],
    options: SamplingOptions,
    device: torch.device,
    show_progress: bool = True,
) -> Tensor:
    """Returns the latents (B,C,H,W) float32 of pictures of one size, with a progress bar.

    Args:
        model: on ``device``.
        prompts: caption features (L_i,D) of each picture.
        negatives: features (L_i,D) of what each is to stay away from.
        size_px: width and height, multiples of 16.
        seeds: of the initial noise, one a picture.
        options: steps and guidance.
        device: where the model is.
        show_progress: with a bar.
    """

    def predict(latents: Tensor, lumina_time: Tensor, features: Tensor, mask: Tensor | None) -> Tensor:
        return model(latents.to(model.dtype), lumina_time, features, mask)

    noise = copied_to(initial_noise(seeds, model.config.channels, *size_px), device)
    with tqdm(total=options.steps, desc="drawing", leave=False, disable=not show_progress) as bar:
        return sample(
            predict,
            noise,
            conditioning(prompts, model, device),
            conditioning(negatives, model, device),
            options,
            on_step=bar.update,
        )


def to_pictures(decode: Callable[[Tensor], Tensor], latents: Tensor) -> list[Image]:
    """Returns the RGB pictures of latents (B,C,H,W), decoded one after the other: decoding needs the most memory."""
    return [to_picture(decode, one) for one in latents.split(1)]


@torch.no_grad()
def to_picture(decode: Callable[[Tensor], Tensor], latents: Tensor) -> Image:
    """Returns the RGB picture of latents (1,C,H,W); ``decode`` is the autoencoder's."""
    from PIL import Image

    pixels = decode(latents)[0]  # (3,H,W), about [-1, 1]
    if not bool(torch.isfinite(pixels).all()):
        raise DrawingError(
            "the picture came out as numbers that are not finite; a model or LoRA file is damaged, or its precision is too"
            " low for it (try float32)"
        )
    # Rounded, not cut off: cutting would darken every picture by half a level.
    levels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())
