"""Pixels <-> scaled latents, by the FLUX autoencoder (diffusers' ``AutoencoderKL``).

Shapes: B batch, C latent channels (16), H W latent height and width (pixels / 8).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from library.importing import uncollected_imports
from library.lumina.configs import AutoencoderConfig
from library.lumina.quiet import quiet_libraries


def build_autoencoder(config: AutoencoderConfig, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Returns diffusers' ``AutoencoderKL``, frozen, in evaluation mode.

    Args:
        config: its sizes.
        tensors: what ``config.tensor_shapes`` names; used in place.
    """
    levels = len(config.block_out_channels)
    with quiet_libraries():
        with uncollected_imports():
            from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        with torch.device("meta"):
            model: Any = AutoencoderKL(
                in_channels=config.in_channels,
                out_channels=config.out_channels,
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                block_out_channels=config.block_out_channels,
                layers_per_block=config.layers_per_block,
                latent_channels=config.latent_channels,
                norm_num_groups=config.norm_num_groups,
                scaling_factor=config.scaling_factor,
                shift_factor=config.shift_factor,
                use_quant_conv=config.use_quant_conv,
                use_post_quant_conv=config.use_post_quant_conv,
            )
        model.load_state_dict(tensors, strict=True, assign=True)
    return model.requires_grad_(False).eval()


class Autoencoder:
    """The autoencoder with its latents' shift and scale, which are applied here and nowhere else.

    Attributes:
        model: diffusers' ``AutoencoderKL``; move it with ``.model.to(device)``.
        config: sizes, shift and scale.
    """

    def __init__(self, model: nn.Module, config: AutoencoderConfig) -> None:
        self.model: Any = model
        self.config = config

    @property
    def latent_channels(self) -> int:
        """C, 16 for FLUX's autoencoder."""
        return self.config.latent_channels

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.encoder.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which pictures are computed."""
        return self.model.encoder.conv_in.weight.dtype

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Returns scaled latents (B,C,H,W) float32: the distribution's mode, (mode - shift) * scale.

        Args:
            pixels: (B,3,8H,8W) in [-1, 1].
        """
        mode = self.model.encode(pixels.to(self.device, self.dtype)).latent_dist.mode()
        return (mode.float() - self.config.shift_factor) * self.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Returns pixels (B,3,8H,8W) float32, about [-1, 1] but not clamped, from scaled latents (B,C,H,W)."""
        unscaled = latents.to(self.device, torch.float32) / self.config.scaling_factor + self.config.shift_factor
        return self.model.decode(unscaled.to(self.dtype)).sample.float()
