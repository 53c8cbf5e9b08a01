"""Masks act on what is learned, cached and read anew, and a mask of ones changes nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_helpers import Job, difference
from PIL import Image


def masks(job: Job, folder: Path, covered: float) -> Path:
    """Returns a folder of masks whose left part is trained."""
    folder.mkdir()
    for path in job.pictures.glob("*"):
        if path.suffix in (".png", ".jpg", ".webp"):
            with Image.open(path) as picture:
                mask = Image.new("L", picture.size, 0)
            mask.paste(255, (0, 0, round(mask.width * covered), mask.height))
            mask.save(folder / f"{path.stem}.png")
    return folder


@pytest.mark.parametrize("caching", [["--cache_latents"], []], ids=["cached", "uncached"])
def test_a_mask_changes_what_is_learned(job: Job, tmp_path: Path, train: Callable, caching: list[str]) -> None:
    def run(name: str, *flags: str) -> Path:
        train(job.train_flags(tmp_path / name, "--network_train_unet_only", "--max_train_epochs=1", *caching, *flags))
        return tmp_path / name / "my.safetensors"

    plain = run("plain")
    whole = run("whole", "--masked_loss", f"--conditioning_data_dir={masks(job, tmp_path / 'ones', 1.0)}")
    half = ["--masked_loss", f"--conditioning_data_dir={masks(job, tmp_path / 'halves', 0.5)}"]
    masked, normalized = run("masked", *half), run("normalized", *half, "--normalize_masked_loss")
    assert difference(plain, whole) == 0
    # Other pixels count, so AdamW's steps go elsewhere; half the loss alone would hardly show with AdamW.
    assert difference(plain, masked) > 0.05
    assert difference(masked, normalized) > 0
