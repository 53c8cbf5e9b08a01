"""Optimizers, schedules and the moving average through the real program."""

from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_helpers import Job, difference, distance, launch, python
from safetensors import safe_open
from safetensors.torch import load_file

from networks.lora_files import content_hashes

CACHED = ["--cache_latents", "--cache_text_encoder_outputs"]


@pytest.mark.parametrize("name", ["Prodigy", "Adafactor", "DAdaptation", "PagedAdamW8bit", "prodigyopt.Prodigy"])
def test_the_lora_is_trained(job: Job, output: Path, train: Callable, name: str) -> None:
    train(job.train_flags(output, *CACHED, f"--optimizer_type={name}", "--learning_rate=1", "--max_train_epochs=1"))
    ups = [tensor for key, tensor in load_file(output / "my.safetensors").items() if key.endswith("lora_up.weight")]
    assert all(tensor.abs().max() > 0 for tensor in ups)


def test_schedule_free(job: Job, tmp_path: Path, train: Callable, capsys: pytest.CaptureFixture) -> None:
    """What is saved is the average; saving and drawing at every step change nothing in the training."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc --w 64 --h 64 --s 2\n", "utf-8")
    flags = [*CACHED, "--optimizer_type=AdamWScheduleFree", "--learning_rate=0.01", "--network_dropout=0.1"]
    train(job.train_flags(tmp_path / "a", *flags))
    often = [f"--sample_prompts={prompts}", "--sample_every_n_steps=1", "--save_every_n_steps=1"]
    train(job.train_flags(tmp_path / "b", *flags, *often, "--lr_scheduler=cosine", "--lr_warmup_steps=10%"))
    assert difference(tmp_path / "a" / "my.safetensors", tmp_path / "b" / "my.safetensors") == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "no effect in this run" in line]
    assert "--lr_scheduler, --lr_warmup_steps (a schedule-free optimizer follows no schedule" in warning
    assert "warmup_steps=100" in warning


def test_the_average_is_saved_beside_the_lora(job: Job, tmp_path: Path, train: Callable) -> None:
    flags = [*CACHED, "--max_train_epochs=3", "--save_every_n_epochs=1", "--save_last_n_epochs=1"]
    train(job.train_flags(tmp_path / "without", *flags))
    train(job.train_flags(tmp_path / "with", *flags, "--ema_decay=0.9"))
    names = ["my-000002", "my-000002-ema", "my", "my-ema"]  # the first epoch's two files are gone
    assert {path.name for path in (tmp_path / "with").iterdir()} == {f"{name}.safetensors" for name in names}
    raw, averaged = (tmp_path / "with" / f"{name}.safetensors" for name in ("my", "my-ema"))
    assert difference(tmp_path / "without" / "my.safetensors", raw) == 0
    assert 0 < distance(raw, averaged) < 0.5
    entries = []
    for path in (raw, averaged):
        with safe_open(path, "pt") as file:
            entries.append(file.metadata())
        hashes = content_hashes(load_file(path), entries[-1])
        assert {name: entries[-1].pop(name) for name in hashes} == hashes
    assert entries[1].pop("ss_ema_decay") == "0.9"
    assert entries[0] == entries[1]


def test_previews_draw_with_the_average_unless_told_otherwise(
    job: Job, tmp_path: Path, train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from library.training.weights import Weights

    used = []
    original = Weights.in_use
    monkeypatch.setattr(
        Weights, "in_use", lambda self, averaged=False: (used.append(averaged), original(self, averaged))[1]
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc --w 64 --h 64 --s 1\n", "utf-8")
    flags = [*CACHED, f"--sample_prompts={prompts}", "--sample_every_n_epochs=1", "--max_train_epochs=1"]
    for more, drawn_with in (
        (["--ema_decay=0.9"], True),
        (["--ema_decay=0.9", "--sample_weights=raw"], False),
        ([], False),
    ):
        used.clear()
        train(job.train_flags(tmp_path / f"{len(more)}{drawn_with}", *flags, *more))
        assert used[0] == drawn_with


def test_two_processes_follow_the_same_schedule(job: Job, tmp_path: Path) -> None:
    # defect 44: a warm-up of N steps took N / processes steps there
    two_processes = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    more = [
        "--lr_scheduler=cosine",
        "--lr_warmup_steps=4",
        "--gradient_accumulation_steps=1",
        "--ema_decay=0.9",
        *CACHED,
    ]
    flags = ["--optimizer_type=SGD", "--learning_rate=10", "--max_train_epochs=3", *more]
    two = launch(
        *two_processes,
        "--dynamo_backend",
        "no",
        "lumina_train_network.py",
        *job.train_flags(tmp_path / "two", "--train_batch_size=1", *flags),
        environment={"ACCELERATE_USE_CPU": "true"},
    )
    assert two.returncode == 0, two.stderr
    one = python("lumina_train_network.py", *job.train_flags(tmp_path / "one", "--train_batch_size=2", *flags))
    assert one.returncode == 0, one.stderr
    for name in ("my.safetensors", "my-ema.safetensors"):
        # Plain SGD moves by rate times gradient, so that another rate at any step shows at once. What differs is the
        # order of float32 sums: measured 1.4e-6.
        assert difference(tmp_path / "one" / name, tmp_path / "two" / name) < 1e-4
