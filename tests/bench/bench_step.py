"""Times training steps of a model with random weights, through the trainer's own step, and holds them against the machine.

    python tests/bench/bench_step.py --preset medium --size 512 --batch 2 --precision bf16
    python tests/bench/bench_step.py --preset full --size 1024 --batch 4 --precision bf16 -- --torch_compile

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
from types import SimpleNamespace
from typing import Any

import flops
import presets
import torch
from measuring import circumstances
from timing import DTYPES, Ceiling, longest, timed
from torch import nn

from library.console import run_program
from library.data.items import Batch
from library.lumina.configs import NextDiTConfig
from library.memory.device_memory import let_segments_grow
from library.training.arguments import parse_arguments
from library.training.hooks import Reading
from library.training.processes import Processes
from library.training.report import RunPlan
from library.training.step import TrainStep
from lumina_train_network import LuminaNetworkTrainer

RANK = 8


class RandomModelTrainer(LuminaNetworkTrainer):
    """The trainer of a command line, on a model with random weights instead of files."""

    preset = "tiny"

    def inspect_models(self) -> None:
        """There are no files."""

    def attention_heads(self) -> tuple[int, int, int]:
        sizes = presets.config(self.preset)
        return sizes.num_heads, sizes.num_kv_heads, sizes.head_dim

    def dit_config(self) -> NextDiTConfig:
        return presets.config(self.preset)

    def load_model(self, dtype: torch.dtype, reading: Reading) -> nn.Module:
        sizes, attention = presets.config(self.preset), self.attention.function
        self.dit = presets.random_next_dit(sizes, dtype, attention, finish=reading.finish)
        return self.dit


def trainer_of(preset: str, precision: str, folder: Path, more: Sequence[str] = ()) -> RandomModelTrainer:
    """Returns a trainer that is ready for its first step; see :func:`unstarted` for the arguments."""
    trainer = unstarted(preset, precision, folder, more)
    trainer.start()
    trainer.plan = RunPlan(num_batches=1000, steps_per_epoch=1000, num_steps=1000, num_epochs=1)
    trainer.load_models()
    trainer.build_network()
    trainer.build_optimizer()
    return trainer


def unstarted(preset: str, precision: str, folder: Path, more: Sequence[str] = ()) -> RandomModelTrainer:
    """Returns a trainer that has its settings and nothing else.

    Args:
        preset: of the model.
        precision: bf16 or fp32.
        folder: for the run's files.
        more: further flags of the trainer.
    """
    argv = [
        "--pretrained_model_name_or_path=random",
        f"--train_data_dir={folder}",
        "--resolution=1024",
        f"--output_dir={folder}",
        "--network_module=networks.lora_lumina",
        f"--network_dim={RANK}",
        f"--network_alpha={RANK}",
        "--network_args",
        "mod_dim=0",
        "train_blocks=all",
        "--learning_rate=1e-4",
        "--timestep_sampling=nextdit_shift",
        f"--mixed_precision={'no' if precision == 'fp32' else precision}",
        "--cache_latents",
        "--cache_text_encoder_outputs",
        "--seed=1",
        *more,
    ]
    config = parse_arguments(argv)
    if config is None:
        raise SystemExit("--output_config has no place here")
    trainer = RandomModelTrainer(config)
    trainer.preset = preset
    trainer.dataset_configs = []
    return trainer


def batch_of(model: Any, width_px: int, height_px: int, captions: Sequence[int], step: int) -> Batch:
    """Returns a batch of random latents and text features, other ones for each step."""
    generator = torch.Generator().manual_seed(step)
    latents = torch.randn(len(captions), model.config.channels, height_px // 8, width_px // 8, generator=generator)
    text = tuple(torch.randn(length, model.config.cap_dim, generator=generator).bfloat16() for length in captions)
    item = SimpleNamespace(subset=SimpleNamespace(preserves_output=False), path=Path("random.png"))
    draws: Any = tuple(SimpleNamespace(item=item, key=step * 1000 + index) for index in range(len(captions)))
    return Batch(draws, latents.bfloat16(), None, text, torch.ones(len(captions)), len(captions))


def lora_ranks(network: Any, model: nn.Module) -> dict[str, int]:
    """Returns the rank beside each Linear of the model, by module name."""
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(lora.org_module)]: lora.lora_dim for lora in network.unet_loras}


def host_peak_gib() -> float:
    """Returns the most memory that the process has ever had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Runs the steps and returns the figures."""
    trainer = trainer_of(options.preset, options.precision, folder, options.more)
    device, model = trainer.device, trainer.dit
    width, height = options.width or options.size, options.height or options.size
    captions = (options.captions * options.batch)[: options.batch]
    counted = flops.count(model.config, flops.image_tokens(width, height), captions, lora_ranks(trainer.network, model))
    step = TrainStep(trainer.losses_of, trainer.updater, Processes(trainer.accelerator))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the weights were drawn there
        torch.cuda.reset_peak_memory_stats()
    first = timed(lambda: step([batch_of(model, width, height, captions, 1)], options.batch, 1), device)
    step([batch_of(model, width, height, captions, 2)], options.batch, 2)
    host_gib = host_peak_gib()  # both before the ceiling's matrices are made
    device_gib = torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else None
    ceiling = Ceiling(DTYPES[options.precision], device)
    seconds, ceilings, losses = [], [ceiling.measure()], []
    for number in range(3, 3 + options.warmup + options.steps):
        batch = batch_of(model, width, height, captions, number)

        def work(batch: Batch = batch, number: int = number) -> None:
            losses.append(step([batch], options.batch, number)["loss/current"])

        seconds.append(timed(work, device))
        ceilings.append(ceiling.measure())
    seconds, ceilings = seconds[options.warmup :], ceilings[options.warmup + 1 :]
    median, most = statistics.median(seconds), statistics.median(ceilings)
    computed_again = counted.blocks_forward if trainer.config.memory.gradient_checkpointing else 0
    achieved = counted.step / median / 1e12
    figures: dict[str, object] = {
        "preset": options.preset,
        "parameters_m": round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1),
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
        batch = batch_of(model, width, height, captions, 1000)
        figures |= longest(lambda: step([batch], options.batch, 1000), device, options.kernels)
    if device_gib is not None:
        figures["device"] = torch.cuda.get_device_name()
        figures["device_peak_gib"] = round(device_gib, 2)
    return figures | {"threads": torch.get_num_threads(), **circumstances()}


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options of a command line; None = of this process."""
    parser = argparse.ArgumentParser(description="Times training steps of a model with random weights.")
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
