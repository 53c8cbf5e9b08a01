"""Ctrl+C saves what has been trained, and with --save_state all that is needed to go on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from e2e.test_two_processes import ON_CPU, TWO
from e2e_helpers import ROOT, Job, launch, launch_command, python
from resume_helpers import assert_same_files
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send Ctrl+C to one process")


def interrupted(command: list[str], how: signal.Signals, whole_group: bool = False) -> tuple[int, bytes]:
    """Starts a run, stops it when the first steps are done, and returns its exit code and what it said."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(ON_CPU if whole_group else {})},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    seen = b""
    while b"avr_loss" not in seen:
        chunk = os.read(process.stderr.fileno(), 4096)
        assert chunk, seen.decode()
        seen += chunk
    if whole_group:  # as a terminal does
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    _, rest = process.communicate(timeout=120)
    return process.returncode, rest


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves(job: Job, output: Path, how: signal.Signals) -> None:
    flags = job.train_flags(output, "--max_train_epochs=100000", "--network_train_unet_only", "--save_state")
    code, said = interrupted([sys.executable, "-u", "lumina_train_network.py", *flags], how)
    assert code == 130
    assert b"Stopped by the user" in said
    assert b"Traceback" not in said
    (path,) = output.glob("my-step*.safetensors")
    assert load_file(path)
    (state,) = output.glob("*-state")
    assert state.name == f"{path.stem}-state"


def test_ctrl_c_under_a_launcher_that_does_not_wait(job: Job, output: Path) -> None:
    """accelerate's launcher of one process gives it a quarter of a second; the trainer saves all the same."""
    flags = job.train_flags(output, "--max_train_epochs=100000", "--network_train_unet_only", "--save_state")
    one = ["--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    command = [*launch_command(), *one, "lumina_train_network.py", *flags]
    code, said = interrupted(command, signal.SIGINT, whole_group=True)  # all of it is read when both have ended
    assert code != 0
    assert b"Stopped by the user" in said
    assert len(list(output.glob("my-step*-state"))) == 1, said.decode()


@pytest.mark.slow
def test_ctrl_c_in_two_processes_and_resume(job: Job, tmp_path: Path) -> None:
    flags = ["--train_batch_size=1", "--network_train_unet_only", "--save_state", "--shuffle_caption"]
    flags += [
        "--cache_latents_to_disk",
        f"--cache_dir={tmp_path / 'cache'}",
        "--max_train_epochs=40",
        "--resume=latest",
    ]
    command = [*launch_command(), *TWO, "lumina_train_network.py"]
    output = tmp_path / "parts"
    code, said = interrupted([*command, *job.train_flags(output, *flags)], signal.SIGINT, whole_group=True)
    assert code != 0
    assert len(list(output.glob("my-step*-state"))) == 1, said.decode()
    for folder in (output, tmp_path / "whole"):
        done = launch(*TWO, "lumina_train_network.py", *job.train_flags(folder, *flags), environment=ON_CPU)
        assert done.returncode == 0, done.stderr
    assert_same_files(output / "my.safetensors", tmp_path / "whole" / "my.safetensors")


def test_wrong_upload_flags_end_at_once(job: Job, tmp_path: Path) -> None:
    done = python("lumina_train_network.py", *job.train_flags(tmp_path / "out", "--huggingface_repo_id=only-a-name"))
    assert done.returncode == 2
    assert "--huggingface_repo_id: 'only-a-name' is not of the form owner/name" in done.stderr
    done = python("lumina_train_network.py", *job.train_flags(tmp_path / "out", "--resume_from_huggingface"))
    assert done.returncode == 2
    assert "--resume is missing" in done.stderr
    assert not (tmp_path / "out").exists()
