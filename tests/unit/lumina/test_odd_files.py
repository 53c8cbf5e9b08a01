"""Odd values in model files' own descriptions of themselves: a message, never a traceback or a hang."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models_helpers import write_tiny_files
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.errors import ModelFileError
from library.lumina.configs import AutoencoderConfig, Gemma2TextConfig
from library.lumina.loading import inspect_models


def _with_config(path: Path, entry: str, **values: Any) -> None:
    """Changes values of the configuration in a file's metadata."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    config = json.loads(metadata[entry])
    save_file(load_file(path), path, {**metadata, entry: json.dumps(config | values)})


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**12},  # would list tensors for hours
        {"num_hidden_layers": -1},
        {"hidden_size": 0},
        {"rms_norm_eps": 0.0},
        {"rope_theta": float("inf")},
        {"rope_parameters": [1]},
        {"hidden_activation": "no_such"},
        {"num_attention_heads": 3, "num_key_value_heads": 2},
        {"head_dim": 7},
    ],
    ids=str,
)
def test_gemma2_values_that_no_model_has(tmp_path: Path, values: dict[str, Any]) -> None:
    paths = write_tiny_files(tmp_path)
    assert paths.gemma2 is not None
    _with_config(paths.gemma2, "config", **values)
    with pytest.raises(ModelFileError) as caught:
        inspect_models(paths)
    assert "--gemma2" in str(caught.value)
    assert "gemma2.safetensors" in str(caught.value)
    assert any(name in str(caught.value) for name in values)


@pytest.mark.parametrize(
    "values",
    [
        {"block_out_channels": []},
        {"block_out_channels": ["wide", 8]},
        {"block_out_channels": [10**9]},
        {"layers_per_block": 10**9},
        {"norm_num_groups": 3},
        {"norm_num_groups": 0},
        {"scaling_factor": 0.0},
    ],
    ids=str,
)
def test_autoencoder_values_that_no_model_has(tmp_path: Path, values: dict[str, Any]) -> None:
    paths = write_tiny_files(tmp_path)
    assert paths.ae is not None
    _with_config(paths.ae, "config", **values)
    with pytest.raises(ModelFileError) as caught:
        inspect_models(paths)
    assert "--ae" in str(caught.value)
    assert next(iter(values)) in str(caught.value)


def test_the_real_models_are_within_the_limits() -> None:
    assert Gemma2TextConfig.from_config({}) == Gemma2TextConfig()
    assert AutoencoderConfig.from_config({}) == AutoencoderConfig()


@pytest.mark.parametrize("scale", [torch.ones(3), torch.ones(0), torch.ones((), dtype=torch.int64)], ids=str)
def test_an_fp8_scale_of_a_wrong_kind_is_named(tmp_path: Path, scale: torch.Tensor) -> None:
    paths = write_tiny_files(tmp_path)
    tensors = load_file(paths.dit)
    name = "layers.0.attention.out.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors["layers.0.attention.out.scale_weight"] = scale
    save_file(tensors, paths.dit)
    with pytest.raises(ModelFileError, match=r"layers\.0\.attention\.out\.scale_weight is"):
        inspect_models(paths)
