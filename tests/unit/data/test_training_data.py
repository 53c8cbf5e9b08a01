import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import FakeAutoencoder, FakeTextEncoder, build, captions_of, make_pictures, settings_for

from library.data import images, summary
from library.data.dataset import TrainingData
from library.data.settings import DataSettings
from library.errors import DatasetError

SIZES = {"a.png": (64, 64), "b.png": (96, 64), "c.png": (64, 96), "d.png": (128, 64), "e.png": (64, 64)}
BUCKETS = {"enable_bucket": True, "min_bucket_reso": 32, "max_bucket_reso": 128, "bucket_reso_steps": 16}


def _all_draws(data: TrainingData, epoch: int = 1, num_processes: int = 1) -> list:
    return [draw for batch in data.plan_epoch(epoch, num_processes).batches for draw in batch.draws]


def test_items_are_sorted_and_hold_what_was_found(tmp_path: Path) -> None:
    folder = make_pictures(tmp_path / "odd [name] {x}", {"B.PNG": (96, 64), "a.JpG": (64, 64), "c.webp": (64, 64)})
    make_pictures(folder / "sub", {"x.png": (64, 64)})
    (folder / "notes.md").write_text("no picture", encoding="utf-8")
    (folder / ".hidden.png").write_bytes(b"")
    data = build(folder, **BUCKETS)
    found = [(item.index, item.name, item.size_px, item.caption) for item in data.items]
    assert found == [
        (0, "B.PNG", (96, 64), "a B, tag"),
        (1, "a.JpG", (64, 64), "a a, tag"),
        (2, "c.webp", (64, 64), "a c, tag"),
    ]
    assert data.items[0].path == folder / "B.PNG"


def test_missing_captions_are_counted_and_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("2_my cat", "1"):
        make_pictures(tmp_path / name, {f"{n}.png": (64, 64) for n in range(7)}, captions=False)
    (tmp_path / "1" / "0.txt").write_text("  \n", encoding="utf-8")
    (tmp_path / "1" / "1.txt").write_text("here", encoding="utf-8")
    data = build(tmp_path)
    assert [item.caption for item in data.items] == ["", "here", "", "", "", "", ""] + ["my cat"] * 7
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == [
        "7 of 14 pictures have no caption in a .txt file and are trained with their class tokens: "
        "0.png, 1.png, 2.png, 3.png, 4.png and 2 more",
        "6 of 14 pictures have no caption in a .txt file and are trained with an empty caption: "
        "0.png, 2.png, 3.png, 4.png, 5.png and 1 more",
    ]


def test_unreadable_pictures_are_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_pictures(tmp_path, SIZES)
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes((tmp_path / "b.png").read_bytes()[:2000])
    (tmp_path / "cut.txt").write_text("cut", encoding="utf-8")
    data = build(tmp_path)  # without cached latents every picture is decoded once
    assert [item.name for item in data.items] == ["b.png", "c.png", "d.png", "e.png"]
    assert "a.png (not a picture, or an empty or broken file)" in caplog.text
    assert caplog.text.count("cut.png") == 1


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"No picture is left to train on: 1 cannot be read, for example .*a\.png"):
        build(tmp_path)
    make_pictures(tmp_path, {"a.png": (20, 64)})
    flags = {"enable_bucket": True, "bucket_no_upscale": True, "bucket_reso_steps": 32}
    with pytest.raises(DatasetError, match=r"1 are too small for a bucket, for example .*a\.png"):
        build(tmp_path, **flags)


def test_too_small_pictures_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_pictures(tmp_path, {"small.png": (20, 64), "fits.png": (64, 64)})
    data = build(tmp_path, enable_bucket=True, bucket_no_upscale=True, bucket_reso_steps=32)
    assert [item.name for item in data.items] == ["fits.png"]
    assert "1 pictures are left out" in caplog.text
    assert "small.png" in caplog.text


def test_captions_lists_exactly_what_the_epochs_use(tmp_path: Path) -> None:
    make_pictures(tmp_path, SIZES)
    rules: list[dict[str, Any]] = [
        {},
        {"caption_prefix": "x", "keep_tokens_separator": "a"},
        {"shuffle_caption": True},
        {"caption_dropout_every_n_epochs": 2},
        {"caption_dropout_every_n_epochs": 1},
        {"caption_tag_dropout_rate": 0.5, "shuffle_caption": True, "caption_dropout_every_n_epochs": 3},
        {"enable_wildcard": True, "caption_suffix": "{1|2|3|4|5|6}"},
    ]
    for rule in rules:
        data = build(tmp_path, dataset_repeats=3, cache_latents=True, **rule)
        used = {draw.caption for epoch in (1, 2, 3) for draw in _all_draws(data, epoch)}
        listed = captions_of(data, [1, 2, 3])
        assert listed - {""} == used - {""}, rule
        assert used <= listed


def test_captions_with_dropout_hold_the_empty_one(tmp_path: Path) -> None:
    make_pictures(tmp_path, {"a.png": (64, 64)})
    data = build(tmp_path, caption_dropout_rate=0.01, cache_latents=True)
    assert captions_of(data, [1]) == {"", "a a, tag"}
    assert captions_of(build(tmp_path, cache_latents=True), [1]) == {"a a, tag"}


def test_draws_depend_on_seed_epoch_item_and_repeat_alone(tmp_path: Path) -> None:
    make_pictures(tmp_path, SIZES)
    flags: dict[str, Any] = {"dataset_repeats": 4, "flip_aug": True, "shuffle_caption": True, "cache_latents": True}
    data, again = build(tmp_path, **flags), build(tmp_path, train_batch_size=3, **flags)
    identity = {(draw.item.index, draw.repeat): (draw.key, draw.caption, draw.flip) for draw in _all_draws(data)}
    assert len(identity) == data.plan_epoch(1, 1).num_draws == 20
    assert len({key for key, _, _ in identity.values()}) == 20
    other = {
        (draw.item.index, draw.repeat): (draw.key, draw.caption, draw.flip)
        for draw in _all_draws(again, num_processes=2)
    }
    assert identity == other
    assert {draw.key for draw in _all_draws(data, 2)}.isdisjoint({key for key, _, _ in identity.values()})
    assert {draw.key for draw in _all_draws(build(tmp_path, 2, **flags))}.isdisjoint(
        key for key, _, _ in identity.values()
    )
    flips = sum(draw.flip for epoch in range(1, 21) for draw in _all_draws(data, epoch))
    assert abs(flips - 200) < 50  # 400 draws at one half: standard deviation 10, five of them


def test_flip_only_where_the_folder_asks_for_it(tmp_path: Path) -> None:
    make_pictures(tmp_path, SIZES)
    data = build(tmp_path, dataset_repeats=20, cache_latents=True)
    assert not any(draw.flip for draw in _all_draws(data))


@pytest.mark.parametrize("num_workers", [0, 3])
def test_uncached_batches_hold_the_pixels(tmp_path: Path, num_workers: int) -> None:
    make_pictures(tmp_path, SIZES)
    data = build(tmp_path, train_batch_size=2, flip_aug=True, **BUCKETS)
    plan = data.plan_epoch(1, 1)
    batches = list(data.batches(plan, num_workers=num_workers))
    assert [batch.draws for batch in batches] == [batch.draws for batch in plan.batches]
    for batch in batches:
        assert batch.latents is None
        assert batch.text is None
        assert batch.pixels.dtype == torch.float32
        assert batch.loss_weights.tolist() == [1.0] * len(batch.draws)
        assert batch.num_global == len(batch.draws)
        assert batch.captions == [draw.caption for draw in batch.draws]
        for draw, pixels in zip(batch.draws, batch.pixels, strict=True):
            expected = images.load_pixels(draw.item.path, draw.item.placement, None)
            assert torch.equal(pixels, expected.flip(-1) if draw.flip else expected)


def test_cached_batches_hold_latents_and_text(tmp_path: Path) -> None:
    make_pictures(tmp_path, SIZES)
    data = build(tmp_path, train_batch_size=2, cache_latents=True, cache_text_encoder_outputs=True, **BUCKETS)
    data.fill_latents(FakeAutoencoder(), "ae-1")
    data.fill_captions([1], FakeTextEncoder(), "te-1")
    for batch in data.batches(data.plan_epoch(1, 1)):
        width, height = batch.draws[0].item.bucket_px
        assert batch.pixels is None
        assert batch.latents.shape == (len(batch.draws), 4, height // 8, width // 8)
        assert batch.latents.dtype == torch.bfloat16
        assert [len(features) for features in batch.text] == [1 + len(draw.caption) for draw in batch.draws]


def test_two_processes_together_see_what_one_sees(tmp_path: Path) -> None:
    make_pictures(tmp_path, SIZES)
    one = build(tmp_path, train_batch_size=2, shuffle_caption=True, flip_aug=True)
    two = build(tmp_path, train_batch_size=1, shuffle_caption=True, flip_aug=True)
    whole = list(one.batches(one.plan_epoch(1, 1)))
    parts = [list(two.batches(two.plan_epoch(1, 2), rank, 2)) for rank in range(2)]
    assert len(whole) == len(parts[0]) == len(parts[1]) == two.num_batches(2) == 3
    for batch, first, second in zip(whole, *parts, strict=True):
        key = [(draw.key, draw.caption, draw.flip) for draw in batch.draws]
        assert key == [(draw.key, draw.caption, draw.flip) for draw in (*first.draws, *second.draws)]
        assert batch.num_global == first.num_global == second.num_global == len(key)
    # Five pictures in batches of two: the second process has nothing in the short one.
    (empty,) = [batch for batch in parts[1] if not batch.draws]
    assert (empty.pixels, empty.latents, empty.num_global) == (None, None, 1)
    assert empty.loss_weights.shape == (0,)


def test_start_skips_batches_without_reading_them(tmp_path: Path) -> None:
    make_pictures(tmp_path, SIZES)
    data = build(tmp_path)
    plan = data.plan_epoch(1, 1)
    assert [batch.draws for batch in data.batches(plan, start=3)] == [batch.draws for batch in plan.batches[3:]]


def test_a_picture_that_goes_missing_is_named(tmp_path: Path) -> None:
    make_pictures(tmp_path, {"a.png": (64, 64)})
    data = build(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(DatasetError, match=r"a\.png cannot be read \(No such file"):
        list(data.batches(data.plan_epoch(1, 1)))


def test_an_abandoned_epoch_leaves_no_threads(tmp_path: Path) -> None:
    make_pictures(tmp_path, SIZES)
    data = build(tmp_path)
    batches = data.batches(data.plan_epoch(1, 1))
    next(batches)
    del batches
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def test_sizes_come_from_the_index_at_the_second_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pictures(tmp_path, SIZES)
    data = build(tmp_path, cache_latents_to_disk=True, **BUCKETS)
    data.fill_latents(FakeAutoencoder(), "ae-1")
    monkeypatch.setattr(images, "read_size", lambda path: pytest.fail(f"{path} was opened"))
    again = build(tmp_path, cache_latents_to_disk=True, **BUCKETS)
    assert [(item.size_px, item.placement) for item in again.items] == [
        (item.size_px, item.placement) for item in data.items
    ]


def _two_datasets(tmp_path: Path) -> TrainingData:
    make_pictures(tmp_path / "one" / "pics", SIZES)
    make_pictures(tmp_path / "two" / "pics", {"x.png": (64, 64)})
    path = tmp_path / "data.toml"
    path.write_text(
        f"""
        [general]
        enable_bucket = true
        min_bucket_reso = 32
        max_bucket_reso = 128
        bucket_reso_steps = 16
        caption_extension = ".txt"
        [[datasets]]
        resolution = 64
        batch_size = 2
        [[datasets.subsets]]
        image_dir = "{(tmp_path / "one" / "pics").as_posix()}"
        num_repeats = 2
        [[datasets.subsets]]
        image_dir = "{(tmp_path / "two" / "pics").as_posix()}"
        [[datasets]]
        resolution = 32
        [[datasets.subsets]]
        image_dir = "{(tmp_path / "one" / "pics").as_posix()}"
        """,
        encoding="utf-8",
    )
    return TrainingData.build(DataSettings(dataset_config=path, cache_latents=True), 1, show_progress=False)


def test_several_datasets(tmp_path: Path) -> None:
    data = _two_datasets(tmp_path)
    assert [item.dataset_index for item in data.items] == [0] * 6 + [1] * 5
    assert data.plan_epoch(1, 1).num_draws == 16
    for batch in data.plan_epoch(1, 1).batches:
        assert len({(draw.item.dataset_index, draw.item.bucket_px) for draw in batch.draws}) == 1
        assert len(batch) <= data.datasets[batch.draws[0].item.dataset_index].batch_size


def test_summary(tmp_path: Path) -> None:
    data = _two_datasets(tmp_path)
    first, second = summary.dataset_summaries(data)
    assert (first["num_train_images"], second["num_train_images"]) == (11, 5)
    assert [subset["img_count"] for subset in first["subsets"]] == [5, 1]
    assert first["subsets"][0]["image_dir"] == "pics"
    assert sum(bucket["count"] for bucket in first["bucket_info"]["buckets"].values()) == 11
    assert {"resolution": [64, 64], "count": 5} in first["bucket_info"]["buckets"].values()
    assert summary.dataset_dirs(data) == {
        "pics": {"n_repeats": 2, "img_count": 5},
        "pics (2)": {"n_repeats": 1, "img_count": 1},
        "pics (3)": {"n_repeats": 1, "img_count": 5},
    }
    # Both folders of dataset 1 are called pics; dataset 2 uses one of them again and is not counted.
    assert summary.tag_frequency(data.items)["pics"]["tag"] == 6
    assert "Dataset 1: 6 pictures, 11 with repeats, batch size 2; buckets " in summary.summary_lines(data)[0]


def test_mean_aspect_error_counts_repeats(tmp_path: Path) -> None:
    make_pictures(tmp_path, {"a.png": (64, 64), "b.png": (100, 50)})
    data = build(tmp_path, cache_latents=True)
    # One square bucket: errors 0 and 1 - 2.
    assert summary.bucket_info(data.items)["mean_img_ar_error"] == pytest.approx(0.5, abs=1e-12)


def test_the_log_holds_nothing_when_all_is_well(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_pictures(tmp_path, SIZES)
    with caplog.at_level(logging.INFO):
        data = TrainingData.build(settings_for(tmp_path, cache_latents=True), 1, show_progress=False)
        data.fill_latents(FakeAutoencoder(), "ae-1")
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
