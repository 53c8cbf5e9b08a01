"""Held-out pictures and preserved outputs in whole runs, with one process and with two."""

from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_helpers import Job, difference, launch, log_lines, python
from test_two_processes import ON_CPU, TWO

DATASET = """
[general]
caption_extension = ".txt"
enable_bucket = true
bucket_reso_steps = 16
flip_aug = true
shuffle_caption = true
validation_seed = 3
[[datasets]]
resolution = 96
batch_size = {batch_size}
min_bucket_reso = 32
max_bucket_reso = 256
[[datasets.subsets]]
image_dir = '{pictures}'
validation_split = 0.4
[[datasets.subsets]]
image_dir = '{other}'
custom_attributes = {{ diff_output_preservation = true }}
"""


@pytest.fixture
def dataset(job: Job, tmp_path: Path) -> Callable[[int], str]:
    """Writes the dataset file; a second folder holds other pictures, whose output is to be preserved."""
    from PIL import Image

    other = tmp_path / "other"
    other.mkdir()
    for number in range(3):
        Image.new("RGB", (96, 96), (80 * number, 40, 200)).save(other / f"o{number}.png")
        (other / f"o{number}.txt").write_text(f"plain colour {number}", encoding="utf-8")

    def write(batch_size: int) -> str:
        path = tmp_path / f"data{batch_size}.toml"
        path.write_text(DATASET.format(batch_size=batch_size, pictures=job.pictures, other=other), encoding="utf-8")
        return f"--dataset_config={path}"

    return write


def flags(job: Job, output: Path, *more: str) -> list[str]:
    given = [flag for flag in job.train_flags(output) if not flag.startswith("--train_data_dir")]
    return [*given, "--network_train_unet_only", "--network_dropout=0.2", *more]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = folder.rglob("events.*")
    log = EventAccumulator(str(events.parent))
    log.Reload()
    return {name: [(event.step, event.value) for event in log.Scalars(name)] for name in log.Tags()["scalars"]}


def test_validation_is_logged_and_leaves_the_training_alone(
    job: Job, tmp_path: Path, dataset: Callable[[int], str]
) -> None:
    """defects 10, 11 and 68"""
    steps = "--validate_every_n_steps=2"
    logs = f"--logging_dir={tmp_path / 'logs'}"
    both = [steps, "--validate_every_n_epochs=1", logs]
    done = python("lumina_train_network.py", *flags(job, tmp_path / "a", dataset(1), *both))
    assert done.returncode == 0, done.stderr
    # In a process of its own too: another number of threads would add up in another order.
    without = python("lumina_train_network.py", *flags(job, tmp_path / "b", dataset(1), "--validate_every_n_epochs=99"))
    assert without.returncode == 0, without.stderr
    assert difference(tmp_path / "a" / "my.safetensors", tmp_path / "b" / "my.safetensors") == 0
    found = scalars(tmp_path / "logs")
    bands = {f"loss/validation/sigma_{low:.2f}-{low + 0.25:.2f}" for low in (0, 0.25, 0.5, 0.75)}
    averages = {f"loss/validation/{unit}_{what}" for unit in ("step", "epoch") for what in ("average", "divergence")}
    assert bands | averages <= found.keys()
    assert {"speed/images_per_s", "norm/gradient", "norm/lora", "loss/average", "lr/unet"} <= found.keys()
    assert any(name.startswith("loss/sigma_") for name in found)
    # Five pictures, of which two are held out, and three others: six steps an epoch, two epochs.
    assert [step for step, _ in found["loss/validation/step_average"]] == [2, 4, 6, 8, 10, 12]
    assert [step for step, _ in found["loss/validation/epoch_average"]] == [6, 12]
    assert found["loss/validation/epoch_average"][0][1] == found["loss/validation/step_average"][2][1]
    at_step = dict(found["loss/average"])
    for (step, average), (_, divergence) in zip(
        found["loss/validation/step_average"], found["loss/validation/step_divergence"], strict=True
    ):
        # TensorBoard keeps float32.
        assert divergence == pytest.approx(average - at_step[step], abs=1e-6)
    assert sum(line.startswith("Validation loss after step") for line in log_lines(done)) == 6


def test_two_processes_equal_one_with_twice_the_batch(job: Job, tmp_path: Path, dataset: Callable[[int], str]) -> None:
    """defect 23 with several processes, of which some have no picture whose output is preserved."""
    found = {}
    for name, start, size in (
        ("two", lambda *given: launch(*TWO, "lumina_train_network.py", *given, environment=ON_CPU), 1),
        ("one", lambda *given: python("lumina_train_network.py", *given), 2),
    ):
        logs = tmp_path / f"logs-{name}"
        done = start(*flags(job, tmp_path / name, dataset(size), f"--logging_dir={logs}"))
        assert done.returncode == 0, done.stderr
        found[name] = scalars(logs)
    # Same draws, other order of float32 sums, as in test_two_processes.
    assert difference(tmp_path / "one" / "my.safetensors", tmp_path / "two" / "my.safetensors") < 5e-3
    compared = [name for name in found["one"] if name.startswith(("loss/", "norm/gradient"))]
    assert found["one"].keys() == found["two"].keys()
    for name in compared:
        for (step, one), (_, two) in zip(found["one"][name], found["two"][name], strict=True):
            assert one == pytest.approx(two, rel=2e-3), (name, step)
