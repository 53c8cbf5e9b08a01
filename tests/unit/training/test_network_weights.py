"""Starting from a LoRA file: its strength, its key forms, and the arguments that stay."""

from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_helpers import Job, make_job
from safetensors.torch import load_file, save_file
from trainer_helpers import fill_network, made_trainer

from library.errors import NetworkError

CACHED = ["--cache_latents", "--cache_text_encoder_outputs"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def start(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA file of rank 4 and alpha 16, whatever the flags of the runs that start from it say."""
    folder = tmp_path_factory.mktemp("start")
    trainer = made_trainer(job.train_flags(folder, "--network_alpha=16", *CACHED), last="build_network")
    fill_network(trainer.network)
    trainer.network.save_weights(folder / "start.safetensors", None, {"a": "b"})
    return folder / "start.safetensors"


def losses(trainer: Any) -> torch.Tensor:
    batch = trainer.data.load(trainer.data.plan_epoch(1, 1).batch(0).draws)
    with torch.no_grad():
        return trainer.losses_of(batch).values


@pytest.mark.parametrize("more", [[], ["--dim_from_weights"]], ids=["ranks of the flags", "ranks of the file"])
def test_the_files_alpha_is_used_and_saved(job: Job, tmp_path: Path, start: Path, more: list[str]) -> None:
    """defect 20: the file's alpha was saved, but the scale stayed that of the flags."""
    trainer = made_trainer(job.train_flags(tmp_path, *CACHED, f"--network_weights={start}", *more))
    assert {lora.scale for lora in trainer.network.loras} == {16 / 4}
    # What the model computes is what the file says: merged into the model, it gives the same.
    merged = made_trainer(job.train_flags(tmp_path, *CACHED, "--base_weights", str(start)))
    torch.testing.assert_close(losses(trainer), losses(merged), rtol=1e-4, atol=0)  # order of float32 products
    trainer.network.save_weights(tmp_path / "again.safetensors", None, {})
    expected, found = load_file(start), load_file(tmp_path / "again.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_other_programs_keys_are_taken(job: Job, tmp_path: Path, start: Path) -> None:
    """defect 20: foreign keys were dropped."""
    trainer = made_trainer(job.train_flags(tmp_path, *CACHED, f"--network_weights={start}"))
    paths = {
        lora.lora_name: path
        for path, module in trainer.dit.named_modules()
        for lora in trainer.network.loras
        if module is lora.org_module
    }
    endings = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "alpha": "alpha"}
    foreign = {}
    for key, tensor in load_file(start).items():
        name, _, rest = key.partition(".")
        foreign[f"diffusion_model.{paths[name]}.{endings[rest]}"] = tensor
    save_file(foreign, tmp_path / "foreign.safetensors")
    other = made_trainer(job.train_flags(tmp_path, *CACHED, f"--network_weights={tmp_path / 'foreign.safetensors'}"))
    assert torch.equal(losses(other), losses(trainer))


def test_ranks_of_the_file_keep_the_other_arguments(job: Job, tmp_path: Path, start: Path) -> None:
    """defect 49"""
    arguments = ["--network_args", "rank_dropout=0.2", "module_dropout=0.3", "loraplus_lr_ratio=4"]
    flags = [*CACHED, f"--network_weights={start}", "--dim_from_weights", "--network_dropout=0.1", *arguments]
    trainer = made_trainer(job.train_flags(tmp_path, *flags))
    dropouts = {(lora.dropout, lora.rank_dropout, lora.module_dropout) for lora in trainer.network.loras}
    assert dropouts == {(0.1, 0.2, 0.3)}
    rates = sorted(group["lr"] for group in trainer.optimizer.param_groups)
    assert rates == [1e-3, 4e-3]


def test_a_file_that_does_not_fit_shows_before_anything_is_encoded(job: Job, tmp_path: Path, start: Path) -> None:
    with pytest.raises(NetworkError, match=r"--network_weights: .*--dim_from_weights"):
        made_trainer(
            job.train_flags(tmp_path, *CACHED, f"--network_weights={start}", "--network_dim=8"), last="rehearse_network"
        )
