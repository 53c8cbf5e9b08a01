"""Measures a whole training program's GPU memory, caching and previews included, with models of the real sizes.

    python tests/bench/bench_gpu_memory.py                       # needs CUDA, 11 GB of disk, about two minutes
    python tests/bench/bench_gpu_memory.py --models DIR          # of make_full_size.py, instead of making them
    python tests/bench/bench_gpu_memory.py --size 64 --shrink 8 --layers 4   # tries the script, also on a CPU

Every row is one run of ``lumina_train_network.py``: one picture, batch 1, a preview of the same size before and after the
steps. Prints one JSON object; a peak is what the program itself reports (``max_memory_reserved``), null on a CPU. A process
that is ended by SIGTERM prints the rows that it has.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from make_full_size import make
from measuring import ROOT, Stopped, circumstances, stop_when_asked
from PIL import Image, ImageDraw

ROWS: dict[str, tuple[float, list[str]]] = {
    "fp8, streaming, checkpointing": (4.5, ["--fp8_base", "--blocks_to_swap={layers}", "--gradient_checkpointing"]),
    "fp8, checkpointing": (6.0, ["--fp8_base", "--gradient_checkpointing"]),
    "bf16, checkpointing": (8.0, ["--gradient_checkpointing"]),
}
"""Name -> the most GiB that it should take at 1024 px, and its flags."""
STEPS = 4
_CAPTION = "a red disc on a green background, a simple drawing with clean lines and plain colours"
_PEAK = re.compile(r"Peak GPU memory: ([\d.]+) GiB reserved, ([\d.]+) GiB in tensors, while ([a-z ]+)")


def _models(options: argparse.Namespace, scratch: Path) -> tuple[Path, Path, Path]:
    if options.models is None:
        return make(scratch / "models", options.layers, options.shrink)
    dit, gemma2, ae = (next(iter(options.models.glob(f"*{part}*.safetensors"))) for part in ("dit", "gemma2", "ae"))
    return dit, gemma2, ae


def _command(models: tuple[Path, Path, Path], job: Path, output: Path, size: int, flags: list[str]) -> list[str]:
    dit, gemma2, ae = models
    return [
        sys.executable,
        "lumina_train_network.py",
        f"--pretrained_model_name_or_path={dit}",
        f"--gemma2={gemma2}",
        f"--ae={ae}",
        f"--train_data_dir={job / 'pictures'}",
        f"--resolution={size}",
        "--caption_extension=.txt",
        f"--output_dir={output}",
        "--output_name=bench",
        "--network_module=networks.lora_lumina",
        "--network_dim=8",
        "--network_alpha=8",
        "--learning_rate=1e-4",
        "--timestep_sampling=nextdit_shift",
        f"--max_train_steps={STEPS}",
        "--mixed_precision=bf16",
        "--cache_latents",
        "--cache_text_encoder_outputs",
        f"--sample_prompts={job / 'prompts.txt'}",
        "--sample_at_first",
        f"--sample_every_n_steps={STEPS}",
        "--seed=1",
        *flags,
    ]


def _make_job(folder: Path, size: int) -> None:
    (folder / "pictures").mkdir()
    picture = Image.new("RGB", (size, size), (30, 160, 50))
    ImageDraw.Draw(picture).ellipse((size // 5, size // 4, size // 2, size // 2), fill=(230, 30, 30))
    picture.save(folder / "pictures" / "one.png")
    (folder / "pictures" / "one.txt").write_text(_CAPTION, encoding="utf-8")
    (folder / "prompts.txt").write_text(f"{_CAPTION} --w {size} --h {size} --s 4 --d 1\n", encoding="utf-8")


def main() -> None:
    """Reads the command line, runs the rows and prints."""
    parser = argparse.ArgumentParser(description="Measures a whole training program's GPU memory.")
    parser.add_argument("--models", type=Path, help="folder written by make_full_size.py")
    parser.add_argument("--size", type=int, default=1024, help="picture side in pixels")
    parser.add_argument("--layers", type=int, help="make models of this many layers")
    parser.add_argument("--shrink", type=int, default=1, help="make models of widths divided by this")
    parser.add_argument("--limit_s", type=float, default=150, help="seconds that a run may take")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    made_s = None
    stop_when_asked()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        try:
            started = time.monotonic()
            models = _models(options, scratch)
            made_s = round(time.monotonic() - started, 1)
            _make_job(scratch, options.size)
            for number, (name, (target, given)) in enumerate(ROWS.items()):
                flags = [flag.format(layers=options.layers or 26) for flag in given]
                rows.append({"name": name, "flags": flags, "target_gib": target, "error": "stopped"})
                command = _command(models, scratch, scratch / f"out{number}", options.size, flags)
                rows[-1] = {**rows[-1], **_run(command, options.limit_s)}
                if rows[-1]["error"] is None:
                    del rows[-1]["error"]
        except Stopped:
            print("stopped before all was measured", file=sys.stderr)
    print(json.dumps({"size_px": options.size, "models_made_s": made_s, "rows": rows, **circumstances()}, indent=1))
    if len(rows) < len(ROWS) or any("error" in row for row in rows):
        sys.exit(1)


def _run(command: list[str], limit_s: float) -> dict[str, object]:
    """Returns a run's peaks, its time, and its error or None."""
    started = time.monotonic()
    found: dict[str, object] = {"error": None}
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        found["error"] = f"took more than {limit_s:g} s"
    else:
        peak = _PEAK.search(done.stderr)
        if peak:
            found |= {"reserved_gib": float(peak[1]), "in_tensors_gib": float(peak[2]), "most_while": peak[3]}
        if done.returncode != 0:
            found["error"] = done.stderr[-2000:]
    return {**found, "seconds": round(time.monotonic() - started, 1)}


if __name__ == "__main__":
    main()
