import json
import logging
from pathlib import Path
from typing import Any

import pytest
from data_helpers import FakeAutoencoder, make_pictures

from library.data import summary
from library.data.config import SubsetConfig
from library.data.dataset import TrainingData
from library.data.metadata_file import read_metadata
from library.data.settings import DataSettings
from library.errors import DatasetError

ONE = (64, 64)


def _write(path: Path, entries: dict[str, Any]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(entries), encoding="utf-8")
    else:
        lines = [json.dumps({"image_path": key, **entry}, ensure_ascii=False) for key, entry in entries.items()]
        path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


def _read(folder: Path, path: Path, **changes: Any) -> list[tuple[str, str | None]]:
    return read_metadata(SubsetConfig(image_dir=folder, metadata_file=path, **changes))


@pytest.mark.parametrize("kind", [".json", ".jsonl"])
def test_keys_find_their_pictures_however_they_are_written(tmp_path: Path, kind: str) -> None:
    folder = make_pictures(tmp_path / "p [1]", {"a.png": ONE, "b.b.jpg": ONE, "ü.webp": ONE}, captions=False)
    make_pictures(folder / "sub", {"c.png": ONE, "d.png": ONE}, captions=False)
    elsewhere = make_pictures(tmp_path / "elsewhere", {"e.png": ONE, "f.png": ONE}, captions=False)
    # defect 25: relative keys never matched there, and absolute ones lost their pictures
    keys = [
        "a.png",
        "b.b",
        "./ü",
        "sub/c",
        str(folder / "sub" / "d.png"),
        str(elsewhere / "e"),
        "../elsewhere/f.png",
    ]
    path = _write(tmp_path / f"meta{kind}", {key: {"caption": key} for key in keys})
    found = dict(_read(folder, path))
    outside = {(elsewhere / "e.png").as_posix(): str(elsewhere / "e"), (elsewhere / "f.png").as_posix(): keys[6]}
    inside = {"a.png": "a.png", "b.b.jpg": "b.b", "ü.webp": "./ü", "sub/c.png": "sub/c", "sub/d.png": keys[4]}
    assert {Path(name).as_posix(): caption for name, caption in found.items()} == inside | outside
    for name in found:
        assert (folder / name).is_file()


def test_keys_relative_to_the_current_folder_are_found_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_pictures(tmp_path / "pictures", {"a.png": ONE, "b.png": ONE}, captions=False)
    monkeypatch.chdir(tmp_path)
    path = _write(tmp_path / "meta.json", {"pictures/a.png": {"tags": "x"}, "pictures\\b.png": {"tags": "y"}})
    assert _read(folder, path) == [("a.png", "x"), ("b.png", "y")]


@pytest.mark.parametrize(
    ("entry", "rules", "expected"),
    [
        ({"caption": "a cat"}, {}, "a cat"),
        ({"tags": "1cat, sky"}, {}, "1cat, sky"),
        ({"caption": "a cat", "tags": "1cat, sky"}, {}, "a cat,1cat, sky"),
        ({"caption": "a cat", "tags": "x"}, {"caption_separator": "; "}, "a cat; x"),
        ({"caption": "a cat", "tags": ["x", "y"]}, {"caption_separator": ", "}, "a cat, x, y"),
        ({"caption": "one\ntwo", "tags": "x"}, {}, "one,x"),
        ({"caption": "one\n\n two \r\n", "tags": "x"}, {"enable_wildcard": True}, "one,x\ntwo,x"),
        ({"caption": "one\n\n two \r\n", "tags": "x"}, {"join_caption_lines": True}, "one two,x"),
        ({"caption": "one", "tags": "x\ny"}, {"enable_wildcard": True}, "one,x,y"),
        ({"caption": "  ", "tags": ""}, {}, None),
        ({"caption": None}, {}, None),
        ({}, {}, None),
    ],
)
def test_tags_go_behind_the_caption(
    tmp_path: Path, entry: dict[str, Any], rules: dict[str, Any], expected: str | None
) -> None:
    make_pictures(tmp_path, {"a.png": ONE})  # its caption file is not read
    assert _read(tmp_path, _write(tmp_path / "m.jsonl", {"a": entry}), **rules) == [("a.png", expected)]


def test_what_does_not_fit_is_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_pictures(tmp_path, {"a.png": ONE, "b.png": ONE, "b.jpg": ONE})
    entries: dict[str, dict[str, Any]] = {
        key: {"caption": "x", "mood": 1} for key in ("a", "a.png", "b", "gone", "notes.txt", "a\0")
    }
    entries["b"]["caption"] = "one\ntwo"
    assert [name for name, _ in _read(tmp_path, _write(tmp_path / "meta.json", entries))] == ["a.png", "b.jpg"]
    messages = [record.getMessage() for record in caplog.records]
    path = tmp_path / "meta.json"
    assert messages == [
        f"{path} has 3 entries without a picture file, which are left out: gone, notes.txt, a\0",
        f"{path} names 1 pictures again; the first entry of each counts: a.png",
        f"{path} has 1 keys that fit several pictures, of which the first is used: b (b.jpg, b.png)",
        f"{path} has 1 captions of more than one line, of which only the first is read (join_caption_lines reads all lines"
        " as one caption, enable_wildcard one of them by chance): b",
        f"{path} has fields that are not used: mood (6)",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.json", b"{", r"m\.json: line 1: "),
        ("m.json", b"[]", "holds no table"),
        ("m.json", b'{"a": 3}', "'a': expected a table"),
        ("m.json", b'{"a": {"caption": 3}}', "'a': caption = 3 is not valid: expected a text"),
        ("m.jsonl", b'{"image_path": "a"}\n{"caption": "x"}', 'line 2: expected an object with a text "image_path"'),
        ("m.jsonl", b'{"image_path": "a"}\n{', r"m\.jsonl: line 2: "),
        ("m.json", b"\xff", "is not UTF-8 text"),
        ("m.txt", b"", r"ends in neither \.json nor \.jsonl"),
    ],
)
def test_broken_metadata_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    make_pictures(tmp_path, {"a.png": ONE})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        _read(tmp_path, tmp_path / name)


def test_sizes_come_from_the_files_and_not_from_hints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_pictures(tmp_path / "pictures", {"a.png": (96, 64), "img1.png": (64, 64), "img10.png": (64, 96)})
    # defect 26: a size taken from another picture's cache, whose name begins alike
    _write(tmp_path / "meta.json", {"a": {"image_size": [1, 1], "caption": "x"}, "img1": {"train_resolution": [8, 8]}})
    settings = DataSettings(in_json=str(tmp_path / "meta.json"), train_data_dir=str(folder), resolution=(64, 64))
    data = TrainingData.build(settings, 1, show_progress=False)
    assert [(item.name, item.size_px, item.caption) for item in data.items] == [
        ("a.png", (96, 64), "x"),
        ("img1.png", (64, 64), ""),
    ]
    assert "1 of 2 pictures have no caption in meta.json and are trained with an empty caption: img1.png" in caplog.text


def test_in_json_without_a_folder_and_with_regularisation(tmp_path: Path) -> None:
    make_pictures(tmp_path, {"a.png": ONE, "b.png": ONE})
    make_pictures(tmp_path / "reg" / "1_thing", {"r.png": ONE})
    _write(tmp_path / "meta.jsonl", {"a": {"caption": "x"}, "b.png": {"caption": "y"}})
    settings = DataSettings(
        in_json=str(tmp_path / "meta.jsonl"), reg_data_dir=str(tmp_path / "reg"), resolution=(64, 64), flip_aug=True
    )
    data = TrainingData.build(settings, 1, show_progress=False)
    assert [(item.path, item.caption, item.num_repeats) for item in data.items] == [
        (tmp_path / "a.png", "x", 1),
        (tmp_path / "b.png", "y", 1),
        (tmp_path / "reg" / "1_thing" / "r.png", "thing", 2),
    ]
    (one,) = summary.dataset_summaries(data)
    assert one["is_dreambooth"] is False
    assert [(subset["img_count"], subset["is_reg"], subset.get("metadata_file")) for subset in one["subsets"]] == [
        (2, False, "meta.jsonl"),
        (1, True, None),
    ]
    assert set(summary.tag_frequency(data.items)) == {"meta.jsonl", "1_thing"}


def test_a_second_start_with_cached_latents_finds_the_pictures_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # defect 25: absolute keys, no image_size, latents on disk: the second run took the cache file for the picture
    folder = make_pictures(tmp_path / "pictures", {"a.png": (96, 64), "b.png": ONE})
    make_pictures(folder / "sub", {"c.png": ONE})
    keys = [str(folder / "a.png"), str(folder / "b"), "sub/c"]
    meta = _write(tmp_path / "meta.json", {key: {"caption": f"x {key[-5:]}"} for key in keys})
    config = tmp_path / "data.toml"
    subset = f"[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\n"
    config.write_text(
        f"[[datasets]]\nresolution = 64\n{subset}metadata_file = '{meta.as_posix()}'\n"
        f"[[datasets]]\nresolution = 64\n{subset}caption_extension = '.txt'\n",
        encoding="utf-8",
    )
    found = []
    for encoded in (5, 0):
        data = TrainingData.build(DataSettings(dataset_config=config, cache_latents_to_disk=True), 1)
        encoder = FakeAutoencoder()
        data.fill_latents(encoder, "ae")
        assert encoder.encoded == encoded
        found.append([(item.path, item.size_px, item.caption) for item in data.items])
        assert all(item.path.is_file() for item in data.items)
    assert found[0] == found[1]
    assert len(found[0]) == 5
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("entries", [{}, {"elsewhere": {"caption": "x"}}])
def test_a_file_that_names_no_picture_is_what_is_blamed(tmp_path: Path, entries: dict[str, Any]) -> None:
    folder = make_pictures(tmp_path / "pictures", {"a.png": ONE})
    meta = _write(tmp_path / "meta.json", entries)
    with pytest.raises(DatasetError, match=r"No picture is left to train on: no entry of .*meta\.json fits a picture"):
        TrainingData.build(DataSettings(train_data_dir=folder, in_json=meta, resolution=(64, 64)), 1)
