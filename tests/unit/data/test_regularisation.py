import logging
from pathlib import Path
from typing import Any

import pytest
from data_helpers import FakeAutoencoder, FakeProcesses, make_pictures

from library.data import summary
from library.data.dataset import TrainingData
from library.data.regularisation import share_out
from library.data.settings import DataSettings
from library.data.sharing import Sharing
from library.errors import DatasetError

ONE = (64, 64)


def _build(tmp_path: Path, train: dict[str, int], reg: dict[str, int], **flags: Any) -> TrainingData:
    for parent, folders in (("train", train), ("reg", reg)):
        for folder, count in folders.items():
            make_pictures(tmp_path / parent / folder, {f"{parent}{n}.png": ONE for n in range(count)})
    settings = DataSettings(
        train_data_dir=str(tmp_path / "train"),
        reg_data_dir=str(tmp_path / "reg"),
        resolution=(64, 64),
        **{"cache_latents": True, **flags},
    )
    return TrainingData.build(settings, 1, show_progress=False)


def _showings(data: TrainingData) -> tuple[list[int], list[int]]:
    """Returns how often each training picture and each regularisation picture is shown in an epoch."""
    counts: dict[int, int] = {}
    for batch in data.plan_epoch(1, 1).batches:
        for draw in batch.draws:
            counts[draw.item.index] = counts.get(draw.item.index, 0) + 1
    sides: tuple[list[int], list[int]] = ([], [])
    for item in data.items:
        sides[bool(item.subset.is_reg)].append(counts[item.index])
    return sides


@pytest.mark.parametrize(
    ("showings", "weights", "expected"),
    [
        (6, [1, 1, 1], [2, 2, 2]),
        (7, [1, 1, 1], [3, 2, 2]),
        (2, [1, 1, 1], [1, 1, 0]),
        (7, [2, 1], [5, 2]),
        (4, [10], [4]),
        (0, [1, 2], [0, 0]),
    ],
)
def test_share_out(showings: int, weights: list[int], expected: list[int]) -> None:
    assert share_out(showings, weights) == expected


def test_few_regularisation_pictures_are_repeated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        data = _build(tmp_path, {"3_cat": 3}, {"1_animal": 2})
    train, reg = _showings(data)
    assert train == [3, 3, 3]
    assert sorted(reg) == [4, 5]
    assert "Dataset 1: 2 of 2 regularisation pictures are used, 9 times an epoch in all" in caplog.text
    assert data.plan_epoch(1, 1).num_draws == 18


def test_extra_regularisation_pictures_are_left_out_of_all_folders_alike(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        data = _build(tmp_path, {"1_cat": 20}, {"1_a": 30, "1_b": 30})
    train, reg = _showings(data)
    assert train == [1] * 20
    assert reg == [1] * 20
    folders = {item.subset.image_dir.name for item in data.items if item.subset.is_reg}
    assert folders == {"1_a", "1_b"}
    assert "20 of 60 regularisation pictures are used" in caplog.text
    encoder = FakeAutoencoder()
    data.fill_latents(encoder, "ae")
    assert encoder.encoded == 40  # what is never shown is not encoded


def test_prior_loss_weight_goes_into_the_batch(tmp_path: Path) -> None:
    data = _build(
        tmp_path, {"2_cat": 2}, {"1_animal": 1}, prior_loss_weight=0.25, cache_latents=False, train_batch_size=3
    )
    for batch in data.batches(data.plan_epoch(1, 1)):
        assert batch.loss_weights.tolist() == [0.25 if draw.item.subset.is_reg else 1.0 for draw in batch.draws]
        assert [draw.caption for draw in batch.draws] == [draw.item.subset.class_tokens for draw in batch.draws]


def test_the_balance_holds_when_pictures_turn_out_broken(tmp_path: Path) -> None:
    make_pictures(tmp_path / "train" / "2_cat", {f"train{n}.png": ONE for n in range(4)})
    data = _build(tmp_path, {}, {"1_animal": 3})
    for path in (tmp_path / "train" / "2_cat" / "train0.png", tmp_path / "reg" / "1_animal" / "reg1.png"):
        path.write_bytes(path.read_bytes()[:1000])
    data.fill_latents(FakeAutoencoder(), "ae")
    train, reg = _showings(data)
    assert train == [2, 2, 2]
    assert reg == [3, 3]


def test_each_dataset_is_balanced_by_itself_and_all_processes_agree(tmp_path: Path) -> None:
    for name, count in (("a", 4), ("b", 2), ("reg", 5)):
        make_pictures(tmp_path / name, {f"{name}{n}.png": ONE for n in range(count)})
    config = tmp_path / "data.toml"
    reg = f"[[datasets.subsets]]\nis_reg = true\nimage_dir = '{(tmp_path / 'reg').as_posix()}'\n"
    config.write_text(
        f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{(tmp_path / 'a').as_posix()}'\nnum_repeats = 3\n{reg}"
        f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{(tmp_path / 'b').as_posix()}'\n{reg}",
        encoding="utf-8",
    )
    processes = FakeProcesses(2)

    def run(rank: int) -> TrainingData:
        settings = DataSettings(dataset_config=config, resolution=(64, 64), caption_extension=".txt")
        return TrainingData.build(settings, 1, sharing=Sharing(rank, 2, processes.gather(rank)))

    first, second = processes.run(run)
    assert [(item.path, item.num_repeats) for item in first.items] == [
        (item.path, item.num_repeats) for item in second.items
    ]
    for index, (train, reg_count) in enumerate([(12, 12), (2, 2)]):
        (one, two) = (summary.dataset_summaries(first)[index], summary.dataset_summaries(second)[index])
        assert one == two
        assert (one["num_train_images"], one["num_reg_images"]) == (train, reg_count)
    assert set(summary.dataset_dirs(first)) == {"a", "b"}
    assert summary.dataset_dirs(first, is_reg=True) == {
        "reg": {"n_repeats": 1, "img_count": 5},
        "reg (2)": {"n_repeats": 1, "img_count": 2},
    }
    assert "  reg: 2 pictures for regularisation" in summary.summary_lines(first)


def test_regularisation_alone_is_an_error(tmp_path: Path) -> None:
    make_pictures(tmp_path / "reg", {"a.png": ONE})
    config = tmp_path / "data.toml"
    config.write_text(
        f"[[datasets]]\n[[datasets.subsets]]\nis_reg = true\nimage_dir = '{(tmp_path / 'reg').as_posix()}'\n", "utf-8"
    )
    with pytest.raises(DatasetError, match=r"datasets\[0\]: there are only regularisation pictures"):
        TrainingData.build(DataSettings(dataset_config=config, resolution=(64, 64)), 1)


def test_regularisation_alone_is_an_error_where_no_other_picture_can_be_read(tmp_path: Path) -> None:
    make_pictures(tmp_path / "train" / "1_a", {"a.png": ONE})
    (tmp_path / "train" / "1_a" / "a.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match="No picture is left to train on"):
        _build(tmp_path, {}, {"1_b": 2})
