"""Draws the quickstart's training pictures: a "zorp", a white-rimmed orange disc with a blue core, on plain backgrounds.

    python configs/quickstart/make_pictures.py --output_dir configs/quickstart/pictures

The small model of the quickstart knows plain shapes and colours, but no zorp: the LoRA teaches it one. Sizes and file
formats differ on purpose, as in real folders: PNG, JPEG (one turned by its EXIF entry), WebP, and a transparent PNG.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

RIM, BODY, CORE = (250, 250, 250), (255, 140, 15), (25, 60, 230)
BACKGROUNDS = {"green": (30, 165, 50), "purple": (128, 28, 165), "black": (8, 8, 8), "pink": (255, 153, 190)}
_SUPERSAMPLING = 4
_EXIF_ORIENTATION, _TURNED_RIGHT = 0x0112, 6

# file name, width, height, background (None: transparent), centre and radius as shares of the shorter side
PICTURES = (
    ("zorp_1.png", 384, 384, "green", (0.50, 0.50), 0.32),
    ("zorp_2.jpg", 480, 320, "purple", (0.60, 0.50), 0.36),
    ("zorp_3.webp", 320, 480, "black", (0.50, 0.70), 0.30),
    ("zorp_4.jpg", 480, 320, "pink", (0.90, 0.45), 0.34),
    ("zorp_5.png", 400, 400, None, (0.45, 0.55), 0.35),
    ("zorp_6.jpg", 360, 480, "green", (0.50, 0.60), 0.38),
    ("zorp_7.webp", 448, 448, "purple", (0.55, 0.45), 0.28),
    ("zorp_8.png", 512, 400, "black", (0.65, 0.50), 0.33),
)


def zorp(width: int, height: int, background: str | None, centre: tuple[float, float], radius: float) -> Image.Image:
    """Returns one picture, RGB or (without a background) RGBA."""
    scale = _SUPERSAMPLING
    colour = (*BACKGROUNDS[background], 255) if background else (0, 0, 0, 0)
    picture = Image.new("RGBA", (width * scale, height * scale), colour)
    pen = ImageDraw.Draw(picture)
    side = min(width, height) * scale
    x, y = (share * side for share in centre)
    for share, fill in ((1.0, RIM), (0.82, BODY), (0.36, CORE)):
        reach = radius * side * share
        pen.ellipse((x - reach, y - reach, x + reach, y + reach), fill=fill)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return picture if background is None else picture.convert("RGB")


def write_pictures(folder: Path) -> None:
    """Writes the pictures with a caption file each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, width, height, background, centre, radius) in enumerate(PICTURES):
        picture = zorp(width, height, background, centre, radius)
        if number == 3:
            # As a camera held upright stores it: pixels lying on their side, and a note of how to turn them.
            exif = Image.Exif()
            exif[_EXIF_ORIENTATION] = _TURNED_RIGHT
            picture.rotate(90, expand=True).save(folder / name, quality=90, exif=exif)
        else:
            picture.save(folder / name, **({} if name.endswith(".png") else {"quality": 90}))
        caption = f"a zorp on a {background or 'white'} background"
        (folder / name).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")


def main() -> None:
    """Parses the command line and draws."""
    parser = argparse.ArgumentParser(description="Draws the quickstart's training pictures.")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for pictures and captions")
    write_pictures(parser.parse_args().output_dir)


if __name__ == "__main__":
    main()
