"""What a run's files are called, and which of an earlier run it says it is going to overwrite."""

import os
import re
from pathlib import Path

import pytest

from library.errors import SettingsError
from library.training.arguments import TrainConfig, parse_arguments
from library.training.flag_notices import give_notices
from library.training.output_files import LoraNames, companion, warn_of_older_files
from library.training.report import RunPlan
from library.training.state import Position, StateContent, write_state


def parse(folder: Path, *more: str) -> TrainConfig:
    enough = [
        "--pretrained_model_name_or_path=model.safetensors",
        "--train_data_dir=pictures",
        "--resolution=256",
        f"--output_dir={folder}",
        "--network_module=networks.lora_lumina",
        "--learning_rate=1e-4",
    ]
    config = parse_arguments([*enough, *more])
    assert config is not None
    return config


def warn(config: TrainConfig) -> None:
    """Looks for older files in the way of a run of three batches an epoch."""
    warn_of_older_files(config, RunPlan.of(config.schedule, num_batches=3))


def test_names_are_sd_scripts(tmp_path: Path) -> None:
    named, nameless = LoraNames(tmp_path, "my", "safetensors"), LoraNames(tmp_path, None, "pt")
    found = [(names.of_epoch(2).name, names.of_step(30).name, names.final().name) for names in (named, nameless)]
    assert found == [
        ("my-000002.safetensors", "my-step00000030.safetensors", "my.safetensors"),
        ("epoch-000002.pt", "at-step00000030.pt", "last.pt"),
    ]
    for name in ("my-000002.safetensors", "my-000010.safetensors", "my-000002.pt", "your-000003.safetensors"):
        (tmp_path / name).touch()
    assert sorted(named.epochs()) == [2, 10]
    assert named.steps() == {}


FACTS = dict.fromkeys(("seed", "accumulation", "optimizer", "num_batches", "steps_per_epoch", "num_steps"), 1)
EPOCHS, STEPS = (
    [f"my-{n:06d}.safetensors" for n in range(1, 8)],
    [f"my-step{n:08d}.safetensors" for n in (1, 2, 4)],
)


@pytest.mark.parametrize(
    ("flags", "there", "in_the_way"),
    [
        ([], ["my-000002.safetensors", "my-ema.safetensors", "my-state", "your.safetensors"], 0),
        ([], ["my.safetensors", "my-000002.safetensors"], 1),
        (["--save_every_n_epochs=2", "--max_train_epochs=5"], EPOCHS, 2),
        (["--save_every_n_epochs=2", "--max_train_epochs=4"], EPOCHS, 1),  # the last epoch's file is the final one
        (["--save_every_n_epochs=1", "--max_train_steps=6"], EPOCHS, 1),  # of two epochs
        (["--save_n_epoch_ratio=2", "--max_train_epochs=6"], EPOCHS, 1),  # after the third
        (["--save_every_n_epochs=1", "--max_train_epochs=5", "--initial_epoch=3"], EPOCHS, 2),
        (["--save_every_n_epochs=1", "--max_train_epochs=5", "--initial_step=4"], EPOCHS, 3),  # inside the second
        (["--save_every_n_steps=1", "--max_train_steps=2"], STEPS, 2),
        (["--save_every_n_steps=2", "--max_train_steps=3"], STEPS, 1),
        (["--save_every_n_steps=1", "--max_train_steps=4", "--initial_step=2"], STEPS, 1),
        (["--ema_decay=0.99"], ["my.safetensors", "my-ema.safetensors"], 2),
        (["--save_state_on_train_end"], ["my-state"], 1),
        (["--save_state", "--save_every_n_epochs=1"], ["my-000001-state", "my-step00000001-state"], 1),
    ],
)
def test_what_will_be_overwritten_is_told_once(
    flags: list[str], there: list[str], in_the_way: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in there:
        (tmp_path / name).mkdir() if name.endswith("state") else (tmp_path / name).touch()
    warn(parse(tmp_path, "--output_name=my", *flags))
    assert len(caplog.records) == (in_the_way > 0)
    more = re.findall(r"as will (\d) more of its files and states", caplog.text)
    assert more == ([str(in_the_way - 1)] if in_the_way > 1 else [])
    assert "--resume=latest" not in caplog.text  # these folders are no states


def test_a_state_that_can_be_continued_is_offered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "my.safetensors").touch()
    content = StateContent(Position(3, 2, 1, 1), "r", FACTS, {}, {}, {}, {}, 1000.0)
    write_state(tmp_path / "my-000001-state", content)
    warn(parse(tmp_path, "--output_name=my"))
    assert caplog.messages[0].endswith(
        "another --output_name keeps it, and --resume=latest goes on from the last state"
    )


def test_the_file_is_named_with_its_date(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "my.safetensors"
    file.touch()
    os.utime(file, (10**9, 10**9))
    warn(parse(tmp_path, "--output_name=my"))
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{file} of 2001-09-0")  # 9 or 8, by the time zone
    assert "is from an earlier run and will be overwritten; another --output_name keeps it" in record.getMessage()


def test_averages_have_names_beside() -> None:
    assert companion(Path("my.v1-000002.safetensors")).name == "my.v1-000002-ema.safetensors"


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("mira.safetensors", "mira"),
        ("mira.SafeTensors", "mira"),
        ("mira.ckpt", "mira"),
        ("mira.pt.safetensors", "mira"),
        ("mira", "mira"),
        ("mira-v1.5", "mira-v1.5"),
        ("mirapt", "mirapt"),
    ],
)
def test_a_files_ending_is_no_part_of_the_name(
    given: str, used: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = parse(tmp_path, f"--output_name={given}")
    assert config.output.output_name == used
    with caplog.at_level("INFO"):
        give_notices(config)
    assert [record.getMessage() for record in caplog.records] == (
        []
        if given == used
        else [f"--output_name {given}: the ending is left out, because it is added anyway; the name is {used}"]
    )


def test_an_ending_alone_is_no_name(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--output_name: '' is no name for a file"):
        parse(tmp_path, "--output_name=.safetensors")
