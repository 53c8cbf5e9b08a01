"""Very small models on disk, shared by tests that load models."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.quickstart.make_models import Models, dit_in_diffusers_names, make_models, write_files
from library.lumina.configs import AutoencoderConfig, Gemma2TextConfig, NextDiTConfig
from library.lumina.loading import ModelPaths


@cache
def tiny_models() -> Models:
    """Returns the tiny models; made once, so do not change their tensors."""
    return make_models("tiny")


def write_tiny_files(folder: Path, dtype: torch.dtype = torch.float32) -> ModelPaths:
    """Writes the tiny models as three files and returns their paths."""
    dit, gemma2, ae = write_files(tiny_models(), folder, dtype, ae_dtype=dtype)
    return ModelPaths(dit=dit, gemma2=gemma2, ae=ae)


def diffusers_twin(config: NextDiTConfig, weights: Mapping[str, Tensor]) -> Any:
    """Returns diffusers' transformer of the same sizes and with the same weights, in eval mode."""
    from diffusers import Lumina2Transformer2DModel

    theirs = Lumina2Transformer2DModel(
        hidden_size=config.dim,
        num_layers=config.num_layers,
        num_refiner_layers=config.num_noise_refiners,
        num_attention_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        axes_dim_rope=(config.head_dim // 3,) * 3,
        cap_feat_dim=config.cap_dim,
    ).eval()
    models = Models(config, Gemma2TextConfig(), AutoencoderConfig(), b"", dit=dict(weights))
    theirs.load_state_dict(dit_in_diffusers_names(models), strict=True)
    return theirs
