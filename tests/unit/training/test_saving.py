"""File names and rotation."""

from pathlib import Path

import pytest

from library.errors import UserError
from library.training.output_files import companion
from library.training.output_settings import OutputSettings, StateSettings
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


def states_of(folder: Path, num_epochs: int = 5, steps_per_epoch: int = 4, **values: object) -> list[str]:
    """Returns the names of the states left after a run."""
    folder.mkdir(exist_ok=True)
    state_flags = {name: values.pop(name) for name in list(values) if "state" in name}

    def write_state(path: Path, events_done: bool) -> None:
        (path / "content").mkdir(parents=True)

    saver = Saver(
        OutputSettings(output_dir=folder, **values),  # type: ignore[arg-type]
        num_epochs,
        lambda path, *_: path.write_text("x") and None,
        StateSettings(**{"save_state": True, **state_flags}),  # type: ignore[arg-type]
        write_state,
    )
    step = 0
    for epoch in range(1, num_epochs + 1):
        for _ in range(steps_per_epoch):
            step += 1
            saver.after_step(step, epoch - 1)
            saver.state_after_step(step)
        saver.after_epoch(epoch, step)
        saver.state_after_epoch(epoch)
    saver.at_end(step, num_epochs)
    return sorted(path.name for path in folder.glob("*-state"))


def test_states_stand_beside_files(tmp_path: Path) -> None:
    names = states_of(tmp_path, output_name="my", save_every_n_steps=8, save_every_n_epochs=3)
    assert names == ["my-000003-state", "my-state", "my-step00000008-state", "my-step00000016-state"]
    assert states_of(tmp_path / "nameless", num_epochs=1, save_every_n_steps=4) == [
        "at-step00000004-state",
        "last-state",
    ]


def test_states_only_at_the_end_or_not_at_all(tmp_path: Path) -> None:
    flags = {"output_name": "my", "save_every_n_epochs": 1}
    assert states_of(tmp_path / "a", save_state=False, **flags) == []
    assert states_of(tmp_path / "b", save_state=False, save_state_on_train_end=True, **flags) == ["my-state"]


def test_states_are_kept_as_files_are_unless_said_otherwise(tmp_path: Path) -> None:
    flags = {"output_name": "my", "save_every_n_epochs": 1, "save_last_n_epochs": 2}
    assert states_of(tmp_path / "a", **flags) == ["my-000003-state", "my-000004-state", "my-state"]
    assert states_of(tmp_path / "b", save_last_n_epochs_state=1, **flags) == ["my-000004-state", "my-state"]
    steps = {"output_name": "my", "save_every_n_steps": 2, "save_last_n_steps_state": 4}
    # The states of the last 4 steps, as the files of --save_last_n_steps.
    assert states_of(tmp_path / "c", **steps) == [
        "my-state",
        "my-step00000016-state",
        "my-step00000018-state",
        "my-step00000020-state",
    ]


def test_states_that_a_killed_run_left_go_too(tmp_path: Path) -> None:
    for step in (3, 5, 9):
        (tmp_path / f"my-step{step:08d}-state").mkdir()
    names = states_of(tmp_path, output_name="my", save_every_n_steps=4, save_last_n_steps=3)
    assert names == ["my-state", "my-step00000020-state"]


def test_what_cannot_be_written_on_the_way_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    full = True

    def write(path: Path, step: int, epoch: int) -> None:
        if full:
            raise OSError(28, "No space left on device")
        path.write_text("x")

    def write_state(path: Path, events_done: bool) -> None:
        raise OSError(28, "No space left on device") if full else TypeError("memory.x is a set")

    settings = OutputSettings(output_dir=tmp_path, output_name="my", save_every_n_steps=1)
    saver = Saver(settings, 1, write, StateSettings(save_state=True), write_state)
    saver.after_step(1, 0)
    saver.state_after_step(1)
    assert "my-step00000001.safetensors is not saved" in caplog.text
    assert "my-step00000001-state is not saved: [Errno 28] No space" in caplog.text
    full = False
    saver.after_step(2, 0)
    saver.state_after_step(2)
    assert "my-step00000002-state is not saved: memory.x is a set" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["my-step00000002.safetensors"]


def test_an_interrupt_saves_no_state_of_half_an_update(tmp_path: Path) -> None:
    def write_state(path: Path, events_done: bool) -> None:
        path.mkdir()

    def write(path: Path, *_: int) -> None:
        path.write_text("x")

    settings = OutputSettings(output_dir=tmp_path, output_name="my")
    saver = Saver(settings, 1, write, StateSettings(save_state=True), write_state)
    saver.at_interrupt(7, 0, is_whole=False)
    assert [path.name for path in tmp_path.iterdir()] == ["my-step00000007.safetensors"]
    saver.at_interrupt(8, 0)
    assert (tmp_path / "my-step00000008-state").is_dir()


def test_averages_are_removed_with_their_files_and_uploaded(tmp_path: Path) -> None:
    uploaded = []

    class Uploads:
        def file(self, path: Path, wait: bool = False) -> None:
            uploaded.append((path.name, wait))

        def state(self, folder: Path, wait: bool = False) -> None:
            uploaded.append((folder.name, wait))

    def write(path: Path, step: int, epoch: int) -> None:
        path.write_text("x")
        if step < 3:
            companion(path).write_text("x")

    settings = OutputSettings(output_dir=tmp_path, output_name="my", save_every_n_steps=1, save_last_n_steps=1)
    companion(tmp_path / "my.safetensors").write_text("of an earlier run")
    saver = Saver(settings, 1, write, StateSettings(save_state=True), lambda path, _: path.mkdir(), Uploads())
    for step in (1, 2, 3, 4):
        saver.after_step(step, 0)
    saver.at_end(4, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "my-ema.safetensors",
        "my-state",
        "my-step00000003.safetensors",
        "my-step00000004.safetensors",
        "my.safetensors",
    ]
    assert uploaded == [
        ("my-step00000001-ema.safetensors", False),
        ("my-step00000001.safetensors", False),
        ("my-step00000002-ema.safetensors", False),
        ("my-step00000002.safetensors", False),
        ("my-step00000003.safetensors", False),
        ("my-step00000004.safetensors", False),
        ("my.safetensors", True),
        ("my-state", True),
    ]
