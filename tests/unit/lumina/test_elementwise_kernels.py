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


NORM = {"D": 2304, "HEAD": 2048, "TAIL": 256}
HEADS = {"A": 24, "K": 8, "E": 96, "NUM": 8, "WIDE": 128}
INTEGERS = {"tokens", "own", "units"}


TINY_NORM = {"D": 48, "HEAD": 32, "TAIL": 16}
TINY_HEADS = {"A": 2, "K": 1, "E": 24, "NUM": 2, "WIDE": 32}


def compiled(name: str, constants: dict[str, Any], half: str, capability: int) -> Any:
    """Returns what Triton makes of a kernel for tensors at multiples of 16 bytes, as all of the model's are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from library.lumina import elementwise_kernels

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument in INTEGERS:
            return "i32"
        return {"eps": "fp32", "factor": "*fp32", "rope": "*fp32", "of_factor": "*fp32"}.get(argument, f"*{half}")

    kernel = getattr(elementwise_kernels, name)
    kinds = {argument: kind(argument) for argument in kernel.arg_names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, one in enumerate(kinds.values()) if one.startswith("*")}
    return triton.compile(ASTSource(kernel, kinds, constants, aligned), target=GPUTarget("cuda", capability, 32))


@pytest.mark.parametrize("half", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("norm_forward", {**NORM, "ADDS": True}),
        ("norm_backward", {**NORM, "ROWS": 1, "SUMS": False}),
        ("norm_backward", {**NORM, "ROWS": 8, "SUMS": True}),
        ("rotate_forward", HEADS),
        ("rotate_backward", HEADS),
        ("swiglu_forward", {"UNIT": 16, "BLOCK": 2048}),
        ("swiglu_backward", {"UNIT": 16, "BLOCK": 2048}),
    ],
)
def test_kernels_compile_for_a_gpu(name: str, constants: dict[str, Any], half: str) -> None:
    """The interpreter lets pass what the compiler does not know."""
    made = compiled(name, constants, half, 90)
    assert made.asm["cubin"]
    # 16 bytes at a time, each way: what a compiler does only as far as it knows that addresses are multiples of that.
    assert "ld.global.v4.b32" in made.asm["ptx"] or "cp.async.cg" in made.asm["ptx"]
    assert "st.global.v4.b32" in made.asm["ptx"]


@pytest.mark.parametrize("capability", [75, 80, 120])
@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("norm_backward", {**NORM, "ROWS": 8, "SUMS": True}),  # what it reads ahead is another code before 80
        ("norm_backward", {**TINY_NORM, "ROWS": 4, "SUMS": True}),
        ("rotate_backward", TINY_HEADS),
        ("swiglu_backward", {"UNIT": 1, "BLOCK": 2048}),
    ],
)
def test_kernels_compile_for_other_gpus_and_sizes(name: str, constants: dict[str, Any], capability: int) -> None:
    """Those of the tests' small models, narrower than a warp or a vector of a load."""
    assert compiled(name, constants, "bf16", capability).asm["cubin"]
