"""Times training steps of a model with random weights, through the trainer's own step, and holds them against the machine.

    python tests/bench/bench_step.py --preset medium --size 512 --batch 2 --precision bf16
    python tests/bench/bench_step.py --preset full --size 1024 --batch 4 --precision bf16 -- --torch_compile
    python tests/bench/bench_step.py --program diffusers   # the same step by diffusers' transformer and peft's LoRA

Behind ``--`` come flags of the trainer. Between steps a large matrix product of the same dtype is timed: that is the
machine's ceiling of this very moment. Prints one JSON object; ``mfu`` is the step's necessary operations
(``tests/bench/flops.py``) over its time, over the ceiling. Memory is the peak of the whole process. With ``--kernels 20``
one more step says which 20 kernels (on a CPU: operations) take longest, and for how long the device has work at all.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import flops
import presets
import torch
from diffusers_program import DiffusersProgram
from measuring import circumstances
from our_program import OurProgram, batch_of
from timing import DTYPES, Ceiling, longest, timed
from torch import nn

from library.console import run_program
from library.data.items import Batch
from library.memory.device_memory import let_segments_grow


class Program(Protocol):
    """What is timed.

    Attributes:
        device: where it trains.
        model: what it trains beside.
        checkpointing: whether blocks are computed again in backward.
    """

    device: torch.device
    model: nn.Module
    checkpointing: bool

    def step(self, batch: Batch, number: int) -> float:
        """Trains one step and returns its loss."""

    def ranks(self) -> dict[str, int]:
        """Returns the LoRA's rank beside each Linear, by our names."""


def host_peak_gib() -> float:
    """Returns the most memory that the process has ever had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Runs the steps and returns the figures."""
    program = program_of(options, folder)
    device, sizes = program.device, presets.config(options.preset)
    width, height = options.width or options.size, options.height or options.size
    captions = (options.captions * options.batch)[: options.batch]
    counted = flops.count(sizes, flops.image_tokens(width, height), captions, program.ranks())

    def batch_for(number: int) -> Batch:
        return batch_of(sizes, width, height, captions, number)

    if device.type == "cuda":
        torch.cuda.empty_cache()  # the weights were drawn there
        torch.cuda.reset_peak_memory_stats()
    first = timed(lambda: program.step(batch_for(1), 1), device)
    program.step(batch_for(2), 2)
    host_gib = host_peak_gib()  # both before the ceiling's matrices are made
    device_gib = torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else None
    ceiling = Ceiling(DTYPES[options.precision], device)
    seconds, ceilings, losses = [], [ceiling.measure()], []
    for number in range(3, 3 + options.warmup + options.steps):
        batch = batch_for(number)

        def work(batch: Batch = batch, number: int = number) -> None:
            losses.append(program.step(batch, number))

        seconds.append(timed(work, device))
        ceilings.append(ceiling.measure())
    seconds, ceilings = seconds[options.warmup :], ceilings[options.warmup + 1 :]
    median, most = statistics.median(seconds), statistics.median(ceilings)
    computed_again = counted.blocks_forward if program.checkpointing else 0
    achieved = counted.step / median / 1e12
    figures: dict[str, object] = {
        "program": options.program,
        "preset": options.preset,
        "parameters_m": round(_frozen_numbers(program.model) / 1e6, 1),
        "size_px": [width, height],
        "batch": options.batch,
        "caption_tokens": captions,
        "precision": options.precision,
        "flags": options.more,
        "step_s": round(median, 4),
        "steps_s": [round(value, 4) for value in seconds],
        "first_step_s": round(first, 2),
        "images_per_s": round(options.batch / median, 3),
        "necessary_tflop": round(counted.step / 1e12, 4),
        "achieved_tflops": round(achieved, 4),
        "ceiling_tflops": round(most, 4),
        "mfu": round(achieved / most, 4),
        "mfu_with_recomputation": round((counted.step + computed_again) / median / 1e12 / most, 4),
        "last_loss": losses[-1],
        "host_peak_gib": round(host_gib, 2),
    }
    if options.kernels:
        batch = batch_for(1000)
        figures |= longest(lambda: program.step(batch, 1000), device, options.kernels)
    if device_gib is not None:
        figures["device"] = torch.cuda.get_device_name()
        figures["device_peak_gib"] = round(device_gib, 2)
    return figures | {"threads": torch.get_num_threads(), **circumstances()}


def _frozen_numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)


def program_of(options: argparse.Namespace, folder: Path) -> Program:
    """Returns the program whose steps are timed."""
    if options.program == "diffusers":
        return DiffusersProgram(options.preset, options.precision, options.more)
    return OurProgram(options.preset, options.precision, folder, options.more)


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options of a command line; None = of this process."""
    parser = argparse.ArgumentParser(description="Times training steps of a model with random weights.")
    parser.add_argument(
        "--program", default="ours", choices=["ours", "diffusers"], help="diffusers: its transformer, with peft's LoRA"
    )
    parser.add_argument("--preset", default="medium", choices=list(presets.PRESETS), help="the model's size")
    parser.add_argument("--size", type=int, default=512, help="picture side in pixels")
    parser.add_argument("--width", type=int, help="instead of --size")
    parser.add_argument("--height", type=int, help="instead of --size")
    parser.add_argument("--batch", type=int, default=2, help="pictures a step")
    parser.add_argument(
        "--captions", type=int, nargs="+", default=[160], help="caption tokens, repeated over the batch"
    )
    parser.add_argument("--precision", default="bf16", choices=list(DTYPES))
    parser.add_argument("--steps", type=int, default=5, help="steps that count")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them, besides the first")
    parser.add_argument("--kernels", type=int, default=0, help="list this many kernels of a step, the longest first")
    parser.add_argument("more", nargs="*", help="flags of the trainer, behind --")
    return parser.parse_args(arguments)


def main() -> None:
    """Reads the command line, measures and prints."""
    options = options_of()
    let_segments_grow()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options, Path(folder))))


if __name__ == "__main__":
    run_program(main)
