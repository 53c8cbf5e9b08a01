"""From caption features to a picture: noise, sampler, autoencoder. Previews and inference both draw with this."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from library.errors import DrawingError
from library.lumina.next_dit import NextDiT
from library.lumina.sampler import Conditioning, SamplingOptions, initial_noise, sample

if TYPE_CHECKING:
    from PIL.Image import Image


def conditioning(features: Tensor, model: NextDiT, device: torch.device) -> Conditioning:
    """Returns one caption's features (L,D) as a batch of one, on the device and in the model's dtype."""
    return Conditioning(features[None].to(device, model.dtype))


def draw_latents(
    model: NextDiT,
    prompt: Tensor,
    negative: Tensor,
    size_px: tuple[int, int],
    seed: int,
    options: SamplingOptions,
    device: torch.device,
    show_progress: bool = True,
) -> Tensor:
    """Returns the latents (1,C,H,W) float32 of one picture, with a progress bar.

    Args:
        model: on ``device``.
        prompt: caption features (L,D).
        negative: features of what to stay away from (L,D).
        size_px: width and height, multiples of 16.
        seed: of the initial noise.
        options: steps and guidance.
        device: where the model is.
        show_progress: with a bar.
    """

    def predict(latents: Tensor, lumina_time: Tensor, features: Tensor, mask: Tensor | None) -> Tensor:
        return model(latents.to(model.dtype), lumina_time, features, mask)

    noise = initial_noise(seed, model.config.channels, *size_px).to(device)
    with tqdm(total=options.steps, desc="drawing", leave=False, disable=not show_progress) as bar:
        return sample(
            predict,
            noise,
            conditioning(prompt, model, device),
            conditioning(negative, model, device),
            options,
            on_step=bar.update,
        )


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
