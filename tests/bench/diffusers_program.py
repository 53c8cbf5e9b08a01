"""A training step as programs make it that build on diffusers' transformer with adapters of the package peft.

That is diffusers' own LoRA script for this model, and the core of other trainers. It stands here so that ``bench_step.py``
can time it beside ours on the same machine: the same sizes, random batches, rank and matrices, autocast and optimizer of
that script. It is made as fast as such a script allows: captions are not padded to 256 tokens, so that diffusers masks
nothing but in the caption's refiner where they are of one length. peft names queries, keys and values apart, so it trains a
tenth more numbers beside the same matrices.

Needs ``pip install peft``; nothing else of this project does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import presets
import torch
from our_program import RANK
from torch import Tensor, nn

from library.data.items import Batch
from library.lumina.next_dit import BLOCKS, LARGE_MATRICES, NextDiT

FLAGS = ("--gradient_checkpointing", "--torch_compile")
_MATRICES = (
    r"(layers|noise_refiner|context_refiner)\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.linear_[123])"
    r"|norm_out\.linear_2"
)


class DiffusersProgram:
    """A step of such a program; the attributes are those of ``our_program.OurProgram``."""

    def __init__(self, preset: str, precision: str, more: Sequence[str]) -> None:
        """Makes the model with its adapters and the optimizer.

        Args:
            preset: of the model.
            precision: bf16 or fp32.
            more: of ``FLAGS``.

        Raises:
            SystemExit: a flag is none of ``FLAGS``, or a package is missing.
        """
        if unknown := set(more) - set(FLAGS):
            raise SystemExit(f"--program=diffusers knows {' and '.join(FLAGS)}, not {' '.join(sorted(unknown))}")
        from accelerate import Accelerator

        if precision == "fp16":
            raise SystemExit("diffusers' transformer has no fp16 to compare with: it overflows; give bf16 or fp32")
        accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision)
        self.device: torch.device = accelerator.device
        self.checkpointing = FLAGS[0] in more
        self._sizes = presets.config(preset)
        self._dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        model = _with_adapters(_random_model(preset, self.device, self._dtype))
        if self.checkpointing:
            model.enable_gradient_checkpointing()
        if FLAGS[1] in more:
            for block in (*model.noise_refiner, *model.context_refiner, *model.layers):
                block.compile()
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(self._trained, lr=1e-4)
        self._accelerator = accelerator
        self.model: nn.Module = model
        self._model, self._optimizer = accelerator.prepare(model.train(), optimizer)

    def step(self, batch: Batch, number: int) -> float:
        """Trains one step and returns its loss; ``number`` plays no part."""
        latents, features, mask = (part.to(self.device) for part in _tensors(batch))
        clean, text = latents.to(self._dtype), features.to(self._dtype)
        noise, time = torch.randn_like(clean), torch.randn(clean.shape[0], device=self.device).sigmoid()
        share = time[:, None, None, None].to(clean.dtype)
        noisy = (1 - share) * noise + share * clean
        velocity = self._model(noisy, time, text, mask, return_dict=False)[0]
        loss = (velocity.float() - (clean - noise).float()).square().mean()
        self._accelerator.backward(loss)
        self._accelerator.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())

    def ranks(self) -> dict[str, int]:
        """Returns the LoRA's rank beside each Linear, by our names: the operations that are counted are the same."""
        with torch.device("meta"):
            names = [name for name, module in NextDiT(self._sizes).named_modules() if isinstance(module, nn.Linear)]
        matrices = "|".join(map(re.escape, LARGE_MATRICES))
        return {name: RANK for name in names if re.fullmatch(rf"{BLOCKS}\.(?:{matrices})|final_layer\.linear", name)}


def _tensors(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Returns latents (B,C,h,w), text features (B,L,cap_dim) with zeros behind short ones, and their mask (B,L)."""
    latents, text = batch.latents, batch.text
    if latents is None or text is None:
        raise ValueError("a batch of cached latents and text features is needed")
    lengths = torch.tensor([len(features) for features in text])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return latents, nn.utils.rnn.pad_sequence(list(text), batch_first=True), mask


def _random_model(preset: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Returns diffusers' transformer of a preset's sizes, frozen, with random weights that keep activations near 1."""
    from diffusers.models.transformers.transformer_lumina2 import Lumina2Transformer2DModel

    sizes = presets.config(preset)
    with device:
        model = Lumina2Transformer2DModel(
            hidden_size=sizes.dim,
            num_layers=sizes.num_layers,
            num_refiner_layers=sizes.num_noise_refiners,
            num_attention_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            axes_dim_rope=(sizes.head_dim // 3,) * 3,
            cap_feat_dim=sizes.cap_dim,
        )
    model.requires_grad_(False).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


def _with_adapters(model: Any) -> Any:
    """Adds a LoRA beside each large matrix of the blocks and the last one of all, as ours has by default."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise SystemExit("--program=diffusers needs the package peft: pip install peft") from error
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=_MATRICES))
    return model
