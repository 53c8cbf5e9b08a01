"""Pixels <-> scaled latents, by the FLUX autoencoder (diffusers' ``AutoencoderKL``).

Most memory is needed where the picture has its full size: there one activation of 1024 x 1024 pixels takes 0.25 GiB in bf16
in the encoder and 0.5 in the decoder. Residual blocks therefore compute in place, with the same bits: at the peak 1.01
instead of 1.26 GiB are in use for encoding that picture, and 1.38 instead of 1.50 for decoding it. What convolutions work
with comes on top; on a GPU it is bounded by computing them in strips (``library/lumina/strips.py``). Beyond that there are
tiles, which bound memory whatever the picture's size, but are not exact: normalisation and attention see one tile instead
of the picture.

Shapes: B batch, C latent channels (16), H W latent height and width (pixels / 8).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.importing import uncollected_imports
from library.lumina.configs import AutoencoderConfig
from library.lumina.placement import copied_to
from library.lumina.quiet import quiet_libraries
from library.lumina.strips import can_be_cut, convolution_in_strips

logger = logging.getLogger(__name__)

TILE_PX = 1024
"""Side of a tile; neighbours overlap by a quarter of it."""
WHOLE_PX = 1280
"""Pictures of up to this many pixels squared are never cut into tiles on request."""
_TILES_PX = (TILE_PX, TILE_PX // 2)  # tried in turn where a picture to be decoded does not fit


def is_cut(width_px: int, height_px: int) -> bool:
    """Whether a picture is so large that it is cut into tiles on request."""
    return width_px * height_px > WHOLE_PX**2


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
        _compute_in_place(model)
    return model.requires_grad_(False).eval()


def _compute_in_place(model: nn.Module) -> None:
    """Has the residual blocks overwrite what they made themselves: the same bits in less memory. On a GPU, large
    convolutions are computed in strips."""
    from diffusers.models.resnet import ResnetBlock2D

    for module in model.modules():
        if isinstance(module, nn.Conv2d) and can_be_cut(module):
            module.forward = functools.partial(convolution_in_strips, module)  # type: ignore[method-assign]
        if isinstance(module, ResnetBlock2D):
            module.forward = functools.partial(_residual_block, module)


def _residual_block(block: Any, x: Tensor, temb: None = None) -> Tensor:
    """Returns what diffusers' ``ResnetBlock2D.forward`` returns without a time embedding; takes no gradients."""
    hidden = block.conv1(F.silu(block.norm1(x), inplace=True))
    hidden = block.norm2(hidden)  # on a line of its own, so that what it was made from is let go before conv2
    hidden = block.conv2(F.silu(hidden, inplace=True))
    return hidden.add_(x if block.conv_shortcut is None else block.conv_shortcut(x))


class Autoencoder:
    """The autoencoder with its latents' shift and scale, which are applied here and nowhere else.

    Attributes:
        model: diffusers' ``AutoencoderKL``; move it with ``.model.to(device)``.
        config: sizes, shift and scale.
        tiled: whether pictures of more than ``WHOLE_PX`` squared are encoded and decoded in tiles.
    """

    def __init__(self, model: nn.Module, config: AutoencoderConfig, tiled: bool = False) -> None:
        self.model: Any = model
        self.config = config
        self.tiled = tiled
        self._told: set[int | None] = set()

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

        Pictures that do not fit into the device's memory together are encoded one by one.

        Args:
            pixels: (B,3,8H,8W) in [-1, 1].

        Raises:
            torch.OutOfMemoryError: one of them alone does not fit.
        """
        self._cut_into_tiles(TILE_PX if self._asks_for_tiles(pixels.shape, 1) else None)
        return _all_or_one_by_one(self._encode, pixels)

    def _encode(self, pixels: Tensor) -> Tensor:
        mode = self.model.encode(copied_to(pixels, self.device).to(self.dtype)).latent_dist.mode()
        return (mode.float() - self.config.shift_factor) * self.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Returns pixels (B,3,8H,8W) float32, about [-1, 1] but not clamped, from scaled latents (B,C,H,W).

        Pictures that do not fit into the device's memory are decoded one by one, and in tiles where one does not fit.

        Raises:
            torch.OutOfMemoryError: not even a tile fits.
        """
        unscaled = latents.to(self.device, torch.float32) / self.config.scaling_factor + self.config.shift_factor
        unscaled = unscaled.to(self.dtype)
        asked = TILE_PX if self._asks_for_tiles(latents.shape, self._px_per_latent) else None
        longest = max(latents.shape[-2:]) * self._px_per_latent
        for tile in (asked, *(tile for tile in _TILES_PX if tile < (asked or longest))):
            self._cut_into_tiles(tile)
            if tile != asked and tile not in self._told:
                logger.info(
                    "A picture of %dx%d pixels does not fit into the device's memory, so it and others as large are decoded"
                    " in tiles of %d pixels; their colours may differ a little",
                    latents.shape[-1] * self._px_per_latent,
                    latents.shape[-2] * self._px_per_latent,
                    tile,
                )
                self._told.add(tile)
            try:
                return _all_or_one_by_one(lambda some: self.model.decode(some).sample.float(), unscaled)
            except torch.OutOfMemoryError:
                if tile == _TILES_PX[-1] or longest <= _TILES_PX[-1]:
                    raise
        raise RuntimeError("the smallest tile is tried last")

    @property
    def _px_per_latent(self) -> int:
        return 2 ** (len(self.config.block_out_channels) - 1)

    def _asks_for_tiles(self, shape: torch.Size, px: int) -> bool:
        return self.tiled and is_cut(shape[-1] * px, shape[-2] * px)

    def _cut_into_tiles(self, side_px: int | None) -> None:
        """Has diffusers work in tiles of this size, where a picture is longer than one; ``None``: on whole pictures."""
        self.model.use_tiling = side_px is not None
        if side_px is not None:
            self.model.tile_sample_min_size = side_px
            self.model.tile_latent_min_size = side_px // self._px_per_latent


def _all_or_one_by_one(compute: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """Returns ``compute(batch)``, computed one by one where the device's memory is too small for all at a time."""
    if len(batch) > 1:
        try:
            return compute(batch)
        except torch.OutOfMemoryError:
            pass  # out of the handler: an exception that is being handled holds the tensors of its frames
    return torch.cat([compute(one) for one in batch.split(1)])
