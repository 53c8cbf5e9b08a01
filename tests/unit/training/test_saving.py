"""File names and rotation."""

from pathlib import Path

import pytest

from library.errors import UserError
from library.training.output_settings import OutputSettings
from library.training.saving import Saver


def run(folder: Path, num_epochs: int = 5, steps_per_epoch: int = 4, **values: object) -> tuple[list[str], list]:
    """Returns the names left after a run, and what each save was told."""
    calls: list[tuple[str, int, int]] = []

    def write(path: Path, step: int, epoch: int) -> None:
        path.write_text("x")
        calls.append((path.name, step, epoch))

    saver = Saver(OutputSettings(output_dir=folder, **values), num_epochs, write)  # type: ignore[arg-type]
    step = 0
    for epoch in range(1, num_epochs + 1):
        for _ in range(steps_per_epoch):
            step += 1
            saver.after_step(step, epoch - 1)
        saver.after_epoch(epoch, step)
    saver.at_end(step, num_epochs)
    return sorted(path.name for path in folder.iterdir()), calls


def test_epoch_files(tmp_path: Path) -> None:
    names, calls = run(tmp_path, output_name="my", save_every_n_epochs=2)
    assert names == ["my-000002.safetensors", "my-000004.safetensors", "my.safetensors"]
    assert calls[0] == ("my-000002.safetensors", 8, 2)
    assert calls[-1] == ("my.safetensors", 20, 5)


def test_the_last_epoch_is_the_final_file(tmp_path: Path) -> None:
    names, _ = run(tmp_path, output_name="my", save_every_n_epochs=1, num_epochs=2)
    assert names == ["my-000001.safetensors", "my.safetensors"]


def test_step_files_and_nameless(tmp_path: Path) -> None:
    names, calls = run(tmp_path, num_epochs=1, save_every_n_steps=2, save_model_as="pt", save_every_n_epochs=1)
    assert names == ["at-step00000002.pt", "at-step00000004.pt", "last.pt"]
    assert calls[0] == ("at-step00000002.pt", 2, 0)


@pytest.mark.parametrize(("keep", "left"), [(1, ["my-000004"]), (2, ["my-000003", "my-000004"])])
def test_last_n_epochs(tmp_path: Path, keep: int, left: list[str]) -> None:
    names, _ = run(tmp_path, output_name="my", save_every_n_epochs=1, save_last_n_epochs=keep)
    assert names == [*(f"{name}.safetensors" for name in left), "my.safetensors"]


def test_last_n_steps(tmp_path: Path) -> None:
    names, _ = run(tmp_path, output_name="my", save_every_n_steps=2, save_last_n_steps=4)
    # After step 20: 20 - 4 - 1 = 15, rounded down to 14, is the newest removed.
    assert names == [
        "my-step00000016.safetensors",
        "my-step00000018.safetensors",
        "my-step00000020.safetensors",
        "my.safetensors",
    ]


@pytest.mark.parametrize(("ratio", "files"), [(2, 2), (5, 4), (9, 4)])
def test_save_n_epoch_ratio(tmp_path: Path, ratio: int, files: int) -> None:
    names, _ = run(tmp_path, output_name="my", save_n_epoch_ratio=ratio)
    assert len(names) == files + 1


def test_a_file_that_cannot_be_written_goes_beside_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "my.safetensors").mkdir()  # as on Windows, where another program may hold the file
    saver = Saver(
        OutputSettings(output_dir=tmp_path, output_name="my"), 1, lambda path, *_: path.write_text("x") and None
    )
    written = saver.at_end(1, 1)
    assert written.is_file()
    assert written.name.startswith("my-2")
    assert "my.safetensors cannot be written" in caplog.text


def test_a_folder_that_takes_nothing_is_a_users_error(tmp_path: Path) -> None:
    def refuse(path: Path, step: int, epoch: int) -> None:
        raise OSError("disk full")

    saver = Saver(OutputSettings(output_dir=tmp_path, output_name="my"), 1, refuse)
    with pytest.raises(UserError, match="disk full"):
        saver.at_end(1, 1)
