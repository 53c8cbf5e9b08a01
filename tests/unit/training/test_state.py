"""States on disk: whole or not there, names, the newest, leftovers."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from lora_helpers import small_next_dit

from library import files
from library.training.nested import CannotBeKept
from library.training.state import (
    JSON_FILE,
    MEMORY_FILE,
    NETWORK_FILE,
    Position,
    StateContent,
    StateError,
    StateNames,
    is_complete,
    own_tensors,
    read_header,
    read_tensors,
    write_state,
)
from networks.lora_files import read_lora_file, to_factors
from networks.lora_lumina import create_network

FACTS = {
    "seed": 7,
    "accumulation": 1,
    "optimizer": "torch.optim.adamw.AdamW",
    "num_batches": 3,
    "steps_per_epoch": 3,
    "num_steps": 9,
}


def content(step: int = 3, written_at: float = 1000.0, **more: object) -> StateContent:
    whole = StateContent(
        position=Position(step, 2, 1, 1),
        run="r",
        facts=FACTS,
        settings={"learning_rate": 0.1},
        versions={"torch": "x"},
        network={"a.lora_up.weight": torch.arange(6, dtype=torch.bfloat16).view(2, 3)},
        memory={"updater": {"state": {0: {"step": torch.tensor(3.0), "d": float("inf")}}}, "tuple": (1, None)},
        written_at=written_at,
    )
    return dataclasses.replace(whole, **more)  # type: ignore[arg-type]


def test_it_comes_back(tmp_path: Path) -> None:
    write_state(tmp_path / "my-state", content())
    assert sorted(path.name for path in (tmp_path / "my-state").iterdir()) == [MEMORY_FILE, NETWORK_FILE, JSON_FILE]
    header = read_header(tmp_path / "my-state")
    network, memory = read_tensors(header)
    assert header.position == Position(3, 2, 1, 1)
    assert header.facts == FACTS
    assert network["a.lora_up.weight"].dtype == torch.bfloat16
    assert torch.equal(network["a.lora_up.weight"], content().network["a.lora_up.weight"])
    assert memory["tuple"] == (1, None)
    assert memory["updater"]["state"][0]["d"] == float("inf")
    assert memory["updater"]["state"][0]["step"] == torch.tensor(3.0)


def test_a_networks_part_is_a_lora_file(tmp_path: Path) -> None:
    """Of a run whose LoRA file is lost it can be drawn with, converted and trained on."""
    network = create_network(1.0, 4, 2.0, None, None, small_next_dit())
    own = own_tensors(network)
    assert own.keys() == network.state_dict().keys()
    files.write_safetensors(tmp_path / NETWORK_FILE, own, None)
    assert len(to_factors(read_lora_file(tmp_path / NETWORK_FILE), None, "")) == len(network.loras)


def test_a_new_one_replaces_an_old_one(tmp_path: Path) -> None:
    write_state(tmp_path / "s", content(3))
    write_state(tmp_path / "s", content(4))
    assert read_header(tmp_path / "s").position.step == 4
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_failed_one_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_state(tmp_path / "s", content(3))
    with pytest.raises(CannotBeKept):
        write_state(tmp_path / "s", content(4, memory={"updater": {1, 2}}))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        write_state(tmp_path / "s", content(4))
    assert read_header(tmp_path / "s").position.step == 3
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def damage_json(folder: Path, **values: object) -> None:
    document = json.loads((folder / JSON_FILE).read_text())
    (folder / JSON_FILE).write_text(json.dumps({**document, **values}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / NETWORK_FILE).unlink(), NETWORK_FILE),
        (lambda folder: (folder / MEMORY_FILE).write_bytes(b"short"), "has not the size"),
        (lambda folder: (folder / JSON_FILE).write_text("{"), JSON_FILE),
        (lambda folder: (folder / JSON_FILE).write_text("[]"), "not written by this program"),
        (lambda folder: damage_json(folder, version=99), "version is 99"),
        (lambda folder: damage_json(folder, position={"step": -1}), "position"),
        (lambda folder: damage_json(folder, position={"leap": 1}), JSON_FILE),
        (lambda folder: damage_json(folder, facts=None), JSON_FILE),
        (lambda folder: damage_json(folder, facts={"seed": 7}), "its facts lack accumulation"),
        (lambda folder: damage_json(folder, memory=None), "its memory is no table"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: object, says: str) -> None:
    write_state(tmp_path / "s", content())
    damage(tmp_path / "s")  # type: ignore[operator]
    assert not is_complete(tmp_path / "s")
    with pytest.raises(StateError, match=says) as caught:
        read_header(tmp_path / "s")
    assert str(tmp_path / "s") in str(caught.value)


def test_damaged_tensors_are_named(tmp_path: Path) -> None:
    write_state(tmp_path / "s", content())
    size = (tmp_path / "s" / MEMORY_FILE).stat().st_size
    (tmp_path / "s" / MEMORY_FILE).write_bytes(b"\xff" * size)
    with pytest.raises(StateError, match="cannot be read"):
        read_tensors(read_header(tmp_path / "s"))


@pytest.mark.parametrize(
    ("step", "expected"), [(0, (1, 0, 0)), (4, (1, 8, 0)), (5, (2, 0, 1)), (11, (3, 2, 2)), (250, (51, 0, 50))]
)
def test_the_position_of_a_step_with_accumulation(step: int, expected: tuple[int, int, int]) -> None:
    # defect 15: with accumulation the epoch was 4 instead of 1, and the step below 0.
    position = Position.of_step(step, steps_per_epoch=5, accumulation=2)
    assert (position.step, position.epoch, position.batch, position.finished_epochs) == (step, *expected)


class TestNames:
    def test_those_of_sd_scripts(self, tmp_path: Path) -> None:
        named, nameless = StateNames(tmp_path, "my"), StateNames(tmp_path, None)
        assert [named.of_epoch(2).name, named.of_step(30).name, named.final().name] == [
            "my-000002-state",
            "my-step00000030-state",
            "my-state",
        ]
        assert [nameless.of_epoch(2).name, nameless.of_step(30).name, nameless.final().name] == [
            "epoch-000002-state",
            "at-step00000030-state",
            "last-state",
        ]

    def test_the_newest_is_the_last_that_was_written(self, tmp_path: Path) -> None:
        names = StateNames(tmp_path, "my")
        assert names.newest() is None
        write_state(names.final(), content(90, written_at=1000.0))  # of a longer run before this one
        write_state(names.of_step(10), content(10, written_at=2000.0))
        write_state(names.of_epoch(3), content(30, written_at=3000.0))
        write_state(names.of_step(30), content(30, written_at=2900.0))
        write_state(StateNames(tmp_path, "my-other").of_step(99), content(99, written_at=9000.0))
        (tmp_path / "my-step00000040-state").mkdir()  # not complete
        newest = names.newest()
        assert newest is not None
        assert newest.path == names.of_epoch(3)

    def test_leftovers_of_this_run_go_and_others_stay(self, tmp_path: Path) -> None:
        names = StateNames(tmp_path, "my")
        ours = [".my-abcd_123.partial.safetensors", ".my-step00000010-ema-abcd1234.partial.safetensors"]
        others = [".my-other-abcd1234.partial.safetensors", ".my.safetensors", ".hidden-abcd1234", "my.safetensors"]
        for name in (*ours, *others):
            (tmp_path / name).write_text("x")
        for name in (".my-000002-state-abcd1234.partial", ".my-000001-state-abcd1234.removed"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "half").write_text("x")
        (tmp_path / "sample").mkdir()
        (tmp_path / "sample" / ".my_e000001_00_20260101000000_1-abcd1234.partial.png").write_text("x")
        assert len(names.remove_leftovers()) == 5
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "sample"])
        assert list((tmp_path / "sample").iterdir()) == []
        assert names.remove_leftovers() == []

    def test_real_temporary_names_are_recognised(self, tmp_path: Path) -> None:
        names = StateNames(tmp_path, "長い名前" * 16)  # 192 bytes
        for path in (names.of_step(1), names.folder / f"{names.final().name[:-6]}-step00000001-ema.safetensors"):
            writer = files.replacing_folder if path.name.endswith("-state") else files.replacing
            context = writer(path)
            temporary = context.__enter__()
            assert len(temporary.name.encode()) <= 255
            assert names.remove_leftovers() == [temporary.name]

    def test_a_complete_state_that_only_misses_its_name_gets_it(self, tmp_path: Path) -> None:
        names = StateNames(tmp_path, "my")
        write_state(names.of_step(10), content(10))
        names.of_step(10).replace(tmp_path / ".my-step00000010-state-abcd1234.partial")
        write_state(names.of_step(9), content(9))
        shutil.copytree(names.of_step(9), tmp_path / ".my-step00000009-state-abcd1234.partial")
        assert len(names.remove_leftovers()) == 2
        assert sorted(path.name for path in tmp_path.iterdir()) == ["my-step00000009-state", "my-step00000010-state"]


def test_ctrl_c_between_the_old_state_and_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_state(tmp_path / "s", content(3))
    real = files.remove_folder

    def interrupted(folder: Path) -> None:
        real(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "remove_folder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_state(tmp_path / "s", content(4))
    assert read_header(tmp_path / "s").position.step == 4
