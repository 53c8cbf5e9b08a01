"""The LoRA against the reference program's recorded numbers: output, loss, gradients and file hashes."""

from pathlib import Path

import pytest
import torch
from lora_helpers import GOLDEN, cases, largest_relative_difference, metadata_of, small_next_dit, velocity
from safetensors.torch import load_file

from networks.lora_lumina import create_network_from_weights

# Recorded in float32 by other arithmetic (complex128 RoPE, another token order): rounding alone gives about 1e-5.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def trained():
    model, recorded = small_next_dit(), cases()
    network, _ = create_network_from_weights(1.0, GOLDEN / "lora.safetensors", None, None, model)
    network.apply_to(None, model)
    network.requires_grad_(True)
    found = velocity(model, recorded)
    loss = torch.nn.functional.mse_loss(found, recorded["lora.target"])
    loss.backward()
    return network, recorded, found.detach(), loss.detach()


def test_output_and_loss_equal_the_recorded_ones(trained):
    _, recorded, found, loss = trained
    assert largest_relative_difference(found, recorded["lora.velocity"]) < TOLERANCE
    assert largest_relative_difference(loss, recorded["lora.loss"]) < TOLERANCE
    # The LoRA matters: without it the recorded output differs by far more than the tolerance.
    assert largest_relative_difference(recorded["ragged.velocity"], recorded["lora.velocity"]) > 100 * TOLERANCE


def test_every_gradient_equals_the_recorded_one(trained):
    network = trained[0]
    expected = load_file(GOLDEN / "lora_grads.safetensors")
    found = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert set(found) == set(expected)
    worst = max((largest_relative_difference(found[name], expected[name]), name) for name in expected)
    assert worst[0] < TOLERANCE, worst


def test_saved_again_the_file_has_the_reference_hashes_keys_and_metadata(trained, tmp_path: Path):
    network = trained[0]
    recorded = metadata_of(GOLDEN / "lora.safetensors")
    given = {name: text for name, text in recorded.items() if not name.startswith("sshs_")}
    network.save_weights(tmp_path / "again.safetensors", None, given)
    assert metadata_of(tmp_path / "again.safetensors") == recorded
    again, original = load_file(tmp_path / "again.safetensors"), load_file(GOLDEN / "lora.safetensors")
    assert set(again) == set(original)
    assert all(torch.equal(again[name], original[name]) and again[name].shape == original[name].shape for name in again)
