"""Masks lie on their pictures exactly, come from files, alpha channels or caches alike, and say what is wrong."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import FakeAutoencoder, FakeProcesses, noise_image, settings_for
from PIL import Image, ImageOps

from library.data.config import DatasetConfig, SubsetConfig
from library.data.dataset import TrainingData
from library.data.masks import load_mask
from library.data.picture_index import PictureIndex
from library.data.sharing import Sharing
from library.errors import DatasetError

BUCKETS: dict[str, Any] = {
    "enable_bucket": True,
    "min_bucket_reso": 32,
    "max_bucket_reso": 256,
    "bucket_reso_steps": 16,
}
SIZES = {"wide.png": (300, 101), "high.png": (77, 190), "square.png": (128, 128), "small.png": (40, 44)}


def shapes(width: int, height: int, seed: int) -> Image.Image:
    """Returns a grey picture whose parts all differ: smoothed noise, dark and bright."""
    return noise_image(7, 5, seed, "L").resize((width, height), Image.Resampling.BICUBIC)


def make(folder: Path, sizes: dict[str, tuple[int, int]] = SIZES) -> tuple[Path, Path]:
    """Writes grey pictures, and masks that hold the same: where they are cut alike, they stay the same."""
    pictures, masks = folder / "pictures", folder / "masks"
    pictures.mkdir(parents=True)
    masks.mkdir()
    for seed, (name, size) in enumerate(sizes.items()):
        image = shapes(*size, seed)
        image.convert("RGB").save(pictures / name)
        image.save(masks / name)
    return pictures, masks


def built(
    pictures: Path,
    masks: Path | None,
    *,
    dataset: dict[str, Any] | None = None,
    subset: dict[str, Any] | None = None,
    **flags: Any,
) -> TrainingData:
    flags = {"masked_loss": True, **flags}
    one = SubsetConfig(pictures, conditioning_data_dir=masks, caption_extension=".txt", **(subset or {}))
    config = DatasetConfig(**{"resolution": (96, 96), "subsets": (one,), "batch_size": 1, **(dataset or {})})
    return TrainingData.build(settings_for(pictures, **flags), 3, [config], show_progress=False)


def cells_of(pixels: torch.Tensor) -> torch.Tensor:
    """Returns the mean brightness in [0, 1] of each 8 x 8 pixels of (B, 3, H, W)."""
    return torch.nn.functional.avg_pool2d((pixels[:, :1] + 1) / 2, 8)[:, 0]


@pytest.mark.parametrize("interpolation", [None, "bilinear", "area", "nearest"])
@pytest.mark.parametrize(
    "how",
    [
        {"dataset": BUCKETS},
        {"dataset": {**BUCKETS, "bucket_no_upscale": True}},
        {},
        {"dataset": BUCKETS, "subset": {"random_crop": True, "flip_aug": True}},
        {"subset": {"random_crop": True, "flip_aug": True}},
    ],
    ids=["buckets", "no upscale", "one size", "random crop in buckets", "random crop"],
)
def test_a_mask_lies_on_its_picture_whatever_is_cut_out(
    tmp_path: Path, how: dict[str, Any], interpolation: str | None
) -> None:
    # defect 27: masks were stretched to the bucket, so they lay beside what they were meant for
    subset = {**how.get("subset", {}), "resize_interpolation": interpolation}
    data = built(*make(tmp_path), dataset=how.get("dataset"), subset=subset)
    flips = set()
    for epoch in (1, 2, 3):
        for batch in data.plan_epoch(epoch, 1).batches:
            loaded = data.load(batch.draws)
            assert loaded.masks is not None
            assert loaded.pixels is not None
            assert loaded.masks.dtype == torch.float32
            flips.add(loaded.draws[0].flip)
            # float32's rounding; but where nothing else is asked for, enlarged pictures are resized by lanczos and their
            # masks by bilinear, which differ a little on smooth shapes.
            tolerance = 1e-6 if interpolation else 0.02
            assert (loaded.masks - cells_of(loaded.pixels)).abs().max() < tolerance
    assert flips == ({False, True} if subset.get("flip_aug") else {False})


def test_a_stretched_mask_would_not_pass_that_test(tmp_path: Path) -> None:
    pictures, masks = make(tmp_path, {"wide.png": (300, 101)})
    data = built(pictures, masks, dataset=BUCKETS)
    (batch,) = data.plan_epoch(1, 1).batches
    loaded = data.load(batch.draws)
    assert loaded.pixels is not None
    height, width = loaded.pixels.shape[-2:]
    with Image.open(masks / "wide.png") as image:
        stretched = np.asarray(image.resize((width // 8, height // 8), Image.Resampling.BOX), dtype=np.float32) / 255
    assert (torch.from_numpy(stretched) - cells_of(loaded.pixels)[0]).abs().max() > 0.1


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_masks_of_another_size_fit_too(tmp_path: Path, scale: float) -> None:
    pictures, masks = make(tmp_path, {"wide.png": (301, 101)})
    with Image.open(masks / "wide.png") as image:
        size = (round(301 * scale), round(101 * scale))
        resized = image.resize(size, Image.Resampling.BICUBIC)
    resized.save(masks / "wide.png")
    data = built(pictures, masks, dataset=BUCKETS)
    (batch,) = data.plan_epoch(1, 1).batches
    loaded = data.load(batch.draws)
    assert loaded.masks is not None
    assert loaded.pixels is not None
    # Resized twice: at most a pixel beside, on shapes that change by about 4 % a pixel.
    assert (loaded.masks - cells_of(loaded.pixels)).abs().max() < 0.06


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_alpha_masks_are_turned_as_their_picture(tmp_path: Path, orientation: int) -> None:
    """The same picture, once with EXIF orientation and once turned by hand, has the same mask."""
    grey = shapes(120, 80, 5)
    picture = Image.merge("RGBA", (grey, grey, grey, grey))
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    picture.save(tmp_path / "a" / "x.png", exif=exif)
    with Image.open(tmp_path / "a" / "x.png") as image:
        ImageOps.exif_transpose(image).save(tmp_path / "b" / "x.png")
    masks = []
    for folder in ("a", "b"):
        data = built(tmp_path / folder, None, subset={"alpha_mask": True}, dataset=BUCKETS, masked_loss=False)
        masks.append(data.load(data.plan_epoch(1, 1).batches[0].draws).masks)
    assert masks[0] is not None
    assert torch.equal(masks[0], masks[1])
    assert masks[0].max() > 0.6
    assert masks[0].min() < 0.4


def test_alpha_and_mask_picture_give_the_same(tmp_path: Path) -> None:
    pictures, masks = make(tmp_path, {"wide.png": (300, 101)})
    transparent = tmp_path / "transparent"
    transparent.mkdir()
    with Image.open(pictures / "wide.png") as image, Image.open(masks / "wide.png") as mask:
        image.putalpha(mask)
        image.save(transparent / "wide.png")
    by_file = built(pictures, masks, dataset=BUCKETS)
    by_alpha = built(transparent, None, subset={"alpha_mask": True}, dataset=BUCKETS, masked_loss=False)
    first, second = (data.load(data.plan_epoch(1, 1).batches[0].draws).masks for data in (by_file, by_alpha))
    assert first is not None
    assert torch.equal(first, second)


def test_with_both_the_mask_is_their_product(tmp_path: Path) -> None:
    pictures, masks = tmp_path / "p", tmp_path / "m"
    pictures.mkdir()
    masks.mkdir()
    Image.new("RGBA", (96, 96), (1, 2, 3, 102)).save(pictures / "a.png")
    Image.new("L", (96, 96), 127).save(masks / "a.png")
    data = built(pictures, masks, subset={"alpha_mask": True})
    loaded = data.load(data.plan_epoch(1, 1).batches[0].draws)
    # float32's rounding
    torch.testing.assert_close(loaded.masks, torch.full((1, 12, 12), 102 / 255 * 127 / 255), rtol=0, atol=1e-7)


def test_modes_of_mask_pictures(tmp_path: Path) -> None:
    pictures, masks = tmp_path / "p", tmp_path / "m"
    pictures.mkdir()
    masks.mkdir()
    made = {
        "grey": Image.new("L", (64, 64), 51),
        "red": Image.new("RGB", (64, 64), (51, 255, 0)),
        "see-through": Image.new("RGBA", (64, 64), (51, 51, 51, 0)),
        "sixteen": Image.fromarray(np.full((64, 64), 51 * 257, dtype=np.uint16)),
        "palette": Image.new("RGB", (64, 64), (51, 51, 51)).convert("P", palette=Image.Palette.ADAPTIVE),
    }
    for name, image in made.items():
        Image.new("RGB", (64, 64)).save(pictures / f"{name}.jpg")
        image.save(masks / f"{name}.png")
    data = built(pictures, masks, dataset={"resolution": (64, 64), "batch_size": 5})
    loaded = data.load(data.plan_epoch(1, 1).batches[0].draws)
    assert loaded.masks is not None
    for draw, mask in zip(loaded.draws, loaded.masks, strict=True):
        # 51 / 255 exactly, in float32
        assert torch.equal(mask, torch.full((8, 8), 0.2)), draw.item.name


def test_masks_never_leave_zero_to_one(tmp_path: Path) -> None:
    pictures, masks = tmp_path / "p", tmp_path / "m"
    pictures.mkdir()
    masks.mkdir()
    edge = Image.new("L", (48, 48), 0)
    edge.paste(255, (0, 0, 24, 48))
    edge.convert("RGB").save(pictures / "a.png")
    edge.save(masks / "a.png")
    data = built(pictures, masks, subset={"resize_interpolation": "lanczos"})
    mask = data.load(data.plan_epoch(1, 1).batches[0].draws).masks
    assert mask is not None
    # Lanczos would leave ripples beside the edge; a filter without them leaves exactly 1 and 0 away from it.
    assert torch.equal(mask[0, :, :5], torch.ones(12, 5))
    assert torch.equal(mask[0, :, 7:], torch.zeros(12, 5))


# ---- what has no mask ----


def test_pictures_without_masks_and_masks_without_pictures_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures, masks = make(tmp_path)
    (masks / "wide.png").unlink()
    noise_image(8, 8).save(masks / "nobody.png")
    with caplog.at_level(logging.WARNING):
        data = built(pictures, masks, dataset={"batch_size": 4})
    texts = [record.getMessage() for record in caplog.records if "mask" in record.getMessage()]
    assert len(texts) == 2
    assert texts[0].startswith("1 pictures have no mask")
    assert "wide.png" in texts[0]
    assert "nobody.png" in texts[1]
    loaded = data.load(data.plan_epoch(1, 1).batches[0].draws)
    assert loaded.masks is not None
    whole = [draw.item.name == "wide.png" for draw in loaded.draws]
    assert torch.equal(loaded.masks[whole.index(True)], torch.ones(12, 12))
    assert loaded.masks[whole.index(False)].min() < 1


def test_without_masks_a_batch_has_none(tmp_path: Path) -> None:
    pictures, _ = make(tmp_path)
    data = built(pictures, None, masked_loss=False)
    assert data.load(data.plan_epoch(1, 1).batches[0].draws).masks is None
    assert data.load(()).masks is None


def test_a_picture_without_alpha_is_trained_whole(tmp_path: Path) -> None:
    pictures, _ = make(tmp_path, {"a.png": (96, 96)})
    data = built(pictures, None, subset={"alpha_mask": True}, masked_loss=False)
    mask = data.load(data.plan_epoch(1, 1).batches[0].draws).masks
    assert mask is not None
    assert torch.equal(mask, torch.ones(1, 12, 12))


@pytest.mark.parametrize(
    ("subset", "flags", "expected"),
    [
        ({}, {"masked_loss": True}, "--masked_loss has no effect"),
        ({"alpha_mask": True}, {}, "alpha_mask has no effect"),
    ],
)
def test_masks_that_cannot_act_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, subset: dict[str, Any], flags: dict[str, Any], expected: str
) -> None:
    pictures, _ = make(tmp_path, {"a.jpg": (96, 96)})
    built(pictures, None, subset=subset, **flags)
    assert expected in caplog.text


@pytest.mark.parametrize("cached", [False, True])
def test_a_black_mask_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, cached: bool) -> None:
    pictures, masks = make(tmp_path)
    Image.new("L", SIZES["wide.png"]).save(masks / "wide.png")
    for _ in range(2):  # a filled cache does not hide it
        caplog.clear()
        data = built(pictures, masks, cache_latents_to_disk=cached)
        data.fill_latents(FakeAutoencoder(), "ae-1")
        (text,) = [record.getMessage() for record in caplog.records if "black" in record.getMessage()]
        assert str(masks / "wide.png") in text
        assert text.startswith("1 masks")
    item = next(item for item in data.items if item.name == "wide.png")
    mask = data.load([data.draw(item.index, 1, 0)]).masks
    assert mask is not None
    assert torch.equal(mask, torch.zeros(1, 12, 12))


# ---- errors ----


def test_a_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    pictures, masks = make(tmp_path)
    noise_image(300, 120, mode="L").save(masks / "wide.png")
    with pytest.raises(DatasetError, match=r"wide\.png is 300 x 120 .*wide\.png 300 x 101.*make it again"):
        built(pictures, masks)


def test_a_mask_that_is_not_turned_is_explained(tmp_path: Path) -> None:
    pictures, masks = make(tmp_path, {"wide.jpg": (300, 101)})
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(pictures / "wide.jpg") as image:
        image.load()
    image.save(pictures / "wide.jpg", exif=exif)
    with pytest.raises(DatasetError, match="turn it"):
        built(pictures, masks)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("cut_at", [10, 1200])
def test_a_broken_mask_is_named(tmp_path: Path, cached: bool, cut_at: int) -> None:
    pictures, masks = make(tmp_path)
    content = (masks / "wide.png").read_bytes()
    (masks / "wide.png").write_bytes(content[:cut_at])
    with pytest.raises(DatasetError, match=r"masks.wide\.png cannot be read"):
        built(pictures, masks, cache_latents=cached).fill_latents(FakeAutoencoder(), "ae-1")


def test_a_mask_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    pictures, _ = make(tmp_path)
    with pytest.raises(DatasetError, match=r"conditioning_data_dir: .*nowhere cannot be read"):
        built(pictures, tmp_path / "nowhere")


# ---- caches ----


def _masks_of(data: TrainingData, flip: bool = False) -> dict[str, torch.Tensor]:
    found = {}
    for item in data.items:
        mask = data.load([dataclasses.replace(data.draw(item.index, 1, 0), flip=flip)]).masks
        assert mask is not None
        found[item.name] = mask[0]
    return found


@pytest.mark.parametrize("flag", ["cache_latents", "cache_latents_to_disk"])
@pytest.mark.parametrize("flip", [False, True])
def test_cached_masks_are_those_of_the_files_to_the_last_bit(tmp_path: Path, flag: str, flip: bool) -> None:
    pictures, masks = make(tmp_path)
    subset = {"flip_aug": True}
    plain = _masks_of(built(pictures, masks, dataset=BUCKETS, subset=subset), flip)
    data = built(pictures, masks, dataset=BUCKETS, subset=subset, **{flag: True})
    data.fill_latents(FakeAutoencoder(), "ae-1")
    cached = _masks_of(data, flip)
    assert plain.keys() == cached.keys() == SIZES.keys()
    for name, mask in plain.items():
        assert torch.equal(mask, cached[name])


def test_a_mirrored_mask_is_the_mask_of_the_mirrored_file(tmp_path: Path) -> None:
    """To the last bit: the averages do not depend on the order in which pixels are added up."""
    pictures, masks = make(tmp_path, {"a.png": (96, 96)})
    data = built(pictures, masks)
    source = data.showings._sources.of(data.items[0])
    assert source is not None
    mask = load_mask(source, data.items[0].placement, None)
    with Image.open(masks / "a.png") as image:
        mirrored = ImageOps.mirror(image)
    mirrored.save(masks / "a.png")
    assert torch.equal(load_mask(source, data.items[0].placement, None), mask.flip(-1))


def test_a_changed_mask_is_read_again_and_the_others_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from library.data import mask_cache

    pictures, masks = make(tmp_path)
    read: list[str] = []
    real = mask_cache.load_mask

    def counting(source: Any, *rest: Any) -> torch.Tensor:
        read.append(source.file.name)
        return real(source, *rest)

    monkeypatch.setattr(mask_cache, "load_mask", counting)

    def start() -> TrainingData:
        read.clear()
        data = built(pictures, masks, cache_latents_to_disk=True)
        data.fill_latents(FakeAutoencoder(), "ae-1")
        return data

    before = _masks_of(start())
    assert sorted(read) == sorted(SIZES)
    start()
    assert read == []
    shapes(*SIZES["wide.png"], seed=99).save(masks / "wide.png")
    autoencoder = FakeAutoencoder()
    after = _masks_of(start())
    assert read == ["wide.png"]
    assert autoencoder.encoded == 0
    assert not torch.equal(before["wide.png"], after["wide.png"])
    assert torch.equal(before["high.png"], after["high.png"])


@pytest.mark.parametrize("flag", ["cache_latents", "cache_latents_to_disk"])
def test_two_processes_share_the_masks(tmp_path: Path, flag: str) -> None:
    pictures, masks = make(tmp_path)
    Image.new("L", SIZES["square.png"]).save(masks / "square.png")
    alone = _masks_of(built(pictures, masks, dataset=BUCKETS))
    processes = FakeProcesses(2)

    def work(rank: int) -> dict[str, torch.Tensor]:
        data = built(pictures, masks, dataset=BUCKETS, **{flag: True})
        data.fill_latents(FakeAutoencoder(), "ae-1", Sharing(rank, 2, processes.gather(rank)))
        return _masks_of(data)

    for found in processes.run(work):
        for name, mask in alone.items():
            assert torch.equal(mask, found[name])


def test_threads_share_one_index_of_a_mask_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, masks = make(tmp_path)
    read = []
    load = PictureIndex.load

    def slow(path: Path) -> PictureIndex:
        read.append(path.parent.parent.name)
        time.sleep(0.2)  # long enough for all threads to come by
        return load(path)

    monkeypatch.setattr(PictureIndex, "load", slow)
    built(pictures, masks, dataset=BUCKETS, cache_latents_to_disk=True, max_data_loader_n_workers=4)
    assert read.count("masks") == 1
