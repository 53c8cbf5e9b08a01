"""Varied showings are functions of the draw alone, show what they should, and never go together with cached latents."""

from __future__ import annotations

import colorsys
import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import noise_image, settings_for
from PIL import Image

from library.data import augment, images
from library.data.buckets import Placement
from library.data.config import DatasetConfig, SubsetConfig, load_dataset_config
from library.data.dataset import TrainingData
from library.data.items import Draw, Item
from library.errors import DatasetError, SettingsError


def draw_of(
    size: tuple[int, int],
    bucket: tuple[int, int] = (64, 64),
    key: int = 1,
    epoch: int = 1,
    name: str = "a.png",
    resized: tuple[int, int] | None = None,
    **subset: Any,
) -> Draw:
    item = Item(0, name, size, Placement(resized or bucket, bucket, 0.0), "", SubsetConfig(Path("x"), **subset), 0)
    return Draw(item, epoch, 0, "", False, key)


def built(folder: Path, dataset: dict[str, Any], seed: int = 3, **subset: Any) -> TrainingData:
    config = DatasetConfig(
        **{"resolution": (64, 64), "subsets": (SubsetConfig(folder, caption_extension=".txt", **subset),), **dataset}
    )
    return TrainingData.build(settings_for(folder), seed, [config], show_progress=False)


def loaded(data: TrainingData, epoch: int) -> dict[tuple[int, int], torch.Tensor]:
    """Returns the pixels of every showing of an epoch by (item, repeat)."""
    found = {}
    for batch in data.plan_epoch(epoch, 1).batches:
        pixels = data.load(batch.draws).pixels
        assert pixels is not None
        for draw, one in zip(batch.draws, pixels, strict=True):
            found[draw.item.index, draw.repeat] = one
    return found


VARIED: dict[str, Any] = {"color_aug": True, "random_crop": True, "flip_aug": True, "num_repeats": 6}


# ---- draws ----


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_showing_depends_on_its_draw_alone(tmp_path: Path, batch_size: int) -> None:
    """Not on batches, workers, order or what was drawn before; another epoch and another repeat look different."""
    # defect 28: workers replayed each other's draws
    for seed, name in enumerate(("a.png", "b.png")):
        noise_image(90, 80, seed).save(tmp_path / name)
    reference = loaded(built(tmp_path, {}, **VARIED), 1)
    data = built(tmp_path, {"batch_size": batch_size}, **VARIED)
    loaded(data, 2)
    again = loaded(data, 1)
    assert reference.keys() == again.keys()
    for slot, pixels in reference.items():
        assert torch.equal(pixels, again[slot])
    by_threads = list(data.batches(data.plan_epoch(1, 1), num_workers=4))
    for batch in by_threads:
        assert batch.pixels is not None
        for draw, one in zip(batch.draws, batch.pixels, strict=True):
            assert torch.equal(one, reference[draw.item.index, draw.repeat])
    assert len({pixels.numpy().tobytes() for pixels in reference.values()}) == 12
    assert not torch.equal(reference[0, 0], loaded(data, 2)[0, 0])


def test_held_out_pictures_are_not_varied() -> None:
    # defect 68: validation kept its augmentations
    for key in range(50):
        draw = draw_of(
            (200, 100), key=key, epoch=0, name="a_50_50_9_9.png", color_aug=True, random_crop=True,
            face_crop_aug_range=(1.0, 3.0),
        )  # fmt: skip
        assert augment.colour_change(draw) is None
        assert augment.placement_of(draw, enable_bucket=False) == draw.item.placement


# ---- colours ----


def test_a_third_of_the_showings_has_other_colours() -> None:
    changes = [augment.colour_change(draw_of((64, 64), key=key, color_aug=True)) for key in range(6000)]
    hues = [change.hue_degrees for change in changes if change and change.hue_degrees]
    gammas = [change.gamma for change in changes if change and change.gamma != 1.0]
    # A share of 1/3 (1/6 each) of 6000 draws has a standard deviation of 36 (29): five of them.
    assert abs(len(hues) + len(gammas) - 2000) < 180
    assert abs(len(hues) - 1000) < 145
    assert -16 <= min(hues) < -15
    assert 15 < max(hues) <= 16
    assert 0.95 <= min(gammas) < 0.955
    assert 1.045 < max(gammas) <= 1.05
    assert all(augment.colour_change(draw_of((64, 64), key=key)) is None for key in range(100))


@pytest.mark.parametrize("degrees", [-16.0, 5.5, 16.0, 120.0])
def test_turned_hues_are_those_of_colorsys(degrees: float) -> None:
    rgb = torch.from_numpy(np.random.default_rng(0).random((3, 1, 400), dtype=np.float32))
    rgb[:, 0, 0] = 0.5  # grey, black and white have no hue
    rgb[:, 0, 1] = 0.0
    rgb[:, 0, 2] = 1.0
    turned = (augment.with_colours(rgb * 2 - 1, augment.ColourChange(hue_degrees=degrees)) + 1) / 2
    for place in range(400):
        hue, saturation, value = colorsys.rgb_to_hsv(*rgb[:, 0, place].tolist())
        expected = colorsys.hsv_to_rgb((hue + degrees / 360) % 1, saturation, value)
        assert turned[:, 0, place].tolist() == pytest.approx(expected, abs=1e-5)  # float32 beside float64


def test_gamma_keeps_black_and_white() -> None:
    pixels = torch.tensor([-1.0, 0.0, 1.0]).expand(3, 1, 3)
    changed = augment.with_colours(pixels, augment.ColourChange(gamma=1.05))
    assert changed[0, 0].tolist() == pytest.approx([-1.0, 2 * 0.5**1.05 - 1, 1.0], abs=1e-6)  # float32's rounding


# ---- crops ----


def test_random_crops_in_buckets_reach_every_place() -> None:
    placements = [
        augment.placement_of(draw_of((500, 300), resized=(107, 64), key=key, random_crop=True), enable_bucket=True)
        for key in range(800)
    ]
    assert {placement.resized_px for placement in placements} == {(107, 64)}
    # 44 places, each missed by one draw in 44: all 800 miss one of them with probability 44 * (43/44)**800 < 1e-6.
    assert {placement.left_top_px for placement in placements} == {(left, 0) for left in range(44)}


@pytest.mark.parametrize(
    ("size", "resized", "expected"),
    [
        ((500, 300), (107, 64), (500, 300)),  # larger: as it is
        ((500, 50), (640, 64), (640, 64)),  # one side is smaller: enlarged until it covers
        ((40, 30), (85, 64), (85, 64)),
        ((64, 64), (64, 64), (64, 64)),
    ],
)
def test_random_crops_without_buckets(
    size: tuple[int, int], resized: tuple[int, int], expected: tuple[int, int]
) -> None:
    for key in range(30):
        placement = augment.placement_of(draw_of(size, resized=resized, key=key, random_crop=True), enable_bucket=False)
        assert placement.resized_px == expected
        assert placement.bucket_px == (64, 64)
        assert all(0 <= at <= expected[side] - 64 for side, at in enumerate(placement.left_top_px))


def test_a_random_crop_is_a_part_of_the_picture(tmp_path: Path) -> None:
    noise_image(90, 80).save(tmp_path / "a.png")
    data = built(tmp_path, {}, random_crop=True)
    whole = images.load_pixels(tmp_path / "a.png", Placement((90, 80), (90, 80), 0.0), None)
    draw = data.draw(0, 1, 0)
    left, top = data.showings.placement(draw).left_top_px
    pixels = data.load([draw]).pixels
    assert pixels is not None
    assert torch.equal(pixels[0], whole[:, top : top + 64, left : left + 64])


def test_long_pictures_are_cut_where_they_should_be(tmp_path: Path) -> None:
    """Only the part that is needed of a very long picture is resized; it is the same part."""
    ramp = np.linspace(0, 255, 4000).astype(np.uint8)
    Image.fromarray(np.broadcast_to(ramp, (20, 4000)).copy()).save(tmp_path / "a.png")
    placement = Placement((12800, 64), (64, 64), 0.0, (9600, 0))
    pixels = images.load_pixels(tmp_path / "a.png", placement, "bilinear")
    # The picture's place 3000 of 4000 and the 20 pixels behind it; bytes are 1/127.5 apart.
    expected = torch.linspace(3000 / 4000, 3020 / 4000, 64) * 2 - 1
    assert (pixels[0, 30] - expected).abs().max() < 2 / 127.5


# ---- faces ----


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("photo_120_80_40_30.png", augment.Face(120, 80, 40, 30)),
        ("a_b_c_120_80_40_30.jpg", augment.Face(120, 80, 40, 30)),
        ("120_80_40_30.png", None),
        ("photo_120_80_40.png", None),
        ("photo_120_80_forty_30.png", None),
        ("photo_120_80_0_0.png", None),
        ("photo_120_80_4.5_3.png", None),
    ],
)
def test_face_places_in_file_names(name: str, expected: augment.Face | None) -> None:
    assert augment.face_of(name) == expected


def test_face_crops_have_the_asked_size_around_the_face() -> None:
    factors = []
    for key in range(400):
        draw = draw_of(
            (1000, 800), key=key, name="p_600_300_50_80.png", resized=(80, 64), face_crop_aug_range=(2.0, 5.0)
        )
        placement = augment.placement_of(draw, enable_bucket=False)
        scale = placement.resized_px[0] / 1000
        factors.append(64 / (80 * scale))
        centre = [at + 32 for at in placement.left_top_px]
        assert centre[0] == pytest.approx(600 * scale, abs=1)  # whole pixels
        assert centre[1] == pytest.approx(300 * scale, abs=1)
    assert 1.9 < min(factors) < 2.1  # the picture's size in whole pixels moves a factor by up to 2 %
    assert 4.8 < max(factors) < 5.1


@pytest.mark.parametrize(
    ("size", "name", "expected_resized", "expected_left_top"),
    [
        ((1000, 800), "p_5_5_50_50.png", (640, 512), (0, 0)),  # a face in the corner: clamped
        ((1000, 800), "p_999_799_50_50.png", (640, 512), (640 - 64, 512 - 64)),
        ((1000, 800), "p_500_400_2_2.png", (1000, 800), (468, 368)),  # never enlarged for a small face
        ((1000, 800), "p_500_400_900_790.png", (80, 64), (8, 0)),  # never smaller than what is cut out
        ((50, 40), "p_25_20_9_9.png", (80, 64), (8, 0)),  # a small picture is enlarged until it covers
        ((1000, 800), "p_5000_9000_50_50.png", (640, 512), (640 - 64, 512 - 64)),  # outside: the nearest place
    ],
)
def test_face_crops_stay_inside(
    size: tuple[int, int], name: str, expected_resized: tuple[int, int], expected_left_top: tuple[int, int]
) -> None:
    draw = draw_of(size, name=name, face_crop_aug_range=(2.0, 2.0))
    placement = augment.placement_of(draw, enable_bucket=False)
    assert (placement.resized_px, placement.left_top_px) == (expected_resized, expected_left_top)


def test_random_face_crops_hold_the_whole_face() -> None:
    lefts = set()
    for key in range(300):
        draw = draw_of(
            (1000, 800), key=key, name="p_600_300_50_80.png", face_crop_aug_range=(2.0, 2.0), random_crop=True
        )
        placement = augment.placement_of(draw, enable_bucket=False)
        scale = placement.resized_px[0] / 1000
        left, top = placement.left_top_px
        lefts.add(left)
        assert left <= (600 - 25) * scale + 1  # whole pixels
        assert left + 64 >= (600 + 25) * scale - 1
        assert top <= (300 - 40) * scale + 1
        assert top + 64 >= (300 + 40) * scale - 1
    assert len(lefts) > 20


def test_pictures_without_a_face_are_cut_as_ever_and_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    noise_image(90, 80).save(tmp_path / "a.png")
    noise_image(90, 80).save(tmp_path / "b_40_40_10_10.png")
    data = built(tmp_path, {}, face_crop_aug_range=(1.0, 2.0))
    (text,) = [record.getMessage() for record in caplog.records if "face" in record.getMessage()]
    assert "1 pictures" in text
    assert "a.png" in text
    assert data.showings.placement(data.draw(0, 1, 0)) == data.items[0].placement
    assert data.showings.placement(data.draw(1, 1, 0)) != data.items[1].placement


# ---- what does not go together ----


@pytest.mark.parametrize("flag", ["color_aug", "random_crop", "face_crop_aug_range"])
@pytest.mark.parametrize("cache", ["cache_latents", "cache_latents_to_disk"])
def test_flags_are_refused_with_cached_latents(tmp_path: Path, flag: str, cache: str) -> None:
    value = (1.0, 2.0) if flag == "face_crop_aug_range" else True
    with pytest.raises(SettingsError, match=f"--{flag} gives .* train without --cache_latents"):
        settings_for(tmp_path, **{flag: value, cache: True})


def test_face_crops_are_refused_with_buckets(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--face_crop_aug_range .* --enable_bucket"):
        settings_for(tmp_path, face_crop_aug_range=(1.0, 2.0), enable_bucket=True)


def test_mirroring_goes_with_cached_latents(tmp_path: Path) -> None:
    assert settings_for(tmp_path, flip_aug=True, cache_latents=True).flip_aug


@pytest.mark.parametrize(
    ("general", "second", "flags", "expected"),
    [
        # defect 28: colours were varied although latents were cached
        ("", "color_aug = true", {"cache_latents": True}, r"datasets\[0\]\.subsets\[1\]: color_aug gives"),
        ("random_crop = true", "", {"cache_latents": True}, r"datasets\[0\]\.subsets\[0\]: random_crop gives"),
        (
            "enable_bucket = true",
            "face_crop_aug_range = [1, 2]",
            {},
            r"subsets\[1\]: face_crop_aug_range .* enable_bucket",
        ),
        ("", "", {"color_aug": True, "cache_latents": True}, r"subsets\[0\]: color_aug gives"),
    ],
)
def test_a_dataset_file_is_refused_by_its_table(
    tmp_path: Path, general: str, second: str, flags: dict[str, Any], expected: str
) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        noise_image(64, 64).save(tmp_path / folder / "x.png")
    path = tmp_path / "dataset.toml"
    path.write_text(
        f"[general]\n{general}\n[[datasets]]\nresolution = 64\n"
        f"[[datasets.subsets]]\nimage_dir = '{tmp_path / 'a'}'\n"
        f"[[datasets.subsets]]\nimage_dir = '{tmp_path / 'b'}'\n{second}\n",
        encoding="utf-8",
    )
    settings = dataclasses.replace(settings_for(tmp_path), train_data_dir=None, dataset_config=path, **flags)
    with pytest.raises(DatasetError, match=expected) as caught:
        load_dataset_config(settings)
    assert re.search(re.escape(str(path)), str(caught.value))


def test_a_table_may_turn_off_what_a_flag_turns_on(tmp_path: Path) -> None:
    noise_image(64, 64).save(tmp_path / "x.png")
    path = tmp_path / "dataset.toml"
    path.write_text(
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{tmp_path}'\ncolor_aug = false\n",
        encoding="utf-8",
    )
    settings = dataclasses.replace(
        settings_for(tmp_path), train_data_dir=None, dataset_config=path, color_aug=True, cache_latents=True
    )
    assert load_dataset_config(settings)[0].subsets[0].color_aug is False
