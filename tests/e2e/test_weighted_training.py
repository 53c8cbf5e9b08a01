"""--weighted_captions trains, the same with cached and uncached captions, and otherwise than without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from e2e_helpers import Job, distance, make_pictures


def test_weights_train_cached_and_uncached(job: Job, tmp_path: Path, train: Callable) -> None:
    # defect 32
    pictures = tmp_path / "pictures"
    make_pictures(pictures)
    for number, file in enumerate(sorted(pictures.glob("*.txt"))):
        file.write_text(f"a (red:1.8) disc, [number] {number}", encoding="utf-8")
    common = ["--network_train_unet_only", f"--train_data_dir={pictures}", "--max_train_epochs=1"]
    runs = {
        "uncached": ["--weighted_captions"],
        "cached": ["--weighted_captions", "--cache_text_encoder_outputs"],
        "plain": [],
    }
    loras = {}
    for name, flags in runs.items():
        train(job.train_flags(tmp_path / name, *common, *flags))
        loras[name] = tmp_path / name / "my.safetensors"
    # The cache rounds features to bfloat16, and Adam's first steps go by the gradient's sign: without weights it is 0.01.
    assert distance(loras["uncached"], loras["cached"]) < 0.05
    assert distance(loras["uncached"], loras["plain"]) > 0.1
