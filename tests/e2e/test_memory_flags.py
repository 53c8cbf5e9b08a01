"""Memory flags on a machine without a GPU: accepted, and explained in one warning."""

from pathlib import Path

from e2e_helpers import Job, log_lines, python


def test_streaming_and_offload_on_a_cpu(job: Job, tmp_path: Path) -> None:
    done = python(
        "lumina_train_network.py",
        *job.train_flags(tmp_path, "--network_train_unet_only", "--max_train_epochs=1", "--gradient_checkpointing"),
        "--blocks_to_swap=2",
        "--cpu_offload_checkpointing",
        environment={"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    (warning,) = [line for line in log_lines(done) if "blocks_to_swap" in line]
    assert "--blocks_to_swap and --cpu_offload_checkpointing: no effect on the device cpu" in warning
    assert (tmp_path / "my.safetensors").is_file()


def test_vram_gb_on_a_cpu(job: Job, tmp_path: Path) -> None:
    done = python(
        "lumina_train_network.py",
        *job.train_flags(tmp_path, "--network_train_unet_only", "--max_train_epochs=1", "--vram_gb=6"),
        environment={"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    (warning,) = [line for line in log_lines(done) if "--vram_gb" in line]
    assert "--vram_gb 6: no effect on the device cpu" in warning
    assert (tmp_path / "my.safetensors").is_file()


def test_a_vram_gb_that_is_none(job: Job, tmp_path: Path) -> None:
    done = python("lumina_train_network.py", *job.train_flags(tmp_path, "--vram_gb=8GB"))
    assert done.returncode == 2
    assert "--vram_gb: '8GB' is not valid: the card's memory in GiB, such as 12, or auto is expected" in done.stderr
