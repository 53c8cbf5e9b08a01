"""What is made of the parts of tests/bench/gpu_all.sh, and the numbers that its models are made of."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.fast_random import NormalNumbers
from bench.gpu_summary import read_parts, summary, targets


def write_part(folder: Path, name: str, output: str, code: int = 0, error: str | None = None) -> None:
    (folder / f"{name}.out").write_text(output, encoding="utf-8")
    (folder / f"{name}.status").write_text(f"{code}\n7\n", encoding="utf-8")
    if error is not None:
        (folder / f"{name}.error").write_text(error, encoding="utf-8")


def test_reached_figures_stand_beside_their_targets(tmp_path: Path) -> None:
    write_part(tmp_path, "step_eager", json.dumps({"mfu": 0.5, "images_per_s": 8.0, "step_s": 0.5}))
    write_part(tmp_path, "step_fp8", json.dumps({"mfu": 0.6, "images_per_s": 10.0}))
    write_part(tmp_path, "memory", json.dumps({"rows": [{"reserved_gib": 4.25}, {"error": "no"}]}), code=1, error="no")
    parts = read_parts(tmp_path)
    found = {what: reached for what, _, reached in targets(parts)}
    assert found["step, 1024 px, batch 4, of the matmul ceiling: eager"] == "50.0% (8.00 images/s)"
    assert found["--fp8_fast over bf16, 1024 px"] == "1.250 x"
    assert found["whole program, fp8, streaming, checkpointing"] == "4.25 GiB"
    assert found["whole program, fp8, checkpointing"] == "not measured"
    assert found["drawing, one batch over two passes, 256 px"] == "not measured"


def test_what_failed_or_was_left_out_says_why(tmp_path: Path) -> None:
    write_part(tmp_path, "tests", "....\n3 failed, 97 passed", code=1, error="one\ntwo | three")
    write_part(tmp_path, "quiet", "....\n3 failed, 97 passed", code=1, error="")
    write_part(tmp_path, "sampling", "", code=124, error="")
    (tmp_path / "step_flash.skipped").write_text("the package flash_attn is missing\n", encoding="utf-8")
    text = summary(read_parts(tmp_path))
    assert "| tests | 7 | failed (1): two / three |" in text
    assert "| quiet | 7 | failed (1): 3 failed, 97 passed |" in text
    assert "| sampling | 7 | failed (124): timed out |" in text
    assert "| step_flash |  | left out: the package flash_attn is missing |" in text


NEEDS_BASH = pytest.mark.skipif(not (shutil.which("bash") and shutil.which("timeout")), reason="it is a bash script")
ROOT = Path(__file__).parents[2]


def run_all(folder: Path, **variables: str) -> tuple[int, dict[str, Any]]:
    """Runs some parts of gpu_all.sh, with a Python that can do nothing but put results together."""
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$1" in *gpu_summary.py) exec {sys.executable} "$@" ;; esac\necho broken >&2\nexit 3\n',
        "utf-8",
    )
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "WHEELS": str(folder / "none"), **variables}
    command = ["bash", "tests/bench/gpu_all.sh", str(folder / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, json.loads((folder / "out" / "results.json").read_text("utf-8"))


@NEEDS_BASH
def test_steps_that_could_not_begin_are_failures(tmp_path: Path) -> None:
    code, parts = run_all(tmp_path, ONLY="step_fp8 step_compiled")
    assert code == 1
    for name in ("step_fp8", "step_compiled"):
        assert (parts[name]["exit_code"], parts[name]["error"]) == (3, "broken\n")
    assert "step_eager" not in parts
    assert not (tmp_path / "out" / "memory_table.json").exists()  # nothing was measured


@NEEDS_BASH
def test_steps_for_which_no_time_is_left_say_so(tmp_path: Path) -> None:
    _, parts = run_all(tmp_path, ONLY="step_fp8 step_compiled sampling", BUDGET_S="0")
    for name in ("step_fp8", "step_compiled", "sampling"):
        assert parts[name] == {"skipped": "no time was left of 0 s"}


def test_numbers_are_normal_and_differ_between_tensors() -> None:
    numbers = NormalNumbers(2**16)
    first, second = (numbers.take(100_000, 0.5, torch.float32) for _ in range(2))  # more than were drawn
    for taken in (first, second):
        assert abs(float(taken.std()) - 0.5) < 0.01  # three standard errors of 65,536 draws are 0.004
        assert abs(float(taken.mean())) < 0.01
    assert not torch.equal(first, second)
    assert torch.equal(first, NormalNumbers(2**16).take(100_000, 0.5, torch.float32))
