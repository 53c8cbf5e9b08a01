"""A run that is killed again and again, at any moment, ends with what a run gives that was never killed."""

import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from e2e_helpers import ROOT, Job
from resume_helpers import assert_same_files, metadata

NUM_KILLS = 20
NUM_STEPS = 300  # more than a quick machine makes in all the time between start and kill

# Runs the training program and kills it at the nth operation on files that a save consists of.
_KILLED_WHILE_SAVING = """
import os, pathlib, shutil, signal, sys
import lumina_train_network
from library import console, files

left = int(sys.argv.pop(1))

def counted(function):
    def wrapper(*args, **kwargs):
        global left
        if lumina_train_network.training:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapper

for owner, name in (
    (pathlib.Path, "replace"), (pathlib.Path, "unlink"), (pathlib.Path, "rmdir"), (shutil, "rmtree"), (os, "rmdir"),
    (os, "unlink"), (os, "fsync"), (files, "write_safetensors"), (files, "write_json"),
):
    setattr(owner, name, counted(getattr(owner, name)))
lumina_train_network.training = False
run_epochs = lumina_train_network.LuminaNetworkTrainer.run_epochs

def noted(self):
    lumina_train_network.training = True
    run_epochs(self)

lumina_train_network.LuminaNetworkTrainer.run_epochs = noted
console.run_program(lumina_train_network.main)
"""


def kill_after(command: list[str], delay_s: float) -> int:
    """Starts a run, kills it some time after its first step began, and returns its exit code."""
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    assert process.stderr is not None
    seen = b""
    limit = time.monotonic() + 120
    while b"steps:" not in seen:
        assert time.monotonic() < limit, seen.decode()
        if select.select([process.stderr], [], [], 1)[0]:
            chunk = os.read(process.stderr.fileno(), 65536)
            assert chunk, seen.decode()
            seen += chunk
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killed_twenty_times(job: Job, tmp_path: Path) -> None:
    flags = [
        "--cache_latents_to_disk",
        "--cache_text_encoder_outputs_to_disk",
        f"--cache_dir={tmp_path / 'cache'}",
        "--shuffle_caption",
        "--caption_dropout_rate=0.2",
        "--flip_aug",
        "--network_dropout=0.1",
        "--gradient_accumulation_steps=2",
        "--max_data_loader_n_workers=3",
        "--lr_scheduler=cosine",
        "--ema_decay=0.9",
        "--save_state",
        "--save_every_n_steps=1",
        "--save_last_n_steps=2",
        "--save_every_n_epochs=2",
        "--save_last_n_epochs=1",
        "--resume=latest",
    ]
    base = [
        flag
        for flag in job.train_flags(tmp_path, *flags)
        if not flag.startswith(("--max_train_epochs", "--output_dir"))
    ]
    base.append(f"--max_train_steps={NUM_STEPS}")
    plain = [sys.executable, "-u", "lumina_train_network.py", *base]

    def finish(folder: Path) -> str:
        done = subprocess.run(
            [*plain, f"--output_dir={folder}"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    draw = random.Random(11)
    killed = tmp_path / "killed"
    for number in range(NUM_KILLS):
        if number % 2:
            command = [*plain, f"--output_dir={killed}"]
            code = kill_after(command, draw.uniform(0, 1))
        else:
            wrapper = [sys.executable, "-u", "-c", _KILLED_WHILE_SAVING, str(draw.randint(1, 120))]
            done = subprocess.run(
                [*wrapper, *base, f"--output_dir={killed}"], cwd=ROOT, capture_output=True, timeout=300, check=False
            )
            code = done.returncode
        assert code == -signal.SIGKILL, "the run ended before it was killed: make it longer"
        states = sorted(path.name for path in killed.glob("*-state")) if killed.exists() else []
        print(f"killed {number + 1}: states {states}, {len(list(killed.glob('.*')))} leftovers")
    log = finish(killed)
    print(log[-1500:])
    finish(tmp_path / "whole")
    for file in ("my.safetensors", "my-ema.safetensors"):
        assert_same_files(tmp_path / "whole" / file, killed / file)
    assert metadata(killed / "my.safetensors")["ss_steps"] == str(NUM_STEPS)
    for part in ("memory.safetensors", "network.safetensors"):
        # The optimizer's memory and the weights; torch's random numbers are not used.
        assert_equal_tensors(tmp_path / "whole" / "my-state" / part, killed / "my-state" / part)
    # Nothing half-written is left, and states are rotated although none of the runs saw them all.
    assert list(killed.glob(".*")) == []
    assert {path.name for path in killed.glob("*-state")} == {
        path.name for path in (tmp_path / "whole").glob("*-state")
    }


def assert_equal_tensors(first: Path, second: Path) -> None:
    import torch
    from safetensors.torch import load_file

    a, b = load_file(first), load_file(second)
    assert a.keys() == b.keys()
    assert [name for name in a if "random" not in name and not torch.equal(a[name], b[name])] == []
