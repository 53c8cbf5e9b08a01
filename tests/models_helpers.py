"""Very small models on disk, shared by tests that load models."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from configs.quickstart.make_models import Models, make_models, write_files
from library.lumina.loading import ModelPaths


@cache
def tiny_models() -> Models:
    """Returns the tiny models; made once, so do not change their tensors."""
    return make_models("tiny")


def write_tiny_files(folder: Path, dtype: torch.dtype = torch.float32) -> ModelPaths:
    """Writes the tiny models as three files and returns their paths."""
    dit, gemma2, ae = write_files(tiny_models(), folder, dtype, ae_dtype=dtype)
    return ModelPaths(dit=dit, gemma2=gemma2, ae=ae)
