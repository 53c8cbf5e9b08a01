"""A converted LoRA in diffusers' own pipeline, live, against ours on the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline
from lora_helpers import fill, small_next_dit
from models_helpers import diffusers_twin

from networks.convert_lumina_lora import main
from networks.lora_lumina import create_network

# Float32 rounding, which a LoRA of this size makes larger than without one: up to 6e-6. A strength that is off by 1 in 1000
# gives 1e-4 to 6e-4.
TOLERANCE = 2e-5

NETWORKS = {
    "all": {},
    "alpha": {"alpha": 1.0},  # alpha / rank is 1 / 4
    "odd alpha": {"alpha": 3.0},  # and here no power of two
    "embedders and other ranks": {"embedder_dims": "[2,3,5]", "refiner_dim": "7", "mod_dim": "2"},
    "attention alone": {"mlp_dim": "0", "mod_dim": "0", "refiner_dim": "0"},
    "split_qkv": {"split_qkv": "true", "mlp_dim": "6"},
}


def pipeline(model, weights) -> Lumina2Pipeline:
    theirs = diffusers_twin(model.config, weights)
    return Lumina2Pipeline(theirs, FlowMatchEulerDiscreteScheduler(), None, None, None)


@pytest.mark.parametrize("name", NETWORKS)
def test_diffusers_draws_with_a_converted_lora_what_we_draw(name: str, tmp_path: Path) -> None:
    model = small_next_dit()
    settings = {"alpha": 4.0} | NETWORKS[name]
    network = create_network(1.0, 4, settings.pop("alpha"), None, None, model, **settings)
    fill(network, size=0.1)
    network.save_weights(tmp_path / "ours.safetensors")
    arguments = [f"--src_path={tmp_path / 'ours.safetensors'}", f"--dst_path={tmp_path / 'theirs.safetensors'}"]
    main([*arguments, "--dst=diffusers"])

    pipe = pipeline(model, {key: tensor.clone() for key, tensor in model.state_dict().items()})
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 16, 10, 6, generator=generator)
    features = torch.randn(2, 9, model.config.cap_dim, generator=generator)
    mask = torch.arange(9) < torch.tensor([9, 4])[:, None]
    time = torch.rand(2, generator=generator)
    with torch.no_grad():
        before = pipe.transformer(latents, time, features, mask, return_dict=False)[0]
        pipe.load_lora_weights(tmp_path, weight_name="theirs.safetensors")
        theirs = pipe.transformer(latents, time, features, mask, return_dict=False)[0]
        network.apply_to(None, model)
        ours = model(latents, time, features, mask)
    size = theirs.abs().max()
    assert float((ours - theirs).abs().max() / size) < TOLERANCE
    assert float((before - theirs).abs().max() / size) > 1000 * TOLERANCE
    used = {key for key in pipe.transformer.state_dict() if "lora_" in key}
    assert len(used) == 2 * sum(3 if "qkv" in lora.lora_name else 1 for lora in network.loras)


@pytest.mark.parametrize("older_names", [False, True], ids=["lora_A", "lora.down"])
def test_what_diffusers_saves_is_converted_with_the_alpha_in_its_metadata(older_names: bool, tmp_path: Path) -> None:
    from diffusers.training_utils import _collate_lora_metadata  # as its training scripts save
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    from networks.lora_lumina import create_network_from_weights

    model = small_next_dit()
    pipe = pipeline(model, {key: tensor.clone() for key, tensor in model.state_dict().items()})
    targets = ["to_q", "to_k", "to_v", "to_out.0", "norm1.linear"]
    pipe.transformer.add_adapter(LoraConfig(r=4, lora_alpha=6, init_lora_weights="gaussian", target_modules=targets))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in pipe.transformer.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    layers = get_peft_model_state_dict(pipe.transformer)
    if older_names:
        layers = convert_state_dict_to_diffusers(layers)
    Lumina2Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=layers,
        weight_name="theirs.safetensors",
        **_collate_lora_metadata({"transformer": pipe.transformer}),
    )
    arguments = [f"--src_path={tmp_path / 'theirs.safetensors'}", f"--dst_path={tmp_path / 'ours.safetensors'}"]
    main([*arguments, "--dst=sd-scripts"])
    network, _ = create_network_from_weights(1.0, tmp_path / "ours.safetensors", None, None, model)
    latents = torch.randn(1, 16, 6, 4, generator=generator)
    features = torch.randn(1, 7, model.config.cap_dim, generator=generator)
    time = torch.rand(1, generator=generator)
    with torch.no_grad():
        theirs = pipe.transformer(latents, time, features, torch.ones(1, 7).bool(), return_dict=False)[0]
        network.apply_to(None, model)
        ours = model(latents, time, features)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < TOLERANCE


def test_without_conversion_diffusers_draws_without_the_lora(tmp_path: Path) -> None:
    """Why there is a converter: our own file changes nothing there, with hardly a word."""
    model = small_next_dit()
    network = create_network(1.0, 4, 4.0, None, None, model)
    fill(network)
    network.save_weights(tmp_path / "o.safetensors")
    pipe = pipeline(model, model.state_dict())
    pipe.load_lora_weights(tmp_path, weight_name="o.safetensors")
    assert not [key for key in pipe.transformer.state_dict() if "lora_" in key]
