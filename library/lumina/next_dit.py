"""Next-DiT, the transformer of Lumina Image 2.0: noisy latents, time and caption features in, velocity out.

This file is the model's mathematics and nothing else: no devices, no flags, no backend choice. Module and parameter
names are those of the original checkpoint (``layers.0.attention.qkv.weight`` ...), so its files load without renaming;
classes are called as in the reference program, because network modules of others look for parts of the model by class.

Tokens are laid out as [image | caption | padding]. Joint attention is bidirectional and every token carries its
position explicitly in RoPE, so the order is free; this one makes every slice a constant, also where captions differ in
length. Nothing in a forward pass waits for the device, and there is no attention mask unless the caller gives a
caption mask.

Source: Lumina-Image 2.0 (https://arxiv.org/abs/2503.21758) and its reference program, Alpha-VLLM/Lumina-Image-2.0.

Shapes: B batch, C latent channels (16), H W latent height and width (pixels / 8), N image tokens (H/2 * W/2),
L caption tokens, S = N + L, D width (2304), A heads (24), K key/value heads (8), E head dim (96), T time width (1024).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.lumina.configs import PATCH_SIZE, ROPE_AXES, TIME_FREQUENCIES, NextDiTConfig
from library.lumina.elementwise import queries_keys_values, scaled_norm, swiglu

__all__ = ["BLOCKS", "LARGE_MATRICES", "AttentionFn", "NextDiT", "NextDiTConfig", "plain_attention"]

BLOCKS = r"(?:noise_refiner|context_refiner|layers)\.\d+"
"""Pattern of the blocks' paths."""
LARGE_MATRICES = ("attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
"""Paths within a block of the matrices that hold nearly all its weights."""

ROPE_THETA = 10000.0
NORM_EPS = 1e-5
QK_NORM_EPS = (
    1e-6  # the reference's default for these two; its recorded outputs agree with 1e-6 ten times closer than 1e-5
)
FINAL_NORM_EPS = 1e-6

# q (B,S,A,E), k and v (B,S,K,E), key mask (B,S) bool with True = real token, a sample's real
# tokens first, or None = no padding -> (B,S,A,E). One with a method ``of_scaled_queries`` of the same arguments is given
# queries that carry 1 / sqrt(E): float32 arithmetic rounds them once, where scaling them later would round them twice.
AttentionFn = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """Returns softmax(q k' / sqrt(E)) v by PyTorch's own kernel: (B,S,A,E); see ``AttentionFn`` for the shapes."""
    mask = None if key_mask is None else key_mask[:, None, None, :]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""

    def __init__(self, size: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Returns the normalised ``x``, same shape and dtype, times 1 + ``scale`` (B,1,D) float32."""
        factor = self.weight.float() if scale is None else self.weight * (1 + scale)
        return scaled_norm(x, factor, self.eps)

    def added_to(self, residual: Tensor, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Returns ``residual`` (B,S,D) plus the normalised ``x``, times ``gate`` (B,1,D) float32."""
        return scaled_norm(x, self.weight.float() if gate is None else self.weight * gate, self.eps, residual)


class TimestepEmbedder(nn.Module):
    """lumina_time -> sinusoid -> two-layer MLP."""

    def __init__(self, time_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_FREQUENCIES, time_dim),
            nn.SiLU(),
            nn.Linear(time_dim, time_dim),
        )

    def forward(self, lumina_time: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the time embedding (B,T) in ``dtype``; ``lumina_time`` (B,) in [0, 1], the sinusoid is float32."""
        half = TIME_FREQUENCIES // 2
        index = torch.arange(half, dtype=torch.float32, device=lumina_time.device)
        angles = lumina_time.float()[:, None] * torch.exp(-math.log(10000.0) / half * index)  # (B,128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))


def rope_angles(positions: Tensor, head_dim: int) -> Tensor:
    """Returns the rotation angle of every pair of head channels.

    Args:
        positions: (..., 3) float32, the token's position on each axis.
        head_dim: E; each axis turns E/3 channels, that is E/6 pairs.

    Returns:
        (..., E/2) float32.
    """
    per_axis = head_dim // ROPE_AXES
    exponent = torch.arange(0, per_axis, 2, dtype=torch.float32, device=positions.device) / per_axis
    frequencies = torch.exp(-math.log(ROPE_THETA) * exponent)  # (E/6,)
    return (positions[..., None] * frequencies).flatten(-2)


def rope_table(caption_lengths: Tensor, length: int, rows: int, columns: int, head_dim: int) -> Tensor:
    """Returns cosine and sine of every pair of head channels, for all tokens in the order [image | caption].

    Caption token i stands at (i, 0, 0); the image's tokens at (length of their own caption, row, column).

    Args:
        caption_lengths: (B,) or (1,) real caption tokens of each sample.
        length: L, padded caption length.
        rows: H/2.
        columns: W/2.
        head_dim: E.

    Returns:
        (B or 1, N + L, 1, E/2, 2) float32.
    """
    device = caption_lengths.device
    batch = caption_lengths.shape[0]
    row = torch.arange(rows, dtype=torch.float32, device=device)[:, None].expand(rows, columns)
    column = torch.arange(columns, dtype=torch.float32, device=device)[None, :].expand(rows, columns)
    behind_caption = caption_lengths.float()[:, None].expand(batch, rows * columns)
    image = torch.stack(
        [behind_caption, row.reshape(1, -1).expand(batch, -1), column.reshape(1, -1).expand(batch, -1)], dim=-1
    )
    index = torch.arange(length, dtype=torch.float32, device=device)
    caption = torch.stack([index, torch.zeros_like(index), torch.zeros_like(index)], dim=-1)
    positions = torch.cat([image, caption.expand(batch, length, ROPE_AXES)], dim=1)  # (B,S,3)
    angles = rope_angles(positions, head_dim)[:, :, None, :]  # (B,S,1,E/2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


class JointAttention(nn.Module):
    """Grouped-query self-attention with normalised queries and keys and rotary positions."""

    def __init__(self, config: NextDiTConfig, attention: AttentionFn) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.attention = getattr(attention, "of_scaled_queries", attention)
        self.scales_queries = self.attention is not attention
        query_dim = config.num_heads * config.head_dim
        self.qkv = nn.Linear(config.dim, query_dim + 2 * config.num_kv_heads * config.head_dim, bias=False)
        self.out = nn.Linear(query_dim, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim, QK_NORM_EPS)
        self.k_norm = RMSNorm(config.head_dim, QK_NORM_EPS)

    def forward(self, x: Tensor, rope: Tensor, key_mask: Tensor | None) -> Tensor:
        """Returns (B,S,D) from ``x`` (B,S,D), ``rope`` (B or 1,S,1,E/2,2) and ``key_mask`` (B,S) bool or None."""
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (B,S,A+2K,E)
        q_weight = self.q_norm.weight.float() * self.head_dim**-0.5 if self.scales_queries else self.q_norm.weight
        q, k, v = queries_keys_values(qkv, self.num_heads, q_weight, self.k_norm.weight, rope, self.q_norm.eps)
        return self.out(self.attention(q, k, v, key_mask).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x).

    Attributes:
        SAME_INPUT: names of Linears that are given the same tensor, one right after the other.
    """

    SAME_INPUT = ("w1", "w3")

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, ffn_dim, bias=False)
        self.w2 = nn.Linear(ffn_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B,S,D) from (B,S,D)."""
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class JointTransformerBlock(nn.Module):
    """Attention and feed-forward, each between two norms; time scales their inputs and gates their outputs.

    Context refiner blocks see captions alone and have no ``adaLN_modulation``.
    """

    def __init__(self, config: NextDiTConfig, attention: AttentionFn, modulated: bool) -> None:
        super().__init__()
        self.attention = JointAttention(config, attention)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim)
        self.attention_norm1 = RMSNorm(config.dim)
        self.attention_norm2 = RMSNorm(config.dim)
        self.ffn_norm1 = RMSNorm(config.dim)
        self.ffn_norm2 = RMSNorm(config.dim)
        self.modulated = modulated
        if modulated:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.time_dim, 4 * config.dim))

    def forward(self, x: Tensor, rope: Tensor, key_mask: Tensor | None, time: Tensor | None) -> Tensor:
        """Returns the block's output.

        Args:
            x: (B,S,D).
            rope: (B or 1,S,1,E/2,2) float32.
            key_mask: (B,S) bool, True = real token; None = no padding.
            time: (B,T) silu of the time embedding; None for a block without modulation.
        """
        if not self.modulated:
            x = self.attention_norm2.added_to(x, self.attention(self.attention_norm1(x), rope, key_mask))
            return self.ffn_norm2.added_to(x, self.feed_forward(self.ffn_norm1(x)))
        modulation = self.adaLN_modulation[1](time)[:, None].float()  # (B,1,4D)
        attention_scale, attention_gate, ffn_scale, ffn_gate = modulation.chunk(4, dim=-1)
        attended = self.attention(self.attention_norm1(x, attention_scale), rope, key_mask)
        x = self.attention_norm2.added_to(x, attended, attention_gate.tanh())
        fed = self.feed_forward(self.ffn_norm1(x, ffn_scale))
        return self.ffn_norm2.added_to(x, fed, ffn_gate.tanh())


class FinalLayer(nn.Module):
    """Layer norm without weights, scaled by time, and the projection to patches."""

    def __init__(self, config: NextDiTConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.dim, PATCH_SIZE**2 * config.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.time_dim, config.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Returns patches (B,N,4C) from ``x`` (B,N,D) and ``time`` (B,T), the silu of the time embedding."""
        scale = self.adaLN_modulation[1](time)[:, None]  # (B,1,D)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=FINAL_NORM_EPS) * (1 + scale))


class NextDiT(nn.Module):
    """Predicts the velocity (clean latents minus noise) of noisy latents, given the time and a caption."""

    def __init__(self, config: NextDiTConfig, attention: AttentionFn = plain_attention) -> None:
        """Builds the model with random weights.

        Args:
            config: sizes.
            attention: how attention is computed; see ``AttentionFn``.
        """
        super().__init__()
        self.config = config
        self.x_embedder = nn.Linear(PATCH_SIZE**2 * config.channels, config.dim)
        self.t_embedder = TimestepEmbedder(config.time_dim)
        self.cap_embedder = nn.Sequential(RMSNorm(config.cap_dim), nn.Linear(config.cap_dim, config.dim))
        self.noise_refiner = _blocks(config, attention, config.num_noise_refiners, modulated=True)
        self.context_refiner = _blocks(config, attention, config.num_context_refiners, modulated=False)
        self.layers = _blocks(config, attention, config.num_layers, modulated=True)
        # Unused, as in the reference program; but part of every checkpoint, and other programs miss it when it is gone.
        self.norm_final = RMSNorm(config.dim)
        self.final_layer = FinalLayer(config)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream: that of the norms' weights, which are never quantised."""
        return self.norm_final.weight.dtype

    def forward(
        self, latents: Tensor, lumina_time: Tensor, caption_features: Tensor, caption_mask: Tensor | None = None
    ) -> Tensor:
        """Returns the velocity (B,C,H,W) in the model's dtype.

        Args:
            latents: (B,C,H,W) noisy latents, H and W even.
            lumina_time: (B,) float32 in [0, 1], 0 = noise, 1 = image.
            caption_features: (B,L,cap_dim), real tokens first.
            caption_mask: (B,L) bool, True = real token; None = no padding, which is faster.
        """
        height, width = latents.shape[-2:]
        rows, columns, length = height // PATCH_SIZE, width // PATCH_SIZE, caption_features.shape[1]
        num_image = rows * columns
        if caption_mask is None:
            lengths = torch.full((1,), length, device=latents.device)
            key_mask = None
        else:
            lengths = caption_mask.sum(dim=1)
            key_mask = F.pad(caption_mask, (num_image, 0), value=True)  # (B,S)
        rope = rope_table(lengths, length, rows, columns, self.config.head_dim)
        # Copies: a view's strides would tell compiled blocks apart that are otherwise the same.
        image_rope, caption_rope = rope[:, :num_image].clone(), rope[:, num_image:].clone()

        time = F.silu(self.t_embedder(lumina_time, self.dtype))  # (B,T); once instead of first in every modulation
        image = self.x_embedder(patchify(latents).to(self.dtype))  # (B,N,D)
        for block in self.noise_refiner:
            image = block(image, image_rope, None, time)
        caption = self.cap_embedder(caption_features.to(self.dtype))  # (B,L,D)
        for block in self.context_refiner:
            caption = block(caption, caption_rope, caption_mask, None)
        x = torch.cat([image, caption], dim=1)  # (B,S,D)
        for block in self.layers:
            x = block(x, rope, key_mask, time)
        return unpatchify(self.final_layer(x[:, :num_image], time), rows, columns)


def _blocks(config: NextDiTConfig, attention: AttentionFn, count: int, modulated: bool) -> nn.ModuleList:
    return nn.ModuleList(JointTransformerBlock(config, attention, modulated) for _ in range(count))


def patchify(latents: Tensor) -> Tensor:
    """Returns 2x2 patches (B,N,4C) of latents (B,C,H,W); a patch's order is row, column, channel.

    Raises:
        ValueError: height or width is odd.
    """
    height, width = latents.shape[-2:]
    if height % PATCH_SIZE or width % PATCH_SIZE:
        raise ValueError(f"latents of {height} x {width} cannot be cut into patches of {PATCH_SIZE} x {PATCH_SIZE}")
    patches = latents.unflatten(3, (-1, PATCH_SIZE)).unflatten(2, (-1, PATCH_SIZE))  # (B,C,H/2,2,W/2,2)
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, rows: int, columns: int) -> Tensor:
    """Returns (B,C,H,W) from patches (B,N,4C); the inverse of :func:`patchify`."""
    grid = patches.unflatten(1, (rows, columns)).unflatten(3, (PATCH_SIZE, PATCH_SIZE, -1))  # (B,H/2,W/2,2,2,C)
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
