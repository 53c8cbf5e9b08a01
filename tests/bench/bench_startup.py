"""Measures the start of a run: from the start of the process to its first optimizer step, and what epoch boundaries cost.

    python tests/bench/bench_startup.py                    # the quickstart's models, pictures and settings
    python tests/bench/bench_startup.py --models DIR       # models written by make_full_size.py instead

Runs the real training command in fresh processes, first with empty disk caches, then several times with filled ones, and
then for some epochs. A phase holds everything from its beginning to its end, the imports that it causes included; imports
are also given by themselves, each with what it imports for the first time. The quickstart's previews are left out, because
the one before the first step needs the autoencoder; ``--previews`` measures the command with them. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from measuring import ROOT, circumstances

sys.path.insert(0, str(ROOT))

QUICKSTART = ROOT / "configs" / "quickstart" / "quickstart.toml"
HEAVY = (
    "accelerate",
    "bitsandbytes",
    "diffusers",
    "numpy",
    "safetensors",
    "sympy",
    "tensorboard",
    "torch",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "transformers",
)
_PHASES = (
    "check_inputs",
    "start",
    "rehearse_network",
    "build_data",
    "cache_latents",
    "plan_steps",
    "cache_text",
    "load_models",
    "build_network",
    "build_optimizer",
    "report_plan",
    "restore_state",
)


class Done(Exception):
    """The run came as far as it was needed."""


# ---- inside the measured process ----


@contextlib.contextmanager
def timed_imports(seconds: dict[str, float]) -> Iterator[None]:
    """Fills in how long the first import of each heavy package took, what it imported included."""
    original = builtins.__import__

    def timed(name: str, *rest: Any, **named: Any) -> Any:
        # ``from torch.utils import x`` imports torch first, if nobody has.
        wanted = [module for module in HEAVY if module not in sys.modules and f"{name}.".startswith(f"{module}.")]
        if not wanted:
            return original(name, *rest, **named)
        started = time.monotonic()
        try:
            return original(name, *rest, **named)
        finally:
            for module in wanted:
                seconds.setdefault(module, round(time.monotonic() - started, 3))

    builtins.__import__ = timed
    try:
        yield
    finally:
        builtins.__import__ = original


def run_child(flags: list[str], began: float, num_steps: int) -> dict[str, Any]:
    """Trains ``num_steps`` steps by the real command and returns what took how long, from ``began`` on."""
    imports: dict[str, float] = {}
    phases: dict[str, float] = {"python": round(time.monotonic() - began, 3)}
    steps: list[tuple[int, float]] = []
    with timed_imports(imports):
        started = time.monotonic()
        from library.console import set_up_logging
        from library.training.arguments import parse_arguments
        from lumina_train_network import LuminaNetworkTrainer

        config = parse_arguments(flags)
        assert config is not None
        set_up_logging("WARNING", None, True)
        phases["command line"] = round(time.monotonic() - started, 3)

        class Trainer(LuminaNetworkTrainer):
            def build_loop(self) -> None:
                super().build_loop()
                report = self.events.report

                def noted(step: int, values: Mapping[str, float]) -> None:
                    steps.append((self.loop._epoch, time.monotonic()))
                    if step >= num_steps:
                        raise Done
                    report(step, values)

                self.events.report = noted  # type: ignore[method-assign]

        trainer = Trainer(config)
        for name in _PHASES:
            _time(trainer, name, phases)
        with contextlib.suppress(Done):
            trainer.train()
    first = steps[0][1] - began
    phases["first step"] = round(first - sum(phases.values()), 3)
    loaded = [module for module in HEAVY if module in sys.modules]
    return {
        "first_step_s": round(first, 2),
        "phases_s": phases,
        "imports_s": imports,
        "imported": loaded,
        **({"epochs": boundaries(steps)} if num_steps > 1 else {}),
    }


def _time(trainer: Any, name: str, seconds: dict[str, float]) -> None:
    method = getattr(trainer, name)

    def timed() -> None:
        started = time.monotonic()
        method()
        seconds[name] = round(time.monotonic() - started, 3)

    setattr(trainer, name, timed)


def boundaries(steps: list[tuple[int, float]]) -> dict[str, Any]:
    """Returns how long steps take, those that begin an epoch apart: from the end of the step before to their own."""
    inside, first = [], []
    for (epoch_before, before), (epoch, now) in itertools.pairwise(steps):
        (inside if epoch == epoch_before else first).append(now - before)
    return {
        "steps": len(steps),
        "median_step_ms": round(1e3 * statistics.median(inside), 2),
        "slowest_step_ms": round(1e3 * max(inside), 2),
        "median_first_step_of_an_epoch_ms": round(1e3 * statistics.median(first), 2) if first else None,
        "slowest_first_step_of_an_epoch_ms": round(1e3 * max(first), 2) if first else None,
    }


# ---- around it ----


def settings_file(folder: Path, previews: bool) -> Path:
    """Writes the quickstart's settings, without previews unless they are asked for, and returns the file."""
    lines = QUICKSTART.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if previews or not line.startswith("sample_")]
    path = folder / "quickstart.toml"
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return path


def flags_for(folder: Path, models: Path | None, previews: bool, more: list[str]) -> list[str]:
    """Returns the training command's flags: everything that it writes goes to ``folder``."""
    flags = [
        f"--config_file={settings_file(folder, previews)}",
        "--cache_latents_to_disk",
        "--cache_text_encoder_outputs_to_disk",
        f"--cache_dir={folder / 'cache'}",
        f"--output_dir={folder / 'out'}",
        f"--logging_dir={folder / 'logs'}",
    ]
    if models is not None:
        for flag, part in (("pretrained_model_name_or_path", "dit"), ("gemma2", "gemma2"), ("ae", "ae")):
            flags.append(f"--{flag}={next(iter(sorted(models.glob(f'*{part}*.safetensors'))))}")
        flags.append("--mixed_precision=bf16")
    return [*flags, *more]


def measure(flags: list[str], num_steps: int, folder: Path) -> dict[str, Any]:
    """Runs the training command in a fresh process and returns what :func:`run_child` found."""
    # Remembered hashes of files are as much a cache as what the encoders gave.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "home")}
    command = [sys.executable, __file__, "--child", str(num_steps), str(time.monotonic()), *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Parses the command line, measures and prints."""
    if sys.argv[1:2] == ["--child"]:
        num_steps, began, *flags = sys.argv[2:]
        print(json.dumps(run_child(flags, float(began), int(num_steps))))
        return
    parser = argparse.ArgumentParser(description="Measures the start of a training run.")
    parser.add_argument("--models", type=Path, help="folder written by make_full_size.py (default: the quickstart's)")
    parser.add_argument("--runs", type=int, default=5, help="starts with filled caches; the median one is shown")
    parser.add_argument(
        "--steps", type=int, default=60, help="steps of the run that looks at epoch boundaries; 0: none"
    )
    parser.add_argument("--previews", action="store_true", help="draw the quickstart's previews before the first step")
    parser.add_argument("more", nargs="*", help="further flags of the trainer, behind --")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        flags = flags_for(folder, chosen.models, chosen.previews, chosen.more)
        measure(flags, 1, folder / "warming")  # so that every run finds programs and models in the system's cache
        empty = measure([*flags, f"--cache_dir={folder / 'empty'}"], 1, folder)
        filled = sorted((measure(flags, 1, folder) for _ in range(chosen.runs)), key=lambda run: run["first_step_s"])
        result = {
            "models": "full size" if chosen.models else "quickstart",
            "previews": chosen.previews,
            "flags": chosen.more,
            "empty_caches": empty,
            "filled_caches": filled[len(filled) // 2],
            "filled_caches_first_step_s": [run["first_step_s"] for run in filled],
        }
        if chosen.steps:
            result["epochs"] = measure(flags, chosen.steps, folder)["epochs"]
    print(json.dumps({**result, **circumstances()}, indent=1))


if __name__ == "__main__":
    main()
