"""Prints what a compiler makes of the Triton kernels, for GPUs that need not be there: a table in Markdown.

    python tests/bench/kernel_resources.py
    python tests/bench/kernel_resources.py --capability 90 --dtype bf16 --kernel norm_backward --sass

Needs triton (with its NVIDIA tools) and no GPU. Run it after a change of a kernel and after an update of triton. Kernels are
compiled as launches of the real model compile them. Columns: registers of a thread; bytes of memory that it spills to
(should be 0); KiB of shared memory of a program; its warps; warps that run at once on a multiprocessor, of those that it has
room for; instructions that read and write global memory, by width in bits (128 is what one wants; ``async`` is a read
into shared memory, past the registers); reads and writes of shared memory; barriers; all instructions. Instructions are
counted as they stand in the code, those of a loop once.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kernel_helpers import compiled_for, driver_of, launch_elementwise, launch_fp8, model_cases

from library.console import run_program

# A multiprocessor's room: warps, programs, KiB of shared memory, of which a program takes one more than it asks for.
_ROOM = {86: (48, 16, 100), 89: (48, 24, 100), 90: (64, 32, 228), 120: (48, 24, 100)}
_REGISTERS = 65536  # of a multiprocessor; a warp gets them by 256
_FP8_SINCE = 89
_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_HEAD = ("kernel", "constants", "dtype", "sm", "registers", "spilled", "KiB", "warps", "at once")
_HEAD += ("reads", "writes", "shared", "barriers", "all")


def compiled(capability: int, half: str) -> Iterator[tuple[str, Any]]:
    """Yields name and compiled kernel of all kernels for a GPU."""
    from library.lumina import elementwise_kernels
    from library.memory import fp8_kernels

    with driver_of(capability) as driver:
        launch_elementwise(*model_cases(_HALVES[half]))
        yield from compiled_for(driver, elementwise_kernels)
        if half == "bf16" and capability >= _FP8_SINCE:
            launch_fp8()
            yield from compiled_for(driver, fp8_kernels)


def resources(code: bytes) -> dict[str, int]:
    """Returns what a kernel's machine code (a cubin) uses by ``cuobjdump``: REG, STACK, SHARED, LOCAL and others."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", said)}


def warps_at_once(capability: int, warps: int, registers: int, shared: int) -> int:
    """Returns how many warps of programs like this run at once on a multiprocessor.

    Args:
        capability: of the GPU.
        warps: of a program.
        registers: of a thread.
        shared: bytes of a program.
    """
    most_warps, most_programs, kib = _ROOM[capability]
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = _REGISTERS // of_warp // 4 * 4 // warps  # each of its four parts has whole warps
    by_shared = kib * 1024 // (shared + 1024)
    return min(most_warps // warps, most_programs, by_registers, by_shared) * warps


def _width(operation: str) -> int:
    """Returns how many bits an instruction such as LDG.E.EF.128 moves."""
    found = re.search(r"\.[US]?(256|128|64|16|8)\b", operation)
    return int(found[1]) if found else 32


def _of_widths(operations: Counter[str], begin: str, note: str = "") -> list[str]:
    widths: Counter[int] = Counter()
    for operation, count in operations.items():
        if operation.split(".")[0] == begin:
            widths[_width(operation)] += count
    return [f"{count}x{width}{note}" for width, count in sorted(widths.items(), reverse=True)]


def row(name: str, kernel: Any, half: str, capability: int) -> list[str]:
    """Returns the columns of the table."""
    used = resources(kernel.asm["cubin"])
    operations = Counter(re.findall(r"^\S+\t(?:@!?U?P\w+ )?([A-Z][\w.]*)", kernel.asm["sass"], re.MULTILINE))
    kinds = Counter(operation.split(".")[0] for operation in operations.elements())
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    at_once = warps_at_once(capability, warps, used["REG"], shared)
    constants = zip(kernel.src.fn.arg_names, kernel.src.signature.values(), strict=True)
    named = [name for name, kind in constants if kind == "constexpr"]
    values = [f"{name} {int(value)}" for name, value in zip(named, kernel.src.constants.values(), strict=True)]
    return [
        name,
        " ".join(values),
        half,
        str(capability),
        str(used["REG"]),
        str(used["STACK"] + used["LOCAL"]),
        f"{shared / 1024:.1f}",
        str(warps),
        f"{at_once}/{_ROOM[capability][0]}",
        " ".join([*_of_widths(operations, "LDG"), *_of_widths(operations, "LDGSTS", " async")]),
        " ".join(_of_widths(operations, "STG")),
        str(kinds["LDS"] + kinds["STS"] + kinds["LDSM"] + kinds["STSM"]),
        str(kinds["BAR"]),
        str(operations.total() - kinds["NOP"]),
    ]


def main() -> None:
    """Reads the command line and prints the table, or a kernel's machine code."""
    parser = argparse.ArgumentParser(description="Prints what a compiler makes of the Triton kernels.")
    parser.add_argument(
        "--capability", type=int, nargs="+", choices=list(_ROOM), default=list(_ROOM), help="of the GPUs"
    )
    parser.add_argument("--dtype", nargs="+", choices=list(_HALVES), default=list(_HALVES), help="of activations")
    parser.add_argument("--kernel", default="", help="those whose name contains this alone")
    parser.add_argument("--sass", action="store_true", help="print the machine code as well")
    options = parser.parse_args()
    print(f"| {' | '.join(_HEAD)} |\n" + "| --- " * len(_HEAD) + "|")
    for capability in options.capability:
        for half in options.dtype:
            for name, kernel in compiled(capability, half):
                if options.kernel in name:
                    print(f"| {' | '.join(row(name, kernel, half, capability))} |")
                    if options.sass:
                        print(kernel.asm["sass"])


if __name__ == "__main__":
    run_program(main)
