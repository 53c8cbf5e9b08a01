"""What the log says of pictures and captions: each fault once, and nothing where there is none."""

import logging
from pathlib import Path
from typing import Any

import pytest
from data_helpers import build, make_pictures

from library.data import summary
from library.data.dataset import TrainingData
from library.errors import DatasetError

ONE = (64, 64)


def _said(caplog: pytest.LogCaptureFixture, folder: Path, **changes: Any) -> tuple[TrainingData, list[str]]:
    caplog.clear()
    caplog.set_level(logging.INFO)
    data = build(folder, **changes)
    return data, [f"{record.levelname}: {record.getMessage()}" for record in caplog.records]


def _write(folder: Path, *names: str, text: str = "x") -> None:
    for name in names:
        (folder / name).write_text(text, encoding="utf-8")


def test_nothing_is_said_of_a_folder_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_pictures(tmp_path, {"a.png": ONE, "me_1_2_3_4.png": ONE}, captions=False)
    _write(tmp_path, "a.txt", "me.txt", "notes.md", "a.caption", "a.psd", "a.tif", ".b.gif", "._a.txt")
    assert _said(caplog, tmp_path)[1] == []


def test_lines_that_are_not_read_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_pictures(tmp_path, {f"{name}.png": ONE for name in "abc"})
    _write(tmp_path, "a.txt", "b.txt", text="A cat.\r\n\r\n  It sits on {red|blue} grass,\ngreen\n")
    data, said = _said(caplog, tmp_path)
    assert [item.caption for item in data.items] == ["A cat.", "A cat.", "a c, tag"]
    assert said == [
        "WARNING: 2 of 3 caption files have more than one line, of which only the first is read (join_caption_lines reads"
        " all lines as one caption, enable_wildcard one of them by chance): those of a.png, b.png"
    ]
    data, said = _said(caplog, tmp_path, join_caption_lines=True)
    whole = "A cat. It sits on {red|blue} grass, green"
    assert [item.caption for item in data.items] == [whole, whole, "a c, tag"]
    assert data.draw(0, 1, 0).caption == whole
    assert summary.tag_frequency(data.items)[tmp_path.name]["a cat. it sits on {red|blue} grass"] == 2
    assert summary.dataset_summaries(data)[0]["subsets"][0]["join_caption_lines"] is True
    assert said == []
    data, said = _said(caplog, tmp_path, enable_wildcard=True)
    assert data.items[0].caption == "A cat.\nIt sits on {red|blue} grass,\ngreen"
    assert "join_caption_lines" not in summary.dataset_summaries(data)[0]["subsets"][0]
    assert said == []


def test_two_datasets_of_a_folder_may_read_it_differently(tmp_path: Path) -> None:
    make_pictures(tmp_path / "p", {"a.png": ONE})
    _write(tmp_path / "p", "a.txt", text="one\ntwo")
    dataset = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'p'\ncaption_extension = '.txt'\n"
    path = tmp_path / "d.toml"
    path.write_text(dataset + dataset + "join_caption_lines = true\n", encoding="utf-8")
    data = build(tmp_path, dataset_config=path, train_data_dir=None)
    assert [item.caption for item in data.items] == ["one", "one two"]


def test_pictures_that_are_not_read_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_pictures(tmp_path, {"a.png": ONE})
    _write(tmp_path, "b.GIF", "c.jfif", "c.txt")
    _, (said,) = _said(caplog, tmp_path)
    assert said == (
        f"WARNING: 2 pictures are of a kind that is not read: {tmp_path / 'b.GIF'}, {tmp_path / 'c.jfif'}; save as .png or"
        " .jpg (a .jfif needs only that name)"
    )


def test_a_folder_with_nothing_else_says_so(tmp_path: Path) -> None:
    _write(tmp_path, "b.tif")
    with pytest.raises(
        DatasetError, match=r"nothing to train on; 1 picture is of a kind that is not read: b\.tif; save"
    ):
        build(tmp_path)
    path = tmp_path / "d.toml"
    path.write_text(f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = {str(tmp_path)!r}\n", encoding="utf-8")
    with pytest.raises(DatasetError, match=r"sub-folders are not searched\); 1 picture is of a kind that is not read"):
        build(tmp_path, dataset_config=path, train_data_dir=None)


def test_caption_files_without_a_picture_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_pictures(tmp_path, {"a.png": ONE})
    _write(tmp_path, "gone.txt")
    assert _said(caplog, tmp_path)[1] == [f"INFO: 1 caption file has no picture: {tmp_path / 'gone.txt'}"]
    _write(tmp_path, "b.txt")
    files = f"{tmp_path / 'b.txt'}, {tmp_path / 'gone.txt'}"
    assert _said(caplog, tmp_path)[1] == [f"INFO: 2 caption files have no picture: {files}"]


def test_captions_with_another_extension_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_pictures(tmp_path, {f"{name}.png": ONE for name in "abcd"})
    (tmp_path / "d.txt").rename(tmp_path / "d.cap")
    _write(tmp_path, "a.caption")
    _, said = _said(caplog, tmp_path, caption_extension=".caption")
    assert said == [
        "WARNING: 3 of 4 pictures have no caption in a .caption file and are trained with an empty caption: b.png, c.png,"
        " d.png",
        "WARNING: 2 of these pictures have a .txt file, which is not read: b.txt, c.txt; set caption_extension to .txt, or"
        " name these files .caption",
        "WARNING: 1 of these pictures has a .cap file, which is not read: d.cap; set caption_extension to .cap, or name"
        " these files .caption",
    ]
