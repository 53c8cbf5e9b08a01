"""Flags that the dataset file leaves no effect are named; all others are not."""

from pathlib import Path
from typing import Any

import pytest
from data_helpers import make_pictures

from library.data.config import load_dataset_config
from library.data.settings import DataSettings

ONE = {"a.png": (64, 64)}


@pytest.fixture
def load(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Returns a function (dataset file with $A and $B, flags, typed ones) -> what the log says."""
    folders = {name: make_pictures(tmp_path / name, ONE).as_posix() for name in "AB"}

    def load(toml: str, typed: tuple[str, ...] = (), **flags: Any) -> list[str]:
        for name, folder in folders.items():
            toml = toml.replace(f"${name}", folder)
        path = tmp_path / "data.toml"
        path.write_text(toml, encoding="utf-8")
        caplog.clear()
        load_dataset_config(DataSettings(dataset_config=path, **flags), typed)
        return [record.getMessage().replace(str(path), "FILE") for record in caplog.records]

    return load


FILE = """
[general]
batch_size = 2
flip_aug = false
[[datasets]]
resolution = 128
[[datasets.subsets]]
image_dir = "$A"
keep_tokens = 1
"""


def test_overridden_flags_are_named_with_what_the_file_says_and_where(load) -> None:
    flags = {"resolution": (512, 512), "train_batch_size": 7, "keep_tokens": 3, "flip_aug": True}
    assert load(FILE, **flags) == [
        "These flags have no effect, because FILE says otherwise: --resolution 512,512 (resolution = 128,128 in"
        " [[datasets]]), --train_batch_size 7 (batch_size = 2 in [general]), --keep_tokens 3 (keep_tokens = 1 in"
        " [[datasets.subsets]]), --flip_aug (flip_aug = false in [general]). Change the file, or remove its lines"
    ]


def test_flags_that_say_the_same_or_that_the_file_does_not_mention_are_not_named(load) -> None:
    assert load(FILE, resolution=(128, 128), train_batch_size=2, keep_tokens=1, shuffle_caption=True) == []


def test_a_default_counts_where_it_was_typed(load) -> None:
    assert load(FILE, train_batch_size=1) == []  # as front ends write it
    (line,) = load(FILE, ("train_batch_size",), train_batch_size=1)
    assert "--train_batch_size 1 (batch_size = 2 in [general])" in line


def test_a_flag_that_reaches_one_dataset_is_not_named(load) -> None:
    two = (
        FILE.replace("[general]\nbatch_size = 2", "[general]")
        + '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "$B"\n'
    )
    first_alone = two.replace("resolution = 128", "resolution = 128\nbatch_size = 2")
    assert load(first_alone, resolution=(512, 512), train_batch_size=7, keep_tokens=3) == []
    both = first_alone + "keep_tokens = 2\n"
    (line,) = load(both, resolution=(512, 512), keep_tokens=3)
    assert "--keep_tokens 3 (keep_tokens = 1 in [[datasets.subsets]], 2 in [[datasets.subsets]])" in line


def test_a_value_that_is_itself_overridden_is_not_shown(load) -> None:
    (line,) = load(FILE.replace("resolution = 128", "resolution = 128\nbatch_size = 4"), train_batch_size=7)
    assert "(batch_size = 4 in [[datasets]])" in line
