"""The example configurations of accelerate, and one that asks for more, each with two CPU processes."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from e2e_helpers import ROOT, Job, free_port, launch, launch_command, log_lines
from safetensors.torch import load_file

CONFIGS = ROOT / "configs" / "accelerate"
ON_CPU = {"ACCELERATE_USE_CPU": "true"}
FSDP = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: "no"
num_machines: 1
num_processes: 2
use_cpu: false
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: SIZE_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
"""


def flags_of(job: Job, output: Path) -> list[str]:
    return job.train_flags(output, "--train_batch_size=1", "--cache_latents", "--cache_text_encoder_outputs")


@pytest.fixture(scope="module")
def trained_on_one_machine(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("one_machine")
    config = str(CONFIGS / "multi_gpu.yaml")
    done = launch("--config_file", config, "lumina_train_network.py", *flags_of(job, output), environment=ON_CPU)
    assert done.returncode == 0, done.stderr
    assert any("Device: cpu, 2 processes" in line for line in log_lines(done))
    return output / "my.safetensors"


def process_of_rank(launcher: int, rank: int) -> int:
    """Returns the id of the launcher's process with this rank."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text(encoding="ascii").split():
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_bytes().decode(errors="replace").split("\0"):
            return int(child)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_was_trained_is_saved_when_another_process_is_killed(job: Job, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [*launch_command(), "--config_file", str(CONFIGS / "multi_gpu.yaml")]
    flags = [*flags_of(job, output), "--max_train_epochs=5000"]
    variables = {**os.environ, **ON_CPU, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "said").open("wb") as said:
        launcher = subprocess.Popen([*command, "lumina_train_network.py", *flags], cwd=ROOT, env=variables, stderr=said)
    try:
        deadline = time.monotonic() + 120
        while b"avr_loss" not in (tmp_path / "said").read_bytes():  # no step has been taken yet
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process_of_rank(launcher.pid, 1), signal.SIGKILL)
        assert launcher.wait(60) != 0
    finally:
        launcher.terminate()
        launcher.wait(60)
    text = (tmp_path / "said").read_text(encoding="utf-8")
    assert "because another process of this run has ended" in text
    (saved,) = output.glob("my-step*.safetensors")
    assert load_file(saved)


def same_tensors(first: Path, second: Path) -> bool:
    a, b = load_file(first), load_file(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_sharding_is_warned_about_and_trains_the_same(job: Job, trained_on_one_machine: Path, tmp_path: Path) -> None:
    config = tmp_path / "fsdp.yaml"
    config.write_text(FSDP, encoding="utf-8")
    output = tmp_path / "out"
    done = launch("--config_file", str(config), "lumina_train_network.py", *flags_of(job, output), environment=ON_CPU)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in log_lines(done) if "accelerate is configured for FSDP, which has no effect" in line]
    assert len(warnings) == 1  # of two processes
    assert same_tensors(output / "my.safetensors", trained_on_one_machine)


def test_two_machines_train_what_one_machine_trains(job: Job, trained_on_one_machine: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    config = ["--config_file", str(CONFIGS / "multi_machine.yaml"), "--num_processes", "2"]
    where = ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]

    def start(machine: int) -> subprocess.CompletedProcess[str]:
        flags = [*config, *where, "--machine_rank", str(machine), "lumina_train_network.py", *flags_of(job, output)]
        return launch(*flags, environment=ON_CPU)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(start, range(2))
    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    assert any("Device: cpu, 2 processes" in line for line in log_lines(first))
    assert log_lines(second) == []  # the first machine speaks for all
    assert same_tensors(output / "my.safetensors", trained_on_one_machine)
