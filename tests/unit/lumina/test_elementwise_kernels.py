"""Triton's kernels in its interpreter, on the CPU, against float64. In fp16: the interpreter cuts bf16 off."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")


@pytest.fixture(scope="module")
def report() -> dict[str, list[tuple[float, float]]]:
    """Runs in a process of its own: that kernels are to be interpreted has to be known when triton is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    program = [sys.executable, str(ROOT / "tests" / "elementwise_helpers.py")]
    ended = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_results_and_gradients_are_rounded_no_more_than_they_have_to_be(
    report: dict[str, list[tuple[float, float]]],
) -> None:
    assert len(report) > 10
    for name, results in report.items():
        assert len(results) > 1
        for off, allowed in results:
            assert off < allowed, name
