"""--debug_dataset as a user types it."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_helpers import NUM_PICTURES, Job, log_lines, python
from PIL import Image

import lumina_train_network


def test_the_page_is_written_and_the_program_ends(job: Job, output: Path) -> None:
    # defect 47: it never ended
    flags = ["--debug_dataset", "--flip_aug", "--color_aug", "--gemma2_max_token_length=30"]
    done = python("lumina_train_network.py", *job.train_flags(output, *flags))
    assert done.returncode == 0, done.stderr
    (path,) = output.iterdir()
    assert path.name == "debug_dataset.html"
    page = path.read_text(encoding="utf-8")
    assert page.count("<figure") == page.count("base64,") == NUM_PICTURES
    # The longest caption: the page strikes out the end of it.
    assert "<del>" in page
    last = log_lines(done)[-1]
    assert last.startswith(f"{NUM_PICTURES} of the {NUM_PICTURES} showings of epoch 1 are shown in {path}")


def test_no_model_is_read_and_no_repository_is_made(
    job: Job,
    output: Path,
    train: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a model was read")

    for name in ("load_text_encoder", "load_autoencoder", "load_model"):
        monkeypatch.setattr(lumina_train_network.LuminaNetworkTrainer, name, never)
    monkeypatch.setattr("library.training.hub.HubUploads", never)  # it makes the repository
    flags = ["--debug_dataset", "--cache_latents", "--cache_text_encoder_outputs_to_disk"]
    with caplog.at_level(logging.INFO):
        train(job.train_flags(output, *flags, "--huggingface_repo_id=me/my"))
    assert [path.name for path in output.iterdir()] == ["debug_dataset.html"]


def test_varied_and_transparent_pictures_are_trained_on(job: Job, output: Path, train: Callable[..., None]) -> None:
    pictures = output.with_name("pictures")
    pictures.mkdir()
    for source in job.pictures.glob("*.png"):
        with Image.open(source) as image:
            image.putalpha(image.getchannel("R"))
            image.save(pictures / source.name)
    job = dataclasses.replace(job, pictures=pictures)
    for number, flags in enumerate((["--cache_latents"], ["--random_crop", "--color_aug"])):
        folder = output.with_name(f"out{number}")
        train(job.train_flags(folder, "--alpha_mask", "--max_train_steps=2", "--max_train_epochs=1", *flags))
        assert (folder / "my.safetensors").is_file()


def test_contradictions_end_before_anything_is_read(job: Job, output: Path) -> None:
    done = python("lumina_train_network.py", *job.train_flags(output, "--color_aug", "--cache_latents_to_disk"))
    assert done.returncode == 2
    (line,) = log_lines(done)
    assert "--color_aug gives a picture other pixels at each showing" in line
    assert not output.exists()
