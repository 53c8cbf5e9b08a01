"""Which captions a run uses: listed before it starts, the same for every number of processes and every start."""

from pathlib import Path
from typing import Any

import pytest
from data_helpers import FakeTextEncoder, build, captions_of, make_pictures

from library.data.caption_plan import Clock
from library.data.dataset import TrainingData

SIZES = {f"{name}.png": (64, 64) for name in "abcdefg"}
TAGS = "one, two, three, four, five, six"
RULES: list[dict[str, Any]] = [
    {"token_warmup_step": 6},
    {"token_warmup_step": 0.5, "shuffle_caption": True},
    {"token_warmup_step": 4, "caption_dropout_rate": 0.3, "keep_tokens": 1},
    {"token_warmup_step": 100, "caption_dropout_every_n_epochs": 2},
    {"caption_variants": 2, "shuffle_caption": True},
    {"caption_variants": 2, "shuffle_caption": True, "token_warmup_step": 3},
    {"caption_variants": 3, "caption_tag_dropout_rate": 0.5, "caption_dropout_rate": 0.2},
    {"caption_variants": 2, "shuffle_caption": True, "caption_dropout_every_n_epochs": 1},
    {"caption_variants": 50, "shuffle_caption": True},
]
EPOCHS = (1, 2, 3, 4)


def _data(folder: Path, num_processes: int = 1, accumulation: int = 2, **rule: Any) -> TrainingData:
    if not folder.exists():
        make_pictures(folder, SIZES)
        for name in SIZES:
            (folder / name).with_suffix(".txt").write_text(f"{name[0]}, {TAGS}", encoding="utf-8")
    settings = {"cache_latents": True, "dataset_repeats": 2, "train_batch_size": 2 // num_processes, **rule}
    data = build(folder, **settings)
    steps_per_epoch = -(-data.num_batches(num_processes) // accumulation)
    data.set_clock(steps_per_epoch, accumulation, 4 * steps_per_epoch, num_processes)
    return data


def _drawn(data: TrainingData, epoch: int, num_processes: int = 1, start: int = 0) -> list[str]:
    batches = data.plan_epoch(epoch, num_processes).batches[start:]
    return [
        draw.caption for batch in batches for rank in range(num_processes) for draw in batch.split(rank, num_processes)
    ]


@pytest.mark.parametrize("rule", RULES)
def test_the_list_holds_what_is_drawn(tmp_path: Path, rule: dict[str, Any]) -> None:
    # defects 5 and 28: there, warm-up and dropout are silently off where captions are cached
    data = _data(tmp_path / "pictures", **rule)
    used = {caption for epoch in EPOCHS for caption in _drawn(data, epoch)}
    listed = captions_of(data, EPOCHS)
    assert used <= listed
    assert listed - used <= {""}  # chance may spare every caption


@pytest.mark.parametrize("rule", RULES)
def test_captions_do_not_depend_on_caching_processes_or_where_the_run_starts(
    tmp_path: Path, rule: dict[str, Any]
) -> None:
    data = _data(tmp_path / "pictures", **rule)
    cached = _data(tmp_path / "pictures", cache_text_encoder_outputs=True, **rule)
    two = _data(tmp_path / "pictures", num_processes=2, **rule)
    for epoch in EPOCHS:
        expected = _drawn(data, epoch)
        assert _drawn(cached, epoch) == expected
        assert _drawn(two, epoch, num_processes=2) == expected
        assert _drawn(data, epoch, start=3) == expected[6:]
    assert captions_of(two, EPOCHS) == captions_of(data, EPOCHS)


def test_the_step_of_a_showing_is_that_of_its_global_batch(tmp_path: Path) -> None:
    data = _data(tmp_path / "pictures", token_warmup_step=12, token_warmup_min=0)
    # 14 showings in 7 batches: steps of 2, 2, 2 and 1 batches, so 4 an epoch; 7 tags grow over 12 steps.
    for epoch in EPOCHS:
        for number, batch in enumerate(data.plan_epoch(epoch, 1).batches):
            step = (epoch - 1) * 4 + number // 2
            num_tags = min(7, 7 * step // 12)
            assert all(len(caption.split(", ")) == max(1, num_tags) for caption in (d.caption for d in batch.draws))
            assert all(bool(draw.caption) == (num_tags > 0) for draw in batch.draws)
    assert Clock(4, 2, 16).step_of(3, 6) == 11


def test_without_a_clock_captions_are_whole(tmp_path: Path) -> None:
    make_pictures(tmp_path, SIZES)
    data = build(tmp_path, token_warmup_step=5, cache_latents=True)
    assert captions_of(data, [1]) == {f"a {name[0]}, tag" for name in SIZES}
    assert data.draw(0, 1, 0).caption == "a a, tag"


def test_variants_are_shown_equally_often_and_are_found_by_another_seed(tmp_path: Path) -> None:
    data = _data(tmp_path / "pictures", caption_variants=4, shuffle_caption=True)
    for item in data.items:
        shown = [data.draw(item.index, epoch, repeat).caption for epoch in EPOCHS for repeat in range(2)]
        assert {shown.count(caption) for caption in shown} == {2}
    other = build(tmp_path / "pictures", seed=2, caption_variants=4, shuffle_caption=True, cache_latents=True)
    assert captions_of(other, EPOCHS) == captions_of(data, EPOCHS)
    starts = {data.draw(item.index, 1, 0).caption == other.draw(item.index, 1, 0).caption for item in data.items}
    assert starts == {True, False}


def test_most_is_an_upper_bound(tmp_path: Path) -> None:
    for rule in RULES:
        data = _data(tmp_path / "pictures", **rule)
        assert len(captions_of(data, EPOCHS) - {""}) <= data.caption_plan.most(data.items, 4), rule
    data = _data(tmp_path / "pictures", shuffle_caption=True)
    assert data.caption_plan.most(data.items, 4) == 7 * 8
    assert data.caption_plan.most(data.items, 4, num_variants=3) == 7 * 3


def test_fill_captions_collects_only_what_is_missing(tmp_path: Path) -> None:
    flags = {"shuffle_caption": True, "token_warmup_step": 3, "caption_dropout_rate": 0.5}
    for expected in (True, False):
        data = _data(tmp_path / "pictures", cache_text_encoder_outputs_to_disk=True, **flags)
        encoder = FakeTextEncoder()
        data.fill_captions(EPOCHS, encoder, "te-1")
        assert set(encoder.encoded) == (captions_of(data, EPOCHS) if expected else set())
        assert len(encoder.encoded) == len(set(encoder.encoded))
        assert all(
            data.text is not None and len(data.text.get(caption)) for caption in ("", *captions_of(data, EPOCHS))
        )
