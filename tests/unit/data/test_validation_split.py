import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import FakeAutoencoder, FakeProcesses, FakeTextEncoder, build, make_pictures

from library import files
from library.data.dataset import TrainingData
from library.data.settings import DataSettings
from library.data.sharing import Sharing
from library.errors import DatasetError
from library.training.metadata import dataset_entries

ONE = (64, 64)
TEN = {f"p{number}.png": ONE for number in range(10)}
MEMORY: dict[str, Any] = {"cache_latents": True}


def _names(items: Any) -> list[str]:
    return [item.name for item in items]


@pytest.mark.parametrize("count", range(1, 12))
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.5, 0.95])
def test_each_picture_is_on_exactly_one_side(tmp_path: Path, count: int, share: float) -> None:
    # defects 11 and 30: pictures in both lists, through separate shuffles and through ceil here, round there
    names = {f"p{number}.png": ONE for number in range(count)}
    make_pictures(tmp_path, names)
    if round(share * count) == count:
        with pytest.raises(DatasetError, match="holds out all"):
            build(tmp_path, validation_split=share, **MEMORY)
        return
    data = build(tmp_path, validation_split=share, **MEMORY)
    assert sorted(_names(data.items) + _names(data.validation_items)) == sorted(names)
    assert len(data.validation_items) == round(share * count)
    drawn = {draw.item.name for batch in data.plan_epoch(1, 1).batches for draw in batch.draws}
    assert drawn == set(_names(data.items))


def _contents(data: TrainingData) -> set[str]:
    return {files.sha256_of_file(item.path) for item in data.validation_items}


def test_the_choice_depends_on_seed_and_content_alone(tmp_path: Path) -> None:
    make_pictures(tmp_path / "a", TEN)
    (tmp_path / "b").mkdir()
    for number in range(10):
        shutil.copy(tmp_path / "a" / f"p{number}.png", tmp_path / "b" / f"{(number * 7) % 10} other.png")
    data = build(tmp_path / "a", validation_split=0.3, **MEMORY)
    renamed = build(tmp_path / "b", validation_split=0.3, dataset_repeats=5, **MEMORY)
    assert len(_contents(data)) == 3
    assert _contents(data) == _contents(renamed)
    # Without --validation_seed the run's seed decides; with it the run's seed does not matter.
    chosen = {frozenset(_contents(build(tmp_path / "a", seed, validation_split=0.3, **MEMORY))) for seed in range(6)}
    assert len(chosen) > 1
    fixed = [build(tmp_path / "a", seed, validation_split=0.3, validation_seed=7, **MEMORY) for seed in range(4)]
    assert len({frozenset(_contents(each)) for each in fixed}) == 1
    keys = [[draw.key for batch in each.validation_batches() for draw in batch.draws] for each in _filled(fixed)]
    assert keys == keys[:1] * 4


def _filled(runs: list[TrainingData]) -> list[TrainingData]:
    for data in runs:
        data.fill_latents(FakeAutoencoder(), "ae")
    return runs


def _two_folders(tmp_path: Path, one: str, two: str, general: str = "") -> TrainingData:
    config = tmp_path / "data.toml"
    folders = [f"image_dir = '{(tmp_path / name).as_posix()}'" for name in ("a", "b")]
    config.write_text(
        f"[general]\ncaption_extension = '.txt'\n{general}\n[[datasets]]\n"
        f"[[datasets.subsets]]\n{folders[0]}\n{one}\n[[datasets.subsets]]\n{folders[1]}\n{two}\n"
        f"[[datasets]]\nresolution = 128\n[[datasets.subsets]]\n{folders[0]}\n",
        encoding="utf-8",
    )
    settings = DataSettings(dataset_config=config, resolution=(64, 64), cache_latents=True)
    return TrainingData.build(settings, 1, show_progress=False)


def test_copies_lie_on_the_same_side_in_every_subset_and_dataset(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_pictures(tmp_path / "a", TEN)
    make_pictures(tmp_path / "b", {"other.png": (64, 70)})
    for number in range(10):
        shutil.copy(tmp_path / "a" / f"p{number}.png", tmp_path / "b" / f"copy{number}.png")
    shutil.copy(tmp_path / "a" / "p0.png", tmp_path / "a" / "p0 again.png")
    with caplog.at_level(logging.INFO):
        data = _two_folders(tmp_path, "validation_split = 0.3", "")
    held = _contents(data)
    assert len(held) == len(data.validation_items) == 3  # once, of the one subset that asks for it
    assert held.isdisjoint(files.sha256_of_file(item.path) for item in data.items)
    assert "copies of held-out pictures are neither trained on nor measured" in caplog.text
    # On every level: general, and a subset's own before it (defect 55: sd-scripts refuses it in a subset).
    data = _two_folders(tmp_path, "validation_split = 0", "validation_split = 0.5", "validation_split = 0.3")
    held = _contents(data)
    assert held.isdisjoint(files.sha256_of_file(item.path) for item in data.items)
    folders = [(item.dataset_index, item.subset.image_dir.name) for item in data.validation_items]
    assert (0, "a") not in folders
    assert folders.count((0, "b")) >= 5
    assert folders.count((1, "a")) >= 3


def test_whole_subsets_can_be_held_out(tmp_path: Path) -> None:
    make_pictures(tmp_path / "a", TEN)
    make_pictures(tmp_path / "b", {"v.png": (64, 70), "w.png": (64, 71)})
    data = _two_folders(tmp_path, "", "validation_split = 1")
    assert _names(data.validation_items) == ["v.png", "w.png"]
    assert {item.name for item in data.items} == set(TEN)
    # Broken pictures among them are left out as among the others.
    path = tmp_path / "b" / "v.png"
    path.write_bytes(path.read_bytes()[:1000])
    data = _two_folders(tmp_path, "", "validation_split = 1")
    data.fill_latents(FakeAutoencoder(), "ae")
    assert _names(data.validation_items) == ["w.png"]
    assert sum(len(batch.draws) for batch in data.validation_batches()) == 1


def test_metadata_subsets_are_split_too(tmp_path: Path) -> None:
    # defect 31: the whole set was used for both
    make_pictures(tmp_path, TEN)
    entries = ", ".join(f'"{name}": {{"caption": "of {name}"}}' for name in TEN)
    (tmp_path / "meta.json").write_text(f"{{{entries}}}", encoding="utf-8")
    settings = DataSettings(
        in_json=str(tmp_path / "meta.json"), resolution=(64, 64), validation_split=0.2, cache_latents=True
    )
    data = TrainingData.build(settings, 1, show_progress=False)
    assert (len(data.items), len(data.validation_items)) == (8, 2)
    assert all(item.caption == f"of {item.name}" for item in (*data.items, *data.validation_items))


def test_regularisation_pictures_are_never_held_out(tmp_path: Path) -> None:
    make_pictures(tmp_path / "train" / "1_cat", TEN)
    make_pictures(tmp_path / "reg" / "1_animal", {"x.png": (64, 80)})
    shutil.copy(tmp_path / "train" / "1_cat" / "p3.png", tmp_path / "reg" / "1_animal" / "y.png")
    for seed in range(5):
        settings = DataSettings(
            train_data_dir=str(tmp_path / "train"),
            reg_data_dir=str(tmp_path / "reg"),
            resolution=(64, 64),
            validation_split=0.7,
            cache_latents=True,
        )
        data = TrainingData.build(settings, seed, show_progress=False)
        assert {item.name for item in data.items if item.subset.is_reg} == {"x.png", "y.png"}
        assert len(data.validation_items) == round(0.7 * 9)
        assert "p3.png" not in _names(data.validation_items)  # the same picture is shown for regularisation


def test_a_share_of_less_than_one_picture_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_pictures(tmp_path, TEN)
    data = build(tmp_path, validation_split=0.04, **MEMORY)
    assert data.validation_items == ()
    assert f"validation_split 0.04 of the 10 pictures in {tmp_path} is less than one picture" in caplog.text


def test_nothing_left_to_train_on_is_an_error(tmp_path: Path) -> None:
    make_pictures(tmp_path, TEN)
    with pytest.raises(DatasetError, match="validation_split holds out all 10 pictures"):
        build(tmp_path, validation_split=1.0, **MEMORY)


AUGMENTED: dict[str, Any] = {
    "flip_aug": True,
    "shuffle_caption": True,
    "caption_dropout_rate": 0.9,
    "caption_dropout_every_n_epochs": 1,
    "caption_tag_dropout_rate": 0.9,
    "dataset_repeats": 3,
    "train_batch_size": 2,
}


def test_validation_batches_are_always_the_same_and_not_augmented(tmp_path: Path) -> None:
    # defect 68: augmentations and another order at each epoch
    make_pictures(tmp_path, TEN)
    data = build(tmp_path, validation_split=0.5, cache_text_encoder_outputs=True, **AUGMENTED, **MEMORY)
    data.fill_latents(FakeAutoencoder(), "ae")
    data.fill_captions([1], FakeTextEncoder(), "te")
    batches = list(data.validation_batches())
    draws = [draw for batch in batches for draw in batch.draws]
    assert sorted(draw.item.index for draw in draws) == [item.index for item in data.validation_items]
    assert sorted(len(batch.draws) for batch in batches) == [1, 2, 2]
    for batch in batches:
        assert batch.loss_weights.tolist() == [1.0] * len(batch.draws)
        for draw, latents, text in zip(batch.draws, batch.latents, batch.text, strict=True):
            assert (draw.epoch, draw.flip, draw.caption) == (0, False, f"a {Path(draw.item.name).stem}, tag")
            assert torch.equal(latents, data.latents.get(draw.item, False))
            assert len(text) == 1 + len(draw.caption)
    again = [draw for batch in data.validation_batches() for draw in batch.draws]
    assert again == draws
    assert [len(batch.draws) for batch in data.validation_batches(max_batches=1)] == [len(batches[0].draws)]
    assert not {draw.key for draw in draws} & {
        draw.key for batch in data.plan_epoch(1, 1).batches for draw in batch.draws
    }


def test_validation_is_split_over_processes_as_training_is(tmp_path: Path) -> None:
    make_pictures(tmp_path, TEN)
    one = build(tmp_path, validation_split=0.5, **{**AUGMENTED, "train_batch_size": 2})
    two = build(tmp_path, validation_split=0.5, **{**AUGMENTED, "train_batch_size": 1})
    whole = list(one.validation_batches())
    parts = [list(two.validation_batches(rank, 2)) for rank in range(2)]
    assert len(whole) == len(parts[0]) == len(parts[1]) == 3
    for batch, first, second in zip(whole, *parts, strict=True):
        assert batch.draws == (*first.draws, *second.draws)
        assert batch.num_global == first.num_global == second.num_global
    assert [len(batch.draws) for batch in parts[1]].count(0) == 1  # five pictures for two processes


@pytest.mark.parametrize("remembered", [{}, {"cache_info": True}, {"cache_latents_to_disk": True}])
def test_hashing_is_shared_and_remembered(
    tmp_path: Path, remembered: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_pictures(tmp_path / "pictures", TEN)
    hashed: list[str] = []
    real = files.sha256_of_file
    monkeypatch.setattr(files, "sha256_of_file", lambda path: hashed.append(path.name) or real(path))

    def run() -> list[TrainingData]:
        processes = FakeProcesses(2)
        settings = DataSettings(
            train_data_dir=str(folder), resolution=(64, 64), cache_latents=True, validation_split=0.3, **remembered
        )
        return processes.run(
            lambda rank: TrainingData.build(settings, 1, sharing=Sharing(rank, 2, processes.gather(rank)))
        )

    first, second = run()
    assert sorted(hashed) == sorted(TEN)
    assert first.validation_items == second.validation_items
    assert first.items == second.items
    hashed.clear()
    again, _ = run()
    assert again.validation_items == first.validation_items
    assert sorted(hashed) == ([] if remembered else sorted(TEN))
    assert (folder / "lumina_cache" / "pictures.json").exists() == bool(remembered)


def test_remembered_sizes_and_a_split_do_not_mix_pictures_up(tmp_path: Path) -> None:
    # defect 24: captions went to other pictures, and each start lost the validation part of the set
    folder = make_pictures(tmp_path / "pictures", {f"p{n}.png": (64 + 8 * n, 64) for n in range(10)})
    for _ in range(3):
        data = build(folder, validation_split=0.3, cache_info=True, cache_dir=tmp_path / "cache", **MEMORY)
        assert (len(data.items), len(data.validation_items)) == (7, 3)
        for item in (*data.items, *data.validation_items):
            number = int(item.name[1])
            assert (item.caption, item.size_px) == (f"a p{number}, tag", (64 + 8 * number, 64))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".json"]
    assert not (folder / "lumina_cache").exists()


def test_metadata_counts_them_apart(tmp_path: Path) -> None:
    make_pictures(tmp_path, TEN)
    entries = dataset_entries(build(tmp_path, validation_split=0.3, dataset_repeats=2, **MEMORY), 1, False)
    assert (entries["num_train_images"], entries["num_validation_images"], entries["num_reg_images"]) == (14, 3, 0)
    assert entries["dataset_dirs"] == {tmp_path.name: {"n_repeats": 2, "img_count": 7}}


def test_pictures_that_are_all_for_regularisation_too_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_pictures(tmp_path / "train" / "1_cat", TEN)
    shutil.copytree(tmp_path / "train" / "1_cat", tmp_path / "reg" / "1_cat")
    settings = DataSettings(
        train_data_dir=str(tmp_path / "train"),
        reg_data_dir=str(tmp_path / "reg"),
        resolution=(64, 64),
        validation_split=0.5,
        cache_latents=True,
    )
    assert TrainingData.build(settings, 1, show_progress=False).validation_items == ()
    assert "that are not for regularisation too is less than one picture" in caplog.text
