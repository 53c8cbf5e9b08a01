"""Triton's kernels for fp8 without a GPU: they compile for one, and its interpreter computes torch's bits."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_helpers import compiled_for, driver_of, launch_fp8

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the package triton")


def test_results_are_those_of_torch_bit_for_bit() -> None:
    # In a process of its own: that kernels are to be interpreted has to be known when triton is imported.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    program = [sys.executable, str(ROOT / "tests" / "fp8_kernel_helpers.py")]
    ended = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert len(report) > 30
    assert [name for name, same in report.items() if not same] == []


@pytest.mark.parametrize("capability", [89, 90, 100, 120])
def test_kernels_compile_for_gpus_that_multiply_in_fp8(capability: int) -> None:
    """The interpreter lets pass what the compiler does not know."""
    from library.memory import fp8_kernels

    with driver_of(capability) as driver:
        launch_fp8()
        made = list(compiled_for(driver, fp8_kernels))
    assert len(made) == 7
    for name, kernel in made:
        # The conversion that the interpreter test stands in for.
        assert ("cvt.rn.satfinite.e4m3x2" in kernel.asm["ptx"]) == (name == "_quantise")
