"""A small job on disk (models, pictures, captions), and ways to run the programs on it as a user does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from models_helpers import write_tiny_files
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
NUM_PICTURES = 5


@dataclass(frozen=True)
class Job:
    """Files of a small job."""

    folder: Path
    models: Path
    pictures: Path

    @property
    def model_flags(self) -> list[str]:
        """The three models, as the training program wants them."""
        return [
            f"--pretrained_model_name_or_path={self.models / 'quickstart_dit.safetensors'}",
            f"--gemma2={self.models / 'quickstart_gemma2.safetensors'}",
            f"--ae={self.models / 'quickstart_ae.safetensors'}",
        ]

    @property
    def inference_flags(self) -> list[str]:
        """The three models and a small picture, as the inference program wants them."""
        renamed = [
            flag.replace("--gemma2=", "--gemma2_path=").replace("--ae=", "--ae_path=") for flag in self.model_flags
        ]
        return [*renamed, "--image_width=64", "--image_height=96", "--steps=4", "--seed=0", "--prompt=a red disc"]

    def train_flags(self, output: Path, *more: str) -> list[str]:
        """A whole training command line; later flags win."""
        return [
            *self.model_flags,
            f"--train_data_dir={self.pictures}",
            "--caption_extension=.txt",
            "--resolution=96",
            "--enable_bucket",
            "--min_bucket_reso=32",
            "--bucket_reso_steps=16",
            f"--output_dir={output}",
            "--output_name=my",
            "--network_module=networks.lora_lumina",
            "--network_dim=4",
            "--learning_rate=1e-3",
            "--max_train_epochs=2",
            "--seed=7",
            *more,
        ]


def make_pictures(folder: Path) -> None:
    """Writes a few pictures of different sizes with captions of different lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(NUM_PICTURES):
        picture = Image.new("RGB", (120 + 40 * number, 150), (45 * number, 220 - 45 * number, 128))
        ImageDraw.Draw(picture).ellipse((30, 40, 90, 100 + 8 * number), fill=(255, 20 * number, 0))
        picture.save(folder / f"p{number}.png")
        (folder / f"p{number}.txt").write_text(f"a red disc, number {number}" + ", soft" * number, encoding="utf-8")


def make_job(folder: Path) -> Job:
    """Writes tiny models and pictures into ``folder``."""
    job = Job(folder, folder / "models", folder / "pictures")
    write_tiny_files(job.models)
    make_pictures(job.pictures)
    return job


def run(
    *command: str, environment: dict[str, str] | None = None, standard_input: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs a command from the project's folder with one CPU thread a process; output as text."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(environment or {})}
    return subprocess.run(
        command,
        cwd=ROOT,
        env=variables,
        input=standard_input,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


def python(script: str, *flags: str, **how: object) -> subprocess.CompletedProcess[str]:
    """Runs one of the project's programs with plain Python."""
    return run(sys.executable, script, *flags, **how)  # type: ignore[arg-type]


def launch(*arguments: str, **how: object) -> subprocess.CompletedProcess[str]:
    """Runs ``accelerate launch`` of the same environment."""
    return run(*launch_command(), *arguments, **how)  # type: ignore[arg-type]


def launch_command() -> list[str]:
    """Returns the command of ``accelerate launch``, whose processes meet at a port of their own: tests run side by side."""
    program = "from accelerate.commands.accelerate_cli import main; main()"
    return [sys.executable, "-c", program, "launch", "--main_process_port", free_port()]


def free_port() -> str:
    """Returns a port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def log_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Returns the log's lines without time stamps and progress bars."""
    lines = []
    for raw in done.stderr.replace("\r", "\n").splitlines():
        line = raw.replace("\x1b[A", "").strip()
        if line[2:3] == ":" and line[5:6] == ":":
            lines.append(line[9:])
    return lines


def difference(first: Path, second: Path) -> float:
    """Returns the largest difference between two LoRA files, relative to each tensor's largest value."""
    a, b = load_file(first), load_file(second)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max() / _size(a[name])) for name in a)


def distance(first: Path, second: Path) -> float:
    """Returns how far the learned parts (``lora_up``, which start at 0) of two LoRA files are apart, as a share."""
    a, b = load_file(first), load_file(second)
    names = [name for name in a if name.endswith("lora_up.weight")]
    apart = sum(float((a[name] - b[name]).square().sum()) for name in names)
    return (apart / sum(float(a[name].square().sum()) for name in names)) ** 0.5


def _size(tensor: Tensor) -> Tensor:
    return tensor.abs().max().clamp_min(1e-12)
