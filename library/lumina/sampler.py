"""From noise and text to latents: Euler steps over the flow, with guidance as the model was tuned for.

One sampler for training previews and for ``lumina_minimal_inference.py``. The schedule is the model's official one:
sigmas linear from 1 to 1/n, then shifted (6 by default), then 0, as in diffusers' Lumina2Pipeline. Two details follow
the official code and not diffusers: guidance is truncated by model time (``lumina_time < cfg_trunc_ratio``), and the
guided prediction's norm is clamped over the whole latent, only where it exceeds ``renorm_cfg`` times the conditional one.

B batch, C latent channels, H W latent height and width, L caption tokens, D caption width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from library.lumina import flow
from library.prompts import Prompt

Predict = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(latents (B,C,H,W), lumina_time (B,), caption features (B,L,D), caption mask (B,L) or None) -> velocity (B,C,H,W)."""


@dataclass(frozen=True)
class Conditioning:
    """Caption features of a batch: features (B,L,D) and, where captions differ in length, mask (B,L) bool."""

    features: Tensor
    mask: Tensor | None = None

    def beside(self, other: Conditioning) -> Conditioning:
        """Returns both batches as one, this one first; padded, with a mask, only where their lengths differ."""
        parts = (self, other)
        lengths = [part.features.shape[1] for part in parts]
        features = torch.cat([F.pad(part.features, (0, 0, 0, max(lengths) - part.features.shape[1])) for part in parts])
        if lengths[0] == lengths[1] and self.mask is None and other.mask is None:
            return Conditioning(features)
        return Conditioning(features, torch.cat([part._mask_of(max(lengths)) for part in parts]))

    def _mask_of(self, length: int) -> Tensor:
        mask = self.mask
        if mask is None:
            mask = torch.ones(self.features.shape[:2], dtype=torch.bool, device=self.features.device)
        return F.pad(mask, (0, length - mask.shape[1]), value=False)


@dataclass(frozen=True)
class SamplingOptions:
    """How a picture is drawn."""

    steps: int = 36
    guidance_scale: float = 3.5
    shift: float = 6.0
    cfg_trunc_ratio: float = 0.25
    renorm_cfg: float = 1.0

    @classmethod
    def of_prompt(cls, prompt: Prompt, shift: float) -> SamplingOptions:
        """Returns what a prompt says, with the shift that holds for all."""
        return cls(prompt.sample_steps, prompt.scale, shift, prompt.cfg_trunc_ratio, prompt.renorm_cfg)


def sigma_schedule(steps: int, shift: float) -> Tensor:
    """Returns the steps + 1 noise levels of a picture, float32 on the CPU, from 1 down to 0."""
    linear = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64)
    return torch.cat([flow.shift_sigma(linear, shift), torch.zeros(1, dtype=torch.float64)]).float()


def guided_steps(sigmas: Tensor, options: SamplingOptions) -> list[bool]:
    """Returns for each step whether the negative prompt takes part: lumina_time < cfg_trunc_ratio, and a scale that acts."""
    acts = options.guidance_scale != 1.0
    return [acts and bool(flow.lumina_time(sigma) < options.cfg_trunc_ratio) for sigma in sigmas[:-1]]


def guide(conditional: Tensor, negative: Tensor, guidance_scale: float, renorm_cfg: float) -> Tensor:
    """Returns the guided velocity, its norm over all of C, H, W clamped to ``renorm_cfg`` times the conditional's.

    Args:
        conditional: (B,C,H,W) float32, predicted with the prompt.
        negative: (B,C,H,W) float32, predicted with the negative prompt.
        guidance_scale: 1 gives the conditional prediction.
        renorm_cfg: 0 leaves the norm alone.
    """
    guided = negative + guidance_scale * (conditional - negative)
    if renorm_cfg > 0:
        limit = torch.linalg.vector_norm(conditional, dim=(1, 2, 3), keepdim=True) * renorm_cfg
        norm = torch.linalg.vector_norm(guided, dim=(1, 2, 3), keepdim=True)
        guided = guided * (limit / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp(max=1.0)
    return guided


def goes_together(device: torch.device) -> bool:
    """Returns whether a prompt and its negative prompt are predicted in one batch, or in two passes one after the other.

    A GPU has room for both at a time where pictures are small. A CPU is busy with one, so a batch wins nothing there and
    pays for padding and its mask: measured, a drawing takes as long as with two passes where both texts have one length,
    and 1.1 to 1.4 times as long where they have not (docs/benchmarks).
    """
    return device.type != "cpu"


@torch.no_grad()
def sample(
    predict: Predict,
    noise: Tensor,
    prompt: Conditioning,
    negative: Conditioning,
    options: SamplingOptions,
    on_step: Callable[[], object] = lambda: None,
    together: bool | None = None,
) -> Tensor:
    """Returns latents (B,C,H,W) float32 drawn from ``noise``; each picture is the one that it would be alone.

    Args:
        predict: the model.
        noise: (B,C,H,W) float32 on the model's device.
        prompt: what to draw.
        negative: what to stay away from; not used in steps without guidance.
        options: steps and guidance.
        on_step: called after every step, for a progress bar.
        together: predict with prompts and negative prompts in one batch where guidance acts, or in two passes; as
            :func:`goes_together` says where left out.
    """
    together = goes_together(noise.device) if together is None else together
    sigmas = sigma_schedule(options.steps, options.shift)
    guided = guided_steps(sigmas, options)
    latents = noise.float()
    both = prompt.beside(negative) if together and any(guided) else None
    # Only values that the host knows decide what runs, so that no step waits for the device.
    times = flow.lumina_time(sigmas).tolist()
    drops = (sigmas[:-1] - sigmas[1:]).tolist()

    def velocity_of(step: int, text: Conditioning, copies: int = 1) -> Tensor:
        time = torch.full((copies * latents.shape[0],), times[step], dtype=torch.float32, device=latents.device)
        return predict(latents.repeat(copies, 1, 1, 1), time, text.features, text.mask).float()

    for step in range(options.steps):
        if not guided[step]:
            velocity = velocity_of(step, prompt)
        else:
            if both is not None:
                conditional, against = velocity_of(step, both, copies=2).chunk(2)
            else:
                conditional, against = velocity_of(step, prompt), velocity_of(step, negative)
            velocity = guide(conditional, against, options.guidance_scale, options.renorm_cfg)
        latents = latents + drops[step] * velocity
        on_step()
    return latents


def initial_noise(seeds: Sequence[int], channels: int, width_px: int, height_px: int) -> Tensor:
    """Returns noise (B,C,H,W) float32, a picture's by its seed alone, drawn on the CPU so that every device draws the
    same pictures."""
    shape = (channels, height_px // 8, width_px // 8)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
