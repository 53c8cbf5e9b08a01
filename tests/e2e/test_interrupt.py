"""Ctrl+C saves what has been trained."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from e2e_helpers import ROOT, Job
from safetensors.torch import load_file


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send Ctrl+C to one process")
def test_ctrl_c_saves(job: Job, output: Path) -> None:
    flags = job.train_flags(output, "--max_train_epochs=100000", "--network_train_unet_only")
    process = subprocess.Popen(
        [sys.executable, "-u", "lumina_train_network.py", *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    seen = b""
    while b"avr_loss" not in seen:
        chunk = os.read(process.stderr.fileno(), 4096)
        assert chunk, seen.decode()
        seen += chunk
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Stopped by the user" in rest
    assert b"Traceback" not in rest
    (path,) = output.glob("my-step*.safetensors")
    assert load_file(path)
