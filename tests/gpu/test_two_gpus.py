"""Two GPUs train what one GPU with twice the batch trains, with gradients exchanged by NCCL during backward."""

from pathlib import Path

import pytest
import torch
from e2e_helpers import ROOT, distance, launch, log_lines, make_job, python

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def test_two_gpus_equal_one_with_twice_the_batch(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="the programs need it for the autoencoder")
    job = make_job(tmp_path / "job")
    # Rank 256: enough numbers for more than one bucket.
    flags = ["--network_dim=256", "--network_dropout=0.1", "--gradient_accumulation_steps=2", "--cache_latents"]
    config = str(ROOT / "configs" / "accelerate" / "multi_gpu.yaml")
    two = launch(
        "--config_file",
        config,
        "lumina_train_network.py",
        *job.train_flags(tmp_path / "two", "--train_batch_size=1", *flags),
    )
    assert two.returncode == 0, two.stderr
    assert any(", 2 processes" in line for line in log_lines(two))
    one = python("lumina_train_network.py", *job.train_flags(tmp_path / "one", "--train_batch_size=2", *flags))
    assert one.returncode == 0, one.stderr
    # float32 in another order, and Adam's first steps go by signs; other pictures or weights are more than 1 apart.
    assert distance(tmp_path / "one" / "my.safetensors", tmp_path / "two" / "my.safetensors") < 0.1
