"""What a run's files are called, and which of an earlier run it says it is going to overwrite."""

import os
from pathlib import Path

import pytest

from library.errors import SettingsError
from library.training.arguments import TrainConfig, parse_arguments
from library.training.flag_notices import give_notices
from library.training.output_files import LoraNames, companion, warn_of_older_files


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


@pytest.mark.parametrize(
    ("flags", "there", "in_the_way"),
    [
        ([], ["my-000002.safetensors", "my-ema.safetensors", "my-state", "your.safetensors"], 0),
        ([], ["my.safetensors", "my-000002.safetensors"], 1),
        (["--save_every_n_epochs=2", "--max_train_epochs=4"], [f"my-00000{n}.safetensors" for n in range(1, 8)], 2),
        (["--save_every_n_steps=2", "--max_train_steps=3"], [f"my-step0000000{n}.safetensors" for n in (1, 2, 4)], 1),
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
    warn_of_older_files(parse(tmp_path, "--output_name=my", *flags))
    assert len(caplog.records) == (in_the_way > 0)
    assert ("1 more of its files and states" in caplog.text) == (in_the_way == 2)
    assert ("--resume=latest" in caplog.text) == (in_the_way > 0 and there[0].endswith("state"))


def test_the_file_is_named_with_its_date(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "my.safetensors"
    file.touch()
    os.utime(file, (10**9, 10**9))
    warn_of_older_files(parse(tmp_path, "--output_name=my"))
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
