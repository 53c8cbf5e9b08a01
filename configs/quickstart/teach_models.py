"""Teaches the quickstart's small models on generated pictures, so that their previews look like something.

The pictures are plain shapes and patterns in plain colours with a caption each. A minute or two on a CPU is enough for an
autoencoder that reconstructs such pictures recognisably, and for a transformer that draws roughly what the prompt says.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from configs.quickstart.make_models import Models
from library.lumina.autoencoder import Autoencoder, build_autoencoder
from library.lumina.gemma2 import Gemma2Encoder, GemmaTokenizer, PromptTemplate, build_gemma2, pad_features
from library.lumina.next_dit import NextDiT

logger = logging.getLogger(__name__)

SYSTEM_PROMPT = "You are an assistant designed to generate high-quality images based on user prompts."
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.9, 0.1, 0.1), "green": (0.1, 0.65, 0.2), "blue": (0.1, 0.25, 0.9), "yellow": (0.98, 0.88, 0.1),
    "purple": (0.5, 0.1, 0.65), "orange": (1.0, 0.55, 0.05), "pink": (1.0, 0.6, 0.75), "cyan": (0.1, 0.85, 0.9),
    "white": (1.0, 1.0, 1.0), "black": (0.02, 0.02, 0.02), "grey": (0.5, 0.5, 0.5), "brown": (0.45, 0.26, 0.1),
}  # fmt: skip
FIGURES = ("disc", "square", "triangle", "ring", "cross")
PATTERNS = ("stripes", "gradient", "checkerboard")


def draw_picture(chooser: random.Random, height: int, width: int) -> tuple[Tensor, str]:
    """Returns a picture (3,height,width) in [-1, 1] and its caption."""
    names = chooser.sample(sorted(COLOURS), 2)
    front, back = (torch.tensor(COLOURS[name])[:, None, None] for name in names)
    kind = chooser.choice(FIGURES + PATTERNS)
    mask = _coverage(kind, chooser, height, width)
    caption = (
        f"a {names[0]} {kind} on a {names[1]} background"
        if kind in FIGURES
        else f"a {kind} of {names[0]} and {names[1]}"
    )
    return (front * mask + back * (1 - mask)) * 2 - 1, caption


def _coverage(kind: str, chooser: random.Random, height: int, width: int) -> Tensor:
    """Returns how much of each pixel (height,width) has the first colour, in [0, 1]."""
    unit = min(height, width) / 2
    centre_y, centre_x = (chooser.uniform(-0.25, 0.25) for _ in range(2))
    y = (torch.arange(height) - height / 2)[:, None].expand(height, width) / unit - centre_y
    x = (torch.arange(width) - width / 2)[None, :].expand(height, width) / unit - centre_x
    size = chooser.uniform(0.4, 0.7)
    period = chooser.uniform(0.4, 0.8)
    distance = {
        "disc": lambda: (x.square() + y.square()).sqrt() - size,
        "square": lambda: torch.maximum(x.abs(), y.abs()) - size * 0.85,
        "triangle": lambda: torch.maximum(y - size * 0.7, x.abs() * 0.87 - (y + size) * 0.45),
        "ring": lambda: ((x.square() + y.square()).sqrt() - size * 0.8).abs() - 0.15,
        "cross": lambda: torch.maximum(torch.minimum(x.abs(), y.abs()) - 0.15, torch.maximum(x.abs(), y.abs()) - size),
        "stripes": lambda: torch.sin((x if centre_x > 0 else y) * (2 * math.pi / period)) * 0.1,
        "checkerboard": lambda: torch.sin(x * (math.pi / period)) * torch.sin(y * (math.pi / period)) * 0.1,
    }
    if kind == "gradient":
        return ((x if centre_x > 0 else y) * 0.5 + 0.5).clamp(0, 1)
    # Smooth over about a pixel.
    return (0.5 - distance[kind]() * unit).clamp(0, 1)


def _pictures(chooser: random.Random, count: int, height: int, width: int) -> tuple[Tensor, list[str]]:
    drawn = [draw_picture(chooser, height, width) for _ in range(count)]
    return torch.stack([picture for picture, _ in drawn]), [caption for _, caption in drawn]


def _rate(step: int, steps: int, highest: float) -> float:
    """Returns the learning rate: a short rise, then half a cosine down to nothing."""
    return highest * min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / steps))


def teach_autoencoder(models: Models, steps: int, seed: int = 0) -> None:
    """Trains ``models.ae`` to reconstruct generated pictures, with latents of the real autoencoder's mean and spread."""
    torch.manual_seed(seed)
    chooser = random.Random(seed)
    model: Any = build_autoencoder(models.ae_config, {name: t.clone() for name, t in models.ae.items()})
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    bar = tqdm(range(steps), desc="autoencoder")
    for step in bar:
        optimizer.param_groups[0]["lr"] = _rate(step, steps, 2e-3)
        pixels, _ = _pictures(chooser, 16, *chooser.choice([(64, 64), (48, 80), (80, 48)]))
        latents = model.encode(pixels).latent_dist.mode()
        spread = (latents.std(dim=(0, 2, 3)) - 1).square().mean() + latents.mean(dim=(0, 2, 3)).square().mean()
        # Noise on the latents makes the decoder smooth: the transformer's latents are never exact.
        decoded = model.decode(latents + 0.1 * torch.randn_like(latents)).sample
        loss = F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels)
        optimizer.zero_grad()
        (loss + 0.05 * spread).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    _rescale_latents(model, models, _pictures(chooser, 64, 64, 64)[0])
    models.ae = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def _rescale_latents(model: Any, models: Models, pixels: Tensor) -> None:
    """Gives every latent channel the spread that becomes 1 when scaled, and takes it back where the decoder begins."""
    channels = models.ae_config.latent_channels
    factor = 1 / models.ae_config.scaling_factor / model.encode(pixels).latent_dist.mode().std(dim=(0, 2, 3))
    model.encoder.conv_out.weight[:channels] *= factor[:, None, None, None]
    model.encoder.conv_out.bias[:channels] *= factor
    model.decoder.conv_in.weight /= factor[None, :, None, None]


def teach_next_dit(models: Models, steps: int, seed: int = 0, num_pictures: int = 1024) -> None:
    """Trains ``models.dit`` to draw generated pictures from their captions (velocity matching, as the real one was).

    The first part of the steps is on small pictures, which are cheap; the rest on those of the quickstart's size.

    Args:
        models: ``dit`` is replaced; the autoencoder should have been taught before.
        steps: of 16 pictures each.
        seed: of pictures, noise and order.
        num_pictures: how many are generated of each size.
    """
    torch.manual_seed(seed)
    chooser = random.Random(seed + 1)
    small, *others = (
        _examples(models, _pictures(chooser, num_pictures, height, width))
        for height, width in ((64, 64), (128, 128), (96, 160), (160, 96))
    )
    model = NextDiT(models.dit_config)
    model.load_state_dict(models.dit)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    average = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    bar = tqdm(range(steps), desc="transformer")
    for step in bar:
        optimizer.param_groups[0]["lr"] = _rate(step, steps, 2e-3)
        latents, features = small if step < steps * 0.5 else chooser.choice([small, others[0], *others])
        chosen = [chooser.randrange(len(features)) for _ in range(16)]
        clean = latents[chosen]
        caption, mask = pad_features([features[index] for index in chosen])
        # Half of the draws near the noisy end, where the picture's layout is decided.
        sigma = torch.sigmoid(torch.randn(len(chosen)) + 0.6)[:, None, None, None]
        noise = torch.randn_like(clean)
        velocity = model((1 - sigma) * clean + sigma * noise, 1 - sigma.flatten(), caption, mask)
        loss = F.mse_loss(velocity, clean - noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, parameter in model.named_parameters():
            average[name].lerp_(parameter.detach(), 1 - min(0.99, (step + 1) / (step + 10)))
        bar.set_postfix(loss=f"{loss.item():.3f}")
    models.dit = average


def _examples(models: Models, pictures: tuple[Tensor, list[str]]) -> tuple[Tensor, list[Tensor]]:
    """Returns latents (B,C,H,W) and text features; some captions have the system prompt, some are empty."""
    pixels, captions = pictures
    ae = Autoencoder(build_autoencoder(models.ae_config, models.ae), models.ae_config)
    tensors = {name: models.gemma2[name] for name in models.gemma2_config.tensor_shapes()}
    encoder = Gemma2Encoder(
        build_gemma2(models.gemma2_config, tensors), GemmaTokenizer(models.tokenizer, 256), SYSTEM_PROMPT
    )
    features: list[Tensor] = []
    with torch.no_grad():
        latents = torch.cat([ae.encode(part) for part in pixels.split(64)])
        for index, caption in enumerate(captions):
            features += encoder.encode(*_variant(caption, index))
    return latents, features


def _variant(caption: str, index: int) -> tuple[Sequence[str], PromptTemplate | None]:
    if index % 10 == 0:
        return [""], None
    return [caption], None if index % 2 else PromptTemplate()
