"""Small picture folders, datasets and stand-ins for encoders that the data tests share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from library.data.cache import Fingerprint
from library.data.dataset import TrainingData
from library.data.settings import DataSettings
from library.data.sharing import ALONE, Sharing


def noise_image(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Returns a picture of random pixels; lossless formats keep them."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (height, width) if channels == 1 else (height, width, channels)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels)


def make_pictures(folder: Path, sizes: dict[str, tuple[int, int]], captions: bool = True) -> Path:
    """Writes a picture per ``name -> (width, height)``, each with other pixels, and captions ``a <stem>, tag``."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, size) in enumerate(sizes.items()):
        noise_image(*size, seed=seed).save(folder / name)
        if captions:
            stem = Path(name).stem
            (folder / f"{stem}.txt").write_text(f"a {stem}, tag", encoding="utf-8")
    return folder


def settings_for(folder: Path, **changes: Any) -> DataSettings:
    """Returns settings for a flat folder of small pictures."""
    values: dict[str, Any] = {"train_data_dir": str(folder), "resolution": (64, 64), "caption_extension": ".txt"}
    return DataSettings(**{**values, **changes})


def build(folder: Path, seed: int = 1, **changes: Any) -> TrainingData:
    return TrainingData.build(settings_for(folder, **changes), seed, show_progress=False)


def captions_of(data: TrainingData, epochs: Iterable[int]) -> set[str]:
    """Returns every caption that these epochs and validation use."""
    return {caption for caption, _ in data.captions(epochs)}


def missing_latents(data: TrainingData, fingerprint: Fingerprint, sharing: Sharing = ALONE) -> int:
    """Returns how many pictures have no latents of an encoder yet; all processes call it."""
    assert data.latents is not None
    jobs, _ = data.latents.missing((*data.items, *data.validation_items), fingerprint, sharing)
    return len(jobs)


def missing_text(data: TrainingData, captions: Iterable[str], fingerprint: str, sharing: Sharing = ALONE) -> int:
    """Returns how many captions have no features of an encoder yet; all processes call it."""
    assert data.text is not None
    return len(data.text.missing(captions, fingerprint, sharing))


class FakeAutoencoder:
    """Latents that depend on the pixels: 8 x 8 averages of the three channels and their sum; counts its pictures."""

    fingerprint = "ae-1"

    def __init__(self) -> None:
        self.encoded = 0
        self.batches: list[tuple[int, ...]] = []

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        self.encoded += len(pixels)
        self.batches.append(tuple(pixels.shape))
        small = torch.nn.functional.avg_pool2d(pixels, 8)
        return torch.cat([small, small.sum(dim=1, keepdim=True)], dim=1)


class FakeTextEncoder:
    """One feature row per character; keeps what it was asked for."""

    fingerprint = "te-1"

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    @property
    def encoded(self) -> list[str]:
        return [caption for batch in self.batches for caption in batch]

    def __call__(self, captions: list[str]) -> list[torch.Tensor]:
        self.batches.append(captions)
        return [torch.tensor([[ord(char) % 128, 1.0] for char in f"^{caption}"]) for caption in captions]


class FakeProcesses:
    """Runs one function per rank in threads whose ``gather`` exchanges lists as real processes would."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._parts: list[list] = [[] for _ in range(count)]
        self._barrier = threading.Barrier(count, timeout=30)

    def gather(self, rank: int) -> Callable[[list], list[list]]:
        def exchange(mine: list) -> list[list]:
            self._parts[rank] = mine
            self._barrier.wait()
            everyone = [list(part) for part in self._parts]
            self._barrier.wait()
            return everyone

        return exchange

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        results: list[Any] = [None] * self.count

        def call(rank: int) -> None:
            try:
                results[rank] = work(rank)
            except BaseException as error:
                self._barrier.abort()
                results[rank] = error

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        errors = [result for result in results if isinstance(result, BaseException)]
        if errors:
            # Ranks that were waiting for the one that failed only know that it is gone.
            raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
        return results
