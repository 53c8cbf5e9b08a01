"""Training steps of the full model with several sets of flags, in one process: most of a short run is its start.

    python tests/bench/gpu_steps.py PARTS [--only NAME ...] [--limit_s SECONDS] [--quick]

Writes what ``gpu_summary.py`` reads into the folder PARTS: for each row NAME.out (what ``bench_step.py`` prints),
NAME.status, and NAME.error where it failed. Rows stand in the order of their importance, and none begins when three
quarters of the time are over. Host memory is the process's peak, so it says something of the first row alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
from bench_step import measure, options_of

from library.console import run_program
from library.memory.device_memory import let_segments_grow

_FP8 = ("--fp8_base", "--fp8_fast")
_CHECKPOINTING = "--gradient_checkpointing"


class Step(NamedTuple):
    """A row: picture side in pixels, flags of the trainer, and how it departs from our batch 4 in bf16, captions of one
    length."""

    size: int
    flags: tuple[str, ...] = ()
    batch: int = 4
    captions: tuple[int, ...] = (160,)
    program: str = "ours"
    precision: str = "bf16"


STEPS = {
    "step_eager": Step(1024),
    "step_checkpointing": Step(1024, (_CHECKPOINTING,)),
    "step_streaming": Step(1024, (_CHECKPOINTING, "--blocks_to_swap=26")),
    "step_fp8": Step(1024, _FP8),
    "step_bf16_small": Step(512),
    "step_fp8_small": Step(512, _FP8),
    "step_ragged": Step(1024, captions=(160, 96, 64, 32)),
    "step_selective": Step(1024, (_CHECKPOINTING, "--gradient_checkpointing_level=selective")),
    "step_one_picture": Step(512, batch=1),
    "step_diffusers": Step(1024, program="diffusers"),
    "step_diffusers_checkpointing": Step(1024, (_CHECKPOINTING,), program="diffusers"),
    "step_cudnn": Step(1024, ("--attn_mode=cudnn",)),
    "step_flash": Step(1024, ("--attn_mode=flash",)),
    "step_fp16": Step(1024, (_CHECKPOINTING,), batch=1, precision="fp16"),
    "step_fp32": Step(1024, (_CHECKPOINTING,), batch=1, precision="fp32"),
    "step_compiled": Step(1024, ("--torch_compile",)),
    "step_compiled_small": Step(512, ("--torch_compile",)),
    "step_fp8_compiled": Step(1024, (*_FP8, "--torch_compile")),
    "step_fp8_compiled_small": Step(512, (*_FP8, "--torch_compile")),
}


def command_line(step: Step, quick: bool) -> list[str]:
    """Returns a row's arguments of ``bench_step.py``; ``quick`` tries the script with tiny sizes, also on a CPU."""
    flags = [flag for flag in step.flags if not quick or flag != "--fp8_fast"]  # a CPU has no fp8 products
    sizes = (
        ["--preset=tiny", f"--size={step.size // 16}", "--steps=1"]
        if quick
        else ["--preset=full", f"--size={step.size}"]
    )
    captions = [str(length) for length in step.captions]
    return [
        f"--program={step.program}",
        *sizes,
        f"--batch={step.batch}",
        f"--precision={step.precision}",
        "--kernels=25",
        "--captions",
        *captions,
        "--",
        *flags,
    ]


def main() -> None:
    """Reads the command line and runs the rows."""
    parser = argparse.ArgumentParser(description="Times training steps of the full model with several sets of flags.")
    parser.add_argument("parts", type=Path, help="folder for what is found")
    parser.add_argument("--only", nargs="*", default=list(STEPS), choices=list(STEPS), help="rows")
    parser.add_argument("--limit_s", type=float, default=400, help="seconds for all of them")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    let_segments_grow()
    began = time.monotonic()
    for name in (name for name in STEPS if name in options.only):
        started = time.monotonic()
        if started - began > 0.75 * options.limit_s:
            (options.parts / f"{name}.skipped").write_text("no time was left\n", encoding="utf-8")
            continue
        logging.info("== %s", name)
        code = 0
        try:
            with tempfile.TemporaryDirectory() as folder:
                figures = measure(options_of(command_line(STEPS[name], options.quick)), Path(folder))
            (options.parts / f"{name}.out").write_text(json.dumps(figures), encoding="utf-8")
        except (Exception, SystemExit):  # of one row; the others are worth having
            code = 1
            (options.parts / f"{name}.out").write_text("", encoding="utf-8")
            (options.parts / f"{name}.error").write_text(traceback.format_exc(), encoding="utf-8")
        (options.parts / f"{name}.status").write_text(f"{code}\n{time.monotonic() - started:.0f}\n", encoding="ascii")
        gc.collect()  # wrapped blocks refer to themselves
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    run_program(main)
