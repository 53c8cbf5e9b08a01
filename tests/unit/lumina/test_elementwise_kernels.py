"""Triton's kernels without a GPU: they compile for one, and its interpreter computes what float64 gives.

In fp16, as the interpreter cuts bf16 off where a GPU rounds.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import elementwise_helpers
import pytest
import torch
from kernel_helpers import compiled_for, driver_of, launch_elementwise, model_cases

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


def compiled(cases: list[elementwise_helpers.Case], capability: int) -> list[tuple[str, Any]]:
    """Returns what Triton makes of the kernels that cases launch."""
    from library.lumina import elementwise_kernels

    with driver_of(capability) as driver:
        launch_elementwise(*cases)
        return list(compiled_for(driver, elementwise_kernels))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_kernels_compile_for_a_gpu(half: torch.dtype) -> None:
    """The interpreter lets pass what the compiler does not know."""
    made = compiled(model_cases(half), 90)
    assert len(made) == 9
    for name, kernel in made:
        # 16 bytes at a time, each way: what a compiler does only as far as it knows that addresses are multiples of that.
        # (Two warps with a factor's sums read only what is float32 so: of the halves each lane has 8 bytes.)
        assert "ld.global.v4.b32" in kernel.asm["ptx"] or "cp.async.cg" in kernel.asm["ptx"], name
        assert "st.global.v4.b32" in kernel.asm["ptx"], name


@pytest.mark.parametrize("capability", [75, 80, 120])
def test_kernels_compile_for_other_gpus_and_sizes(capability: int) -> None:
    """Those of the tests' small models, narrower than a warp or a vector of a load; before 80 some is another code."""
    half = torch.bfloat16
    small = [
        elementwise_helpers.norm(2, 3, 48, "of a sample", True, half),
        elementwise_helpers.rotation(2, 3, 2, 1, 24, 1, half)._replace(num_trained=1),
        elementwise_helpers.gated(half, 1, 3, 701),
    ]
    assert len(compiled([*model_cases(half), *small], capability)) == 15
