import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import noise_image
from PIL import Image, ImageOps

from library.data import images
from library.data.buckets import Placement


def _as_is(image_size: tuple[int, int]) -> Placement:
    return Placement(image_size, image_size, 0.0)


def _bytes_of(pixels: torch.Tensor) -> np.ndarray:
    """Returns (H, W, 3) uint8 of (3, H, W) in [-1, 1]."""
    return ((pixels + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(np.uint8)


def test_pixels_are_float32_rgb_in_minus_one_to_one(tmp_path: Path) -> None:
    image = Image.new("RGB", (3, 2), (255, 0, 128))
    image.putpixel((2, 0), (0, 255, 0))
    image.save(tmp_path / "a.png")
    pixels = images.load_pixels(tmp_path / "a.png", _as_is((3, 2)), None)
    assert pixels.shape == (3, 2, 3)
    assert pixels.dtype == torch.float32
    assert pixels[:, 0, 0].tolist() == pytest.approx([1.0, -1.0, 128 / 127.5 - 1], abs=1e-6)  # float32 rounding
    assert pixels[:, 0, 2].tolist() == [-1.0, 1.0, -1.0]


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_eight_exif_orientations(tmp_path: Path, orientation: int, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "webp" else {}
    noise_image(6, 4).save(path, exif=exif, **options)
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert images.read_size(path) == expected.size
    assert expected.size == ((4, 6) if orientation >= 5 else (6, 4))
    pixels = images.load_pixels(path, _as_is(expected.size), None)
    np.testing.assert_array_equal(_bytes_of(pixels), np.asarray(expected))


def _transparent(mode: str) -> Image.Image:
    """Returns a 2 x 1 picture: left fully transparent black, right opaque black."""
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    if mode == "P":
        palette = Image.new("P", (2, 1), 0)
        palette.putpalette([0, 0, 0, 0, 0, 0])
        palette.putpixel((1, 0), 1)
        palette.info["transparency"] = 0
        return palette
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_become_white(tmp_path: Path, mode: str) -> None:
    _transparent(mode).save(tmp_path / "a.png")
    pixels = images.load_pixels(tmp_path / "a.png", _as_is((2, 1)), None)
    assert pixels[:, 0, 0].tolist() == [1.0, 1.0, 1.0]
    assert pixels[:, 0, 1].tolist() == [-1.0, -1.0, -1.0]


def test_half_transparent_is_blended_with_white(tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1), (0, 0, 0, 51)).save(tmp_path / "a.png")
    assert np.asarray(images.open_rgb(tmp_path / "a.png")).tolist() == [[[204, 204, 204]]]


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "P", "I;16"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16))
    elif mode == "CMYK":
        image = Image.new("RGB", (3, 1))
        image.putdata([(0, 0, 0), (128, 128, 128), (255, 255, 255)])
        image = image.resize((48, 16), Image.Resampling.NEAREST).convert("CMYK")
    else:
        image = Image.new("L", (3, 1))
        image.putdata([0, 128, 255])
        image = image.convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    rgb = np.asarray(images.open_rgb(path)).astype(int)
    assert rgb.ndim == 3
    black, white = rgb[0, 0], rgb[0, -1]
    # JPEG rounds; everything else is exact.
    tolerance = 3 if mode == "CMYK" else 0
    assert black.max() <= tolerance
    assert white.min() >= 255 - tolerance
    if mode == "I;16":
        assert rgb[0, 1].tolist() == [128, 128, 128]


def test_resize_and_centre_crop(tmp_path: Path) -> None:
    # Columns 0..7 of brightness 0, 30, ...; resized to the same size, the middle four remain.
    row = np.arange(8, dtype=np.uint8) * 30
    Image.fromarray(np.tile(row, (4, 1))).save(tmp_path / "a.png")
    pixels = images.load_pixels(tmp_path / "a.png", Placement((8, 4), (4, 4), 0.0), None)
    assert _bytes_of(pixels)[0, :, 0].tolist() == [60, 90, 120, 150]
    # Halved by area: pairs are averaged, then the middle two of four remain.
    pixels = images.load_pixels(tmp_path / "a.png", Placement((4, 2), (2, 2), 0.0), None)
    assert _bytes_of(pixels)[0, :, 0].tolist() == [75, 135]


def test_resize_method_names() -> None:
    assert images.resize_method(None, (8, 8), (4, 4)) == "box"
    assert images.resize_method(None, (8, 8), (4, 9)) == "lanczos"
    assert images.resize_method("lanczos", (8, 8), (8, 8)) == "none"
    for name, used in [("area", "box"), ("linear", "bilinear"), ("cubic", "bicubic"), ("nearest", "nearest")]:
        assert images.resize_method(name, (8, 8), (4, 4)) == used


def test_each_interpolation_gives_its_own_picture(tmp_path: Path) -> None:
    noise_image(16, 16).save(tmp_path / "a.png")
    placement = Placement((11, 11), (11, 11), 0.0)
    results = {
        name: images.load_pixels(tmp_path / "a.png", placement, name).numpy().tobytes()
        for name in ("nearest", "area", "bilinear", "bicubic", "lanczos")
    }
    assert len(set(results.values())) == 5
    assert images.load_pixels(tmp_path / "a.png", placement, None).numpy().tobytes() == results["area"]


def _broken_files(folder: Path) -> dict[str, Path]:
    noise_image(64, 64).save(folder / "whole.png")
    noise_image(64, 64).save(folder / "whole.jpg")
    contents = {
        "empty.png": b"",
        "text.jpg": b"this is no picture",
        "cut.png": (folder / "whole.png").read_bytes()[:3000],
        "cut.jpg": (folder / "whole.jpg").read_bytes()[:1500],
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in contents}


@pytest.mark.parametrize("name", ["empty.png", "text.jpg", "cut.png", "cut.jpg"])
def test_broken_files_raise_what_is_declared(tmp_path: Path, name: str) -> None:
    path = _broken_files(tmp_path)[name]
    with pytest.raises(images.BROKEN_PICTURE) as caught:
        images.load_pixels(path, _as_is((64, 64)), None)
    assert images.reason(caught.value)
    with pytest.raises(images.BROKEN_PICTURE):
        images.check_decodable(path)
    images.check_decodable(tmp_path / "whole.png")
    images.check_decodable(tmp_path / "whole.jpg")


def test_pictures_beyond_pillows_limit_are_read(tmp_path: Path) -> None:
    # One bit a pixel keeps the file and the test small: 20,000 x 10,000 is above Pillow's 179 million.
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20000, 10000, 1, 0, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    assert images.read_size(tmp_path / "a.png") == (20000, 10000)


def test_a_picture_that_shrank_is_reported(tmp_path: Path) -> None:
    noise_image(32, 32).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="it has changed"):
        images.load_pixels(tmp_path / "a.png", Placement((32, 32), (64, 32), 0.0), "none")


def test_very_long_pictures_are_resized_in_their_middle_only(tmp_path: Path) -> None:
    """The middle comes out as it does from a picture that is cut to its middle first."""
    picture = Image.linear_gradient("L").resize((6000, 12)).convert("RGB")
    picture.save(tmp_path / "long.png")
    picture.crop((2964, 0, 3036, 12)).save(tmp_path / "middle.png")
    long = images.load_pixels(tmp_path / "long.png", Placement((32000, 64), (64, 64), 0.0), None)
    middle = images.load_pixels(tmp_path / "middle.png", Placement((384, 64), (64, 64), 0.0), None)
    assert long.shape == (3, 64, 64)
    # Both interpolate the same source pixels; Pillow rounds to whole levels on the way.
    assert (long - middle).abs().max() < 0.02
