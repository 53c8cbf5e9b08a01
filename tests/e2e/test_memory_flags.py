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
