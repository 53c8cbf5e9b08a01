"""Measures the memory of one training step by the documented command, text and picture encoding included.

    python tests/bench/make_full_size.py --output_dir DIR
    python tests/bench/bench_memory.py --models DIR --resolution 256

Prints one JSON object: memory mapped from files (the weights, which the system can drop and read again) and anonymous
memory (everything else) apart, over all processes of the command, the launcher included. Runs on the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from measuring import ROOT, circumstances, run_and_watch
from PIL import Image, ImageDraw

CAPTION = "a red disc on a green background, a simple drawing with clean lines and plain colours"
SYSTEM_PROMPT = "You are an assistant designed to generate high-quality images based on user prompts."


def _command(models: dict[str, Path], folder: Path, resolution: int, more: list[str]) -> list[str]:
    program = "from accelerate.commands.accelerate_cli import main; main()"
    launcher = [sys.executable, "-c", program, "launch", "--config_file", str(ROOT / "configs" / "accelerate.yaml")]
    return [
        *launcher,
        "--num_cpu_threads_per_process=2",
        "lumina_train_network.py",
        f"--pretrained_model_name_or_path={models['dit']}",
        f"--gemma2={models['gemma2']}",
        f"--ae={models['ae']}",
        f"--train_data_dir={folder / 'pictures'}",
        f"--resolution={resolution}",
        "--caption_extension=.txt",
        f"--output_dir={folder / 'out'}",
        "--output_name=bench",
        "--network_module=networks.lora_lumina",
        "--network_dim=8",
        "--network_alpha=8",
        "--learning_rate=1e-4",
        "--timestep_sampling=nextdit_shift",
        f"--system_prompt={SYSTEM_PROMPT}",
        "--max_train_steps=1",
        "--mixed_precision=bf16",
        "--gradient_checkpointing",
        "--cache_latents",
        "--cache_text_encoder_outputs",
        "--seed=1",
        *more,
    ]


def main() -> None:
    """Parses the command line, runs and prints."""
    parser = argparse.ArgumentParser(description="Measures the memory of one training step.")
    parser.add_argument("--models", type=Path, required=True, help="folder written by make_full_size.py")
    parser.add_argument("--resolution", type=int, default=256, help="picture side in pixels")
    parser.add_argument("more", nargs="*", help="further flags of the trainer, behind --")
    arguments = parser.parse_args()
    models = {
        part: next(iter(sorted(arguments.models.glob(f"*{part}*.safetensors")))) for part in ("dit", "gemma2", "ae")
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "pictures").mkdir()
        picture = Image.new("RGB", (arguments.resolution, arguments.resolution), (30, 160, 50))
        ImageDraw.Draw(picture).ellipse((40, 40, 180, 180), fill=(230, 30, 30))
        picture.save(folder / "pictures" / "one.png")
        (folder / "pictures" / "one.txt").write_text(CAPTION, encoding="utf-8")
        log = folder / "log.txt"
        found = run_and_watch(_command(models, folder, arguments.resolution, arguments.more), log)
        if found["exit_code"] != 0:
            sys.exit(log.read_text(encoding="utf-8"))
    sizes = {f"{part}_gib": round(path.stat().st_size / 2**30, 2) for part, path in models.items()}
    print(json.dumps({"resolution": arguments.resolution, **found, **sizes, **circumstances()}, indent=1))


if __name__ == "__main__":
    main()
