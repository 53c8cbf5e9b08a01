"""Triton's kernels for fp8 without a GPU: they compile for one, and its interpreter computes torch's bits."""

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


WIDE, NARROW = {"C": 9216, "HEAD": 8192, "TAIL": 1024}, {"C": 2048, "HEAD": 2048, "TAIL": 0}


@pytest.mark.parametrize("capability", [89, 90, 100, 120])
@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("_quantise", {**WIDE, "SCALED": False}),
        ("_quantise", {**WIDE, "SCALED": True}),
        ("_quantise", {**NARROW, "SCALED": True}),
        ("_transpose", {"TILE": 128}),
    ],
)
def test_kernels_compile_for_gpus_that_multiply_in_fp8(name: str, constants: dict[str, Any], capability: int) -> None:
    """The interpreter lets pass what the compiler does not know."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from library.memory import fp8_kernels

    kinds = {"x": "*bf16", "codes": "*fp8e4nv", "rows": "i32", "columns": "i32"}
    kinds |= dict.fromkeys(("factor", "scale", "ones"), "*fp32") | dict.fromkeys(constants, "constexpr")
    kernel = getattr(fp8_kernels, name)
    signature = {argument: kinds.get(argument, "*fp8e4nv") for argument in kernel.arg_names}
    # Tensors lie at multiples of 16 bytes, and the sides of a matrix for the hardware are multiples of 16.
    whole = [at for at, kind in enumerate(signature.values()) if kind == "i32" or kind.startswith("*")]
    source = ASTSource(kernel, signature, constants, {(at,): [["tt.divisibility", 16]] for at in whole})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]
    # The conversion that the interpreter test stands in for.
    assert ("cvt.rn.satfinite.e4m3x2" in compiled.asm["ptx"]) == (name == "_quantise")
