"""Measures what data costs: the start of a run with many pictures, their memory, and the wait for batches while training.

    python tests/bench/bench_data.py                       # starts with 1,000, 10,000 and 100,000 pictures
    python tests/bench/bench_data.py --waiting             # seconds spent waiting for cached batches

Pictures of many sizes are drawn into ``--folder`` with captions, and their caches are filled through the real code with
stand-ins for the encoders; a folder that is there already is used as it is. Then the real training command runs in fresh
processes on the quickstart models: once for time and resident memory, once under tracemalloc. Memory is given per picture
above a run with 100 pictures. Prints one JSON object. Linux only (reads /proc).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measuring import ROOT, circumstances

sys.path.insert(0, str(ROOT))

MODELS = ROOT / "configs" / "quickstart" / "models"
SYSTEM_PROMPT = "You are an assistant designed to generate high-quality images based on user prompts."
BASE = 100  # pictures of the run that memory is compared with
_WORDS = (
    "red green blue disc square small large bright dark soft sharp photo drawing person cat tree sky water street night"
)
_STEPS = ("check_inputs", "start", "rehearse_network", "build_data", "cache_latents", "plan_steps", "cache_text")
_STEPS += ("load_models", "build_network", "build_optimizer", "report_plan")


class Done(Exception):
    """The run came as far as it was needed."""


# ---- pictures ----


def make_pictures(folder: Path, count: int, side_px: int) -> None:
    """Draws pictures with captions: half of them square, the others of many sizes; two thirds JPEG, one third PNG."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    words = _WORDS.split()
    for number in range(count):
        rng = random.Random(number)
        size = (side_px, side_px)
        if rng.random() < 0.5:
            size = (rng.randrange(side_px * 5 // 8, side_px * 2), rng.randrange(side_px * 5 // 8, side_px * 2))
        picture = Image.frombytes("RGB", (4, 4), rng.randbytes(48)).resize(size, Image.Resampling.BILINEAR)
        name = f"picture_{number:07d}"
        picture.save(folder / (f"{name}.png" if number % 3 == 0 else f"{name}.jpg"))
        tags = ", ".join(rng.sample(words, rng.randrange(5, 12)))
        (folder / f"{name}.txt").write_text(f"a {rng.choice(words)} thing, number {number}, {tags}\n", encoding="utf-8")


def flags(folder: Path, scratch: Path, resolution: int) -> list[str]:
    """Returns the training command's flags."""
    return [
        f"--pretrained_model_name_or_path={MODELS / 'quickstart_dit.safetensors'}",
        f"--gemma2={MODELS / 'quickstart_gemma2.safetensors'}",
        f"--ae={MODELS / 'quickstart_ae.safetensors'}",
        f"--train_data_dir={folder}",
        "--caption_extension=.txt",
        f"--resolution={resolution}",
        "--enable_bucket",
        "--bucket_reso_steps=16",
        f"--min_bucket_reso={resolution // 2}",
        f"--max_bucket_reso={resolution * 2}",
        "--train_batch_size=4",
        f"--output_dir={scratch}",
        "--output_name=bench",
        "--network_module=networks.lora_lumina",
        "--network_dim=8",
        "--network_train_unet_only",
        f"--system_prompt={SYSTEM_PROMPT}",
        "--caption_dropout_rate=0.05",
        "--max_train_epochs=10",
        "--cache_latents_to_disk",
        "--cache_text_encoder_outputs_to_disk",
        "--seed=1",
    ]


# ---- inside the measured process ----


def _memory_bytes() -> dict[str, int]:
    found = {}
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name in ("VmHWM", "VmRSS"):
            found[name] = int(value.split()[0]) * 1024
    return {"resident": found["VmRSS"], "peak_resident": found["VmHWM"]}


def run_filling(arguments: list[str]) -> None:
    """Fills the caches: the trainer's own steps, with encoders that return zeros of the right shapes."""
    import torch

    from library.console import set_up_logging
    from library.training.arguments import parse_arguments
    from lumina_train_network import LuminaNetworkTrainer

    class StandIn:
        def __init__(self, width: int) -> None:
            self.width = width

        def encode(self, given: Any, template: Any = None) -> Any:
            if isinstance(given, torch.Tensor):
                return given.new_zeros(len(given), 16, given.shape[2] // 8, given.shape[3] // 8)
            return [torch.zeros(len(text) // 4 + 1, self.width) for text in given]

    class Trainer(LuminaNetworkTrainer):
        def ready_autoencoder(self) -> Any:
            return StandIn(0)

        def ready_text_encoder(self) -> Any:
            return StandIn(self.files.gemma2.config.hidden_size)

        def load_models(self) -> None:
            raise Done

    config = parse_arguments([*arguments, "--vae_batch_size=64", "--text_encoder_batch_size=256"])
    assert config is not None
    set_up_logging("INFO", None, True)
    try:
        Trainer(config).train()
    except Done:
        return


def run_start(arguments: list[str], began: float, traced: bool) -> None:
    """Trains one step and prints when which part of the start was over, and the memory."""
    from library.console import set_up_logging
    from library.training.arguments import parse_arguments
    from lumina_train_network import LuminaNetworkTrainer

    config = parse_arguments(arguments)
    assert config is not None
    set_up_logging("WARNING", None, True)
    found: dict[str, Any] = {"seconds": {"imports": round(time.monotonic() - began, 2)}}

    class Trainer(LuminaNetworkTrainer):
        def build_loop(self) -> None:
            super().build_loop()
            self.events.after_step = first_step  # type: ignore[method-assign]

    def first_step(step: int) -> None:
        found["first_step_s"] = round(time.monotonic() - began, 2)
        found["cpu_s"] = round(time.process_time(), 2)  # says more where the machine does other things too
        found.update(_memory_bytes())
        if traced:
            found["traced"], found["traced_peak"] = tracemalloc.get_traced_memory()
        raise Done

    trainer = Trainer(config)
    for name in _STEPS:
        _time(trainer, name, found["seconds"])
    if traced:
        tracemalloc.start()
    try:
        trainer.train()
    except Done:
        print(json.dumps(found))


def _time(trainer: Any, name: str, seconds: dict[str, float]) -> None:
    method = getattr(trainer, name)

    def timed() -> None:
        started = time.monotonic()
        method()
        seconds[name] = round(time.monotonic() - started, 2)

    setattr(trainer, name, timed)


def run_waiting(arguments: list[str], num_steps: int) -> None:
    """Trains some steps and prints what share of them is spent waiting for batches."""
    from library.console import set_up_logging
    from library.training.arguments import parse_arguments
    from lumina_train_network import LuminaNetworkTrainer

    config = parse_arguments(arguments)
    assert config is not None
    set_up_logging("WARNING", None, True)
    waits: list[float] = []
    steps: list[float] = []

    class Trainer(LuminaNetworkTrainer):
        def build_data(self) -> None:
            super().build_data()
            batches = self.data.batches

            def timed(*given: Any, **named: Any) -> Iterator[Any]:
                inner = batches(*given, **named)
                while True:
                    started = time.monotonic()
                    batch = next(inner, None)
                    waits.append(time.monotonic() - started)
                    if batch is None:
                        return
                    yield batch

            self.data.batches = timed  # type: ignore[method-assign, assignment]

        def build_loop(self) -> None:
            super().build_loop()
            self.events.after_step = after_step  # type: ignore[method-assign]

    def after_step(step: int) -> None:
        steps.append(time.monotonic())
        if step > num_steps:
            raise Done

    try:
        Trainer(config).train()
    except Done:
        step_s = (steps[-1] - steps[0]) / (len(steps) - 1)
        wait_s = sum(waits[1 : len(steps)]) / (len(steps) - 1)
        found = {"first_wait_ms": round(waits[0] * 1e3, 2), "wait_ms": round(wait_s * 1e3, 3)}
        print(json.dumps({**found, "step_ms": round(step_s * 1e3, 1), "share": round(wait_s / step_s, 5)}))


def run_reading(count: int, side_px: int, num_tokens: int, step_s: float) -> None:
    """Reads cached batches as large as the real model's while something else takes ``step_s`` for each; prints the wait."""
    import torch

    from library.data.dataset import TrainingData
    from library.data.settings import DataSettings

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_pictures(folder, count, side_px)
        settings = DataSettings(
            train_data_dir=scratch,
            resolution=(side_px, side_px),
            caption_extension=".txt",
            train_batch_size=4,
            cache_latents_to_disk=True,
            cache_text_encoder_outputs_to_disk=True,
        )
        data = TrainingData.build(settings, 1, show_progress=False)
        data.fill_latents(lambda pixels: pixels.new_zeros(len(pixels), 16, side_px // 8, side_px // 8), "latents")
        data.fill_captions([1], lambda texts: [torch.zeros(num_tokens, 2304) for _ in texts], "text")
        waits = []
        batches = data.batches(data.plan_epoch(1, 1))
        while True:
            started = time.monotonic()
            if next(batches, None) is None:
                break
            waits.append(time.monotonic() - started)
            time.sleep(step_s)
    steady = waits[1:]
    found = {"first_wait_ms": round(waits[0] * 1e3, 2), "wait_ms": round(1e3 * sum(steady) / len(steady), 3)}
    print(json.dumps({**found, "picture_px": side_px, "text_tokens": num_tokens, "step_ms": round(step_s * 1e3)}))


# ---- around it ----


def _child(*arguments: str) -> dict[str, Any]:
    """Runs this file in a fresh process and returns the object it printed last."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, *arguments, f"--began={time.monotonic()}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if lines else {}


def _folder(root: Path, count: int) -> Path:
    folder = root / str(count)
    if not (folder / "done").exists():
        make_pictures(folder, count, 64)
        _child("fill", str(folder))
        (folder / "done").write_text("", encoding="utf-8")
    return folder


def measure_starts(root: Path, counts: list[int]) -> dict[str, Any]:
    """Returns per number of pictures the seconds to the first step and the bytes a picture."""
    runs: dict[int, dict[str, Any]] = {}
    for count in [BASE, *counts]:
        folder = _folder(root, count)
        _child("start", str(folder))  # so that every run finds its files in the system's cache
        runs[count] = {**_child("start", str(folder)), "tracemalloc": _child("start", str(folder), "--traced")}
    base = runs[BASE]
    result: dict[str, Any] = {"base": {"pictures": BASE, **_without(base, "tracemalloc")}}
    for count in counts:
        run, more = runs[count], count - BASE
        result[str(count)] = {
            "first_step_s": run["first_step_s"],
            "cpu_s": run["cpu_s"],
            "seconds": run["seconds"],
            "bytes_a_picture": {
                "resident": round((run["resident"] - base["resident"]) / more),
                "peak_resident": round((run["peak_resident"] - base["peak_resident"]) / more),
                **{
                    name: round((run["tracemalloc"][name] - base["tracemalloc"][name]) / more)
                    for name in ("traced", "traced_peak")
                },
            },
        }
    return result


def _without(found: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != name}


def main() -> None:
    """Parses the command line, measures and prints; the first word may be what a child process is to do."""
    parser = argparse.ArgumentParser(description="Measures the data side of a run.")
    parser.add_argument("task", nargs="?", default="all", choices=("all", "fill", "start", "wait", "read"))
    parser.add_argument("pictures", nargs="?", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--counts", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--folder", type=Path, help="where pictures and caches are kept (default: a temporary folder)")
    parser.add_argument("--waiting", action="store_true", help="measure the wait for batches instead of starts")
    parser.add_argument("--steps", type=int, default=100, help="steps of --waiting")
    parser.add_argument("--step_seconds", type=float, default=11.9, help="a step of the model to compare the wait with")
    parser.add_argument("--began", type=float, default=time.monotonic(), help=argparse.SUPPRESS)
    parser.add_argument("--traced", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if chosen.task != "all":
            arguments = flags(chosen.pictures, Path(scratch), 64)
            if chosen.task == "fill":
                run_filling(arguments)
            elif chosen.task == "start":
                run_start(arguments, chosen.began, chosen.traced)
            elif chosen.task == "wait":
                run_waiting(arguments, chosen.steps)
            else:
                run_reading(64, 1024, 128, 0.5)
            return
        root = chosen.folder or Path(scratch)
        if chosen.waiting:
            reading = _child("read", ".")
            result: dict[str, Any] = {
                "quickstart_model": _child("wait", str(_folder(root, 1000)), f"--steps={chosen.steps}"),
                "real_sizes": {
                    **reading,
                    "compared_with_step_s": chosen.step_seconds,
                    "share": round(reading["wait_ms"] / 1e3 / chosen.step_seconds, 6),
                },
            }
        else:
            result = measure_starts(root, sorted(chosen.counts))
    print(json.dumps({**result, **circumstances()}, indent=1))


if __name__ == "__main__":
    main()
