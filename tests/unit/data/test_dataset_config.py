import json
import logging
from pathlib import Path
from typing import Any

import pytest
from data_helpers import make_pictures

from library.data.config import DatasetConfig, load_dataset_config
from library.data.settings import DataSettings
from library.errors import DatasetError, UserError

ONE = {"a.png": (64, 64)}


def _load(tmp_path: Path, toml: str, **flags: Any) -> tuple[DatasetConfig, ...]:
    """Reads a dataset file; ``$P`` in it is a folder with one picture."""
    folder = make_pictures(tmp_path / "pictures", ONE)
    path = tmp_path / "data.toml"
    path.write_text(toml.replace("$P", folder.as_posix()), encoding="utf-8")
    return load_dataset_config(DataSettings(dataset_config=path, **{"resolution": (64, 64), **flags}))


def test_precedence_is_subset_dataset_general_command_line(tmp_path: Path) -> None:
    for name in "bcd":
        make_pictures(tmp_path / name, ONE)
    toml = f"""
        [general]
        num_repeats = 3
        flip_aug = false
        batch_size = 5
        caption_dropout_rate = 1
        [[datasets]]
        num_repeats = 4
        class_tokens = "dataset"
        resolution = [128, 64]
        [[datasets.subsets]]
        image_dir = "$P"
        num_repeats = 5
        class_tokens = "subset"
        [[datasets.subsets]]
        image_dir = "{(tmp_path / "b").as_posix()}"
        [[datasets]]
        batch_size = 7
        [[datasets.subsets]]
        image_dir = "{(tmp_path / "c").as_posix()}"
        caption_extension = "cap"
    """
    first, second = _load(tmp_path, toml, flip_aug=True, dataset_repeats=2, train_batch_size=9, keep_tokens=6)
    assert [subset.num_repeats for subset in (*first.subsets, *second.subsets)] == [5, 4, 3]
    assert [subset.class_tokens for subset in (*first.subsets, *second.subsets)] == ["subset", "dataset", None]
    assert (first.batch_size, second.batch_size) == (5, 7)
    assert (first.resolution, second.resolution) == ((128, 64), (64, 64))
    for subset in (*first.subsets, *second.subsets):
        assert not subset.flip_aug  # false in the file goes before the flag
        assert subset.keep_tokens == 6
        assert subset.caption_dropout_rate == 1.0
    assert second.subsets[0].caption_extension == ".cap"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("num_repeat = 5", r"datasets\[0\]\.subsets\[1\]: unknown key num_repeat = 5 \(did you mean 'num_repeats'\?\)"),
        ("num_repeats = 'x'", r"subsets\[1\]: num_repeats = 'x' is not valid: expected a whole number"),
        ("num_repeats = 1.5", "num_repeats = 1.5 is not valid: expected a whole number"),
        ("keep_tokens = true", "keep_tokens = True is not valid: expected a whole number, at least 0"),
        ("flip_aug = 1", "flip_aug = 1 is not valid: expected true or false"),
        ("class_tokens = 3", "class_tokens = 3 is not valid: expected a text in quotes"),
        ("caption_dropout_rate = 2", "caption_dropout_rate = 2 is not valid: expected a number from 0 to 1"),
        ("resize_interpolation = 'sinc'", "resize_interpolation = 'sinc' is not valid: expected one of lanczos"),
        ("resolution = 512", r"resolution = 512 has no place here; it belongs into \[general\] or \[\[datasets\]\]"),
    ],
)
def test_wrong_keys_and_values_name_file_table_key_and_value(tmp_path: Path, body: str, message: str) -> None:
    toml = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir='$P'\n[[datasets.subsets]]\nimage_dir='$P'\n{body}\n"
    with pytest.raises(DatasetError, match=r"^--dataset_config: .*data\.toml: .*" + message):
        _load(tmp_path, toml)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[genral]\n", r"unknown table genral = \{\} \(did you mean 'general'\?\)"),
        ("shuffle_caption = true\n", r"shuffle_caption = True stands in no table; put it under \[general\]"),
        ("", r"there is no \[\[datasets\]\], so there is nothing to train on"),
        ("[datasets]\nresolution=64", r"datasets is not a list of tables: write \[\[datasets\]\] with double brackets"),
        ("[[datasets]]\nresolution=64", r"datasets\[0\]: there is no \[\[datasets.subsets\]\]"),
        ("[[datasets]]\n[[datasets.subsets]]\nnum_repeats=1", r"subsets\[0\]: image_dir, .* is missing"),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir='no/such'",
            r"image_dir = 'no/such' does not exist \(looked in",
        ),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir='$P/a.png'", r"image_dir = '.*a.png' is not a folder"),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir='$P/..'",
            r"holds no pictures \(sub-folders are not searched\)",
        ),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir='$P'\nnum_repeats=0", r"datasets\[0\]: no subset is left"),
        ("[[datasets]]\nbatch_size = \n", r"--dataset_config: .*data\.toml: Invalid value \(at line 2"),
        (
            '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "C:\\pictures"\n',
            "at line 3.*forward slashes or in single quotes",
        ),
    ],
)
def test_broken_files(tmp_path: Path, toml: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        _load(tmp_path, toml)


@pytest.mark.parametrize(
    ("head", "flags", "message"),
    [
        ("", {"resolution": None}, "no training size is set; give resolution in the dataset file, or --resolution"),
        ("resolution=100", {}, r"datasets\[0\]: resolution 100,100 cannot be trained on without buckets"),
        ("resolution=128\nenable_bucket=true", {}, "min_bucket_reso is 256; set min_bucket_reso to at most 128"),
        ("resolution=2048\nenable_bucket=true", {}, "max_bucket_reso is 1024; set max_bucket_reso to at least 2048"),
        ("resolution=48\nenable_bucket=true", {}, "resolution 48,48 is smaller than bucket_reso_steps 64"),
        ("bucket_reso_steps=40", {}, "bucket_reso_steps = 40 is not valid: .*multiple of 16"),
    ],
)
def test_sizes_that_cannot_work(tmp_path: Path, head: str, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        _load(tmp_path, f"[[datasets]]\n{head}\n[[datasets.subsets]]\nimage_dir='$P'\n", **flags)


def test_bucket_limits_do_not_matter_without_upscaling(tmp_path: Path) -> None:
    toml = (
        "[[datasets]]\nresolution=128\nenable_bucket=true\nbucket_no_upscale=true\n[[datasets.subsets]]\nimage_dir='$P'"
    )
    assert _load(tmp_path, toml)[0].resolution == (128, 128)


def test_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toml = (
        "[general]\nnetwork_multiplier=0.5\n[[datasets]]\nnetwork_multiplier=1.0\nenable_bucket=true\nresolution=512\n"
        "min_bucket_reso=100\n[[datasets.subsets]]\nimage_dir='$P'\nnum_repeats=2\n[[datasets.subsets]]\nimage_dir='$P/'\n"
    )
    with caplog.at_level(logging.WARNING):
        (dataset,) = _load(tmp_path, toml, train_data_dir="elsewhere")
    assert [subset.num_repeats for subset in dataset.subsets] == [2]
    messages = [record.getMessage() for record in caplog.records]
    for text in (
        "--train_data_dir has no effect",
        "network_multiplier has no effect",
        "is already in this dataset; this subset is ignored",
        "min_bucket_reso 100 becomes 64",
    ):
        assert sum(text in message for message in messages) == 1, text


def test_relative_folders_from_here_then_from_the_files_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml = "[[datasets]]\n[[datasets.subsets]]\nimage_dir='pictures'\n"
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert _load(tmp_path, toml)[0].subsets[0].image_dir.resolve() == (tmp_path / "pictures").resolve()
    make_pictures(here / "pictures", ONE)
    assert _load(tmp_path, toml)[0].subsets[0].image_dir.resolve() == (here / "pictures").resolve()


def test_json_is_read_too_and_its_errors_have_a_line(tmp_path: Path) -> None:
    folder = make_pictures(tmp_path / "pictures", ONE)
    path = tmp_path / "data.json"
    content = {"general": {"num_repeats": None}, "datasets": [{"subsets": [{"image_dir": str(folder)}]}]}
    path.write_text(json.dumps(content), encoding="utf-8")
    settings = DataSettings(dataset_config=path, resolution=(64, 64), dataset_repeats=8)
    assert load_dataset_config(settings)[0].subsets[0].num_repeats == 8
    path.write_text('{\n"datasets": [,]}', encoding="utf-8")
    with pytest.raises(DatasetError, match=r"data\.json: line 2: "):
        load_dataset_config(settings)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.toml", None, "gone.toml does not exist or is not a file"),
        ("data.yaml", b"", "ends in neither .toml nor .json"),
        ("data.toml", b"\xff\xfe", "is not UTF-8 text"),
        ("list.json", b"[]", "holds no table"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        load_dataset_config(DataSettings(dataset_config=tmp_path / name))


def test_a_byte_order_mark_does_not_matter(tmp_path: Path) -> None:
    folder = make_pictures(tmp_path / "pictures", ONE)
    path = tmp_path / "data.toml"
    path.write_text(f"[[datasets]]\n[[datasets.subsets]]\nimage_dir='{folder.as_posix()}'", encoding="utf-8-sig")
    assert load_dataset_config(DataSettings(dataset_config=path, resolution=(64, 64)))


# Metadata files, masks, regularisation


def test_styles_may_be_mixed_and_a_metadata_file_needs_no_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "meta.jsonl").write_bytes(b"")
    toml = (
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir='$P'\n"
        "[[datasets.subsets]]\nmetadata_file='more/meta.jsonl'\nnum_repeats=2\n"
        "[[datasets.subsets]]\nmetadata_file='more/meta.jsonl'\nimage_dir='$P'\n"
    )
    (dataset,) = _load(tmp_path, toml)
    assert [(subset.image_dir, subset.metadata_file) for subset in dataset.subsets] == [
        (tmp_path / "pictures", None),
        (tmp_path / "more", tmp_path / "more" / "meta.jsonl"),
    ]
    assert "meta.jsonl is already in this dataset; this subset is ignored" in caplog.text


def test_masks_are_kept_with_masked_loss_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "masks").mkdir()
    toml = "[[datasets]]\n[[datasets.subsets]]\nimage_dir='$P'\nconditioning_data_dir='masks'\n" * 2
    assert _load(tmp_path, toml, masked_loss=True)[0].subsets[0].conditioning_data_dir == tmp_path / "masks"
    assert caplog.text == ""
    assert _load(tmp_path, toml)[0].subsets[0].conditioning_data_dir is None
    assert caplog.text.count("conditioning_data_dir has no effect, because --masked_loss is not given") == 1
    with pytest.raises(DatasetError, match=r"subsets\[0\]: conditioning_data_dir = 'gone' does not exist \(looked in"):
        _load(tmp_path, toml.replace("'masks'", "'gone'"), masked_loss=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("metadata_file = 'gone.json'", r"subsets\[0\]: metadata_file = 'gone.json' does not exist \(looked in"),
        ("metadata_file = '$P'", r"metadata_file = '.*pictures' is not a file"),
        ("metadata_file = '$P/a.txt'\nimage_dir = 'gone'", "image_dir = 'gone' does not exist"),
        ("is_reg = 1", "is_reg = 1 is not valid: expected true or false"),
        ("validation_split = 1.5", "validation_split = 1.5 is not valid: expected a number from 0 to 1"),
        ("prior_loss_weight = 1.0", "unknown key prior_loss_weight"),
    ],
)
def test_wrong_sources(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        _load(tmp_path, f"[[datasets]]\n[[datasets.subsets]]\n{line}\n")


def test_validation_split_on_every_level(tmp_path: Path) -> None:
    make_pictures(tmp_path / "b", ONE)
    # defect 55: sd-scripts' documentation shows it in a subset, where its schema refuses it; and 1 is a number too
    toml = (
        "[general]\nvalidation_split = 0.1\nvalidation_seed = 1\n"
        "[[datasets]]\nvalidation_split = 0.2\n[[datasets.subsets]]\nimage_dir='$P'\nvalidation_split = 1\n"
        "[[datasets.subsets]]\nimage_dir='b'\nvalidation_seed = 3\n"
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir='$P'\n"
    )
    first, second = _load(tmp_path, toml, validation_split=0.5, validation_seed=9)
    found = [(subset.validation_split, subset.validation_seed) for subset in (*first.subsets, *second.subsets)]
    assert found == [(1.0, 1), (0.2, 3), (0.1, 1)]


def test_a_dataset_without_subsets_is_an_error_in_every_form(tmp_path: Path) -> None:
    # defect 48: no subsets made a dataset of another style there, and empty data ended with exit code 0
    for toml in ("[[datasets]]\nresolution=64", "[[datasets]]\nsubsets=[]"):
        with pytest.raises(DatasetError, match=r"there is no \[\[datasets.subsets\]\]"):
            _load(tmp_path, toml)


# Without a file


def test_the_flags_of_a_run_without_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train/5_cat", "train/2_dog", "reg/3_animal"):
        make_pictures(tmp_path / name, ONE)
    (tmp_path / "masks" / "2_dog").mkdir(parents=True)
    flags = {
        "train_data_dir": str(tmp_path / "train"),
        "reg_data_dir": str(tmp_path / "reg"),
        "conditioning_data_dir": str(tmp_path / "masks"),
        "resolution": (64, 64),
    }
    (dataset,) = load_dataset_config(DataSettings(**flags, masked_loss=True))
    assert [
        (one.image_dir.name, one.num_repeats, one.class_tokens, one.is_reg, one.conditioning_data_dir)
        for one in dataset.subsets
    ] == [
        ("2_dog", 2, "dog", False, tmp_path / "masks" / "2_dog"),
        ("5_cat", 5, "cat", False, tmp_path / "masks"),
        ("3_animal", 3, "animal", True, None),
    ]
    (dataset,) = load_dataset_config(DataSettings(**flags))
    assert not any(one.conditioning_data_dir for one in dataset.subsets)
    for changes, message in (
        ({"conditioning_data_dir": "gone", "masked_loss": True}, "--conditioning_data_dir: gone does not exist"),
        ({"reg_data_dir": "gone"}, "--reg_data_dir: gone is not a folder"),
        ({"reg_data_dir": str(tmp_path / "masks")}, "--reg_data_dir: .*masks holds no pictures"),
        ({"in_json": "gone.json"}, "--in_json: gone.json does not exist"),
    ):
        with pytest.raises(DatasetError, match=message):
            load_dataset_config(DataSettings(**{**flags, **changes}))
    path = tmp_path / "data.toml"
    path.write_text(f"[[datasets]]\n[[datasets.subsets]]\nimage_dir='{tmp_path.as_posix()}/train/5_cat'", "utf-8")
    load_dataset_config(DataSettings(dataset_config=path, **flags, in_json="x"))
    assert (
        "--train_data_dir, --reg_data_dir, --in_json, --conditioning_data_dir have no effect, because --dataset_config"
        in caplog.text
    )


def _load_folder(folder: Path, **flags: Any) -> DatasetConfig:
    (dataset,) = load_dataset_config(DataSettings(train_data_dir=str(folder), resolution=(64, 64), **flags))
    return dataset


def test_named_sub_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("10_my cat_x", "2_dog [1]", "3", "notes", "0_none"):
        make_pictures(tmp_path / name, ONE)
    (tmp_path / "4_empty").mkdir()
    (tmp_path / "lumina_cache").mkdir()
    make_pictures(tmp_path, {"loose.png": (64, 64)})
    with caplog.at_level(logging.WARNING):
        dataset = _load_folder(tmp_path)
    found = [(subset.image_dir.name, subset.num_repeats, subset.class_tokens) for subset in dataset.subsets]
    assert found == [("10_my cat_x", 10, "my cat_x"), ("2_dog [1]", 2, "dog [1]"), ("3", 3, None)]
    messages = "\n".join(record.getMessage() for record in caplog.records)
    assert "not used: notes" in messages
    assert "0_none is not used: its repeat count is 0" in messages
    assert "4_empty is not used: it holds no pictures" in messages
    assert "pictures beside the sub-folders are not used, for example loose.png" in messages
    assert "lumina_cache" not in messages


def test_flat_folder(tmp_path: Path) -> None:
    make_pictures(tmp_path, ONE)
    dataset = _load_folder(tmp_path, dataset_repeats=7, train_batch_size=3)
    assert [(subset.image_dir, subset.num_repeats, subset.class_tokens) for subset in dataset.subsets] == [
        (tmp_path, 7, None)
    ]
    assert dataset.batch_size == 3


def test_a_named_sub_folder_in_the_place_of_its_parent_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_pictures(tmp_path / "train" / "10_mira girl", ONE)
    dataset = _load_folder(folder, dataset_repeats=2)
    assert [(subset.num_repeats, subset.class_tokens) for subset in dataset.subsets] == [(2, None)]
    assert caplog.messages == [
        f"--train_data_dir: {folder} is taken as a plain folder: its pictures are shown 2 times an epoch, and those without"
        f" a caption file have none. --train_data_dir {folder.parent} takes 10 repeats and the words 'mira girl' from its"
        " name, and every other sub-folder N_words too"
    ]
    caplog.clear()
    monkeypatch.chdir(folder)
    _load_folder(Path())
    assert f"--train_data_dir {folder.parent} takes 10 repeats" in caplog.text
    caplog.clear()
    _load_folder(folder.parent)
    for name in ("2024_holidays", "10", "10_", "0_none", "zorp"):
        _load_folder(make_pictures(tmp_path / name, ONE))
    assert not caplog.messages


def test_folders_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds no pictures, and no sub-folder named N_name"):
        _load_folder(tmp_path)
    with pytest.raises(DatasetError, match="gone is not a folder"):
        _load_folder(tmp_path / "gone")
    with pytest.raises(DatasetError, match="give --dataset_config"):
        load_dataset_config(DataSettings())


@pytest.mark.parametrize("key", ["num_repeats", "image_dir"])
def test_a_key_that_stands_twice_in_json_is_named(tmp_path: Path, key: str) -> None:
    path = tmp_path / "data.json"
    subset = f'{{"{key}": 1, "class_tokens": "a", "{key}": 2}}'
    path.write_text(f'{{"datasets": [{{"subsets": [{subset}]}}]}}', encoding="utf-8")
    with pytest.raises(DatasetError, match=rf"data\.json: the key '{key}' stands twice"):
        load_dataset_config(DataSettings(dataset_config=path, resolution=(64, 64)))


@pytest.mark.parametrize("folder", ["~no_such_user_here/pictures", "~/no_such_folder_here"])
def test_a_folder_of_nobody_is_named(tmp_path: Path, folder: str) -> None:
    with pytest.raises(UserError, match=r"data\.toml: datasets\[0\]\.subsets\[0\].* image_dir.*no_such"):
        _load(tmp_path, f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{folder}"')
    with pytest.raises(UserError, match=r"--train_data_dir: .*no_such"):
        load_dataset_config(DataSettings(train_data_dir=folder, resolution=(64, 64)))
    with pytest.raises(UserError, match=r"--dataset_config: .*no_such"):
        load_dataset_config(DataSettings(dataset_config=Path(folder) / "data.toml"))
