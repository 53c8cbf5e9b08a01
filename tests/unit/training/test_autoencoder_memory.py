"""When the autoencoder leaves the device, and what a user is told where a picture does not fit there."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from e2e_helpers import Job, make_job
from trainer_helpers import made_trainer

from library.errors import SettingsError
from library.training.frozen_models import FrozenModels


class _Model:
    """Stands for a model on a device that this machine has not."""

    def __init__(self, device: str) -> None:
        self.device = device

    def parameters(self) -> Any:
        return iter([SimpleNamespace(device=torch.device(self.device))])

    def to(self, device: str) -> None:
        self.device = device


@pytest.mark.parametrize(
    ("cached", "step", "spare_gib", "expected"),
    [
        (True, 5, 0.9, "cpu"),
        (True, 5, 1.1, "cuda"),
        (True, 0, 50, "cpu"),  # what training needs is not known yet
        (False, 5, 0, "cuda"),  # training needs it
    ],
)
def test_the_autoencoder_stays_only_where_memory_is_to_spare(
    cached: bool, step: int, spare_gib: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("library.memory.room.never_needed_bytes", lambda device: spare_gib * 2**30)
    model, freed = _Model("cuda"), []
    trainer: Any = SimpleNamespace(
        config=SimpleNamespace(data=SimpleNamespace(cache_latents=cached)),
        autoencoder=SimpleNamespace(model=model),
        device=torch.device("cuda"),
        _free=lambda: freed.append(True),
    )
    for _ in range(2):
        FrozenModels._put_autoencoder_away(trainer, has_trained=step > 0)
        assert model.device == expected
    assert freed == [True] * (expected == "cpu")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.mark.parametrize(
    ("more", "says", "does_not_say"),
    [
        ([], ["--cache_latents encodes before", "--vae_tiling", "without --no_half_vae"], []),
        (["--mixed_precision=fp16"], ["--vae_tiling"], ["bf16"]),
        (
            ["--cache_latents", "--vae_tiling", "--mixed_precision=bf16"],
            ["--resolution"],
            ["--cache_latents", "--vae_tiling", "--no_half_vae"],
        ),
    ],
)
def test_a_picture_that_does_not_fit_is_a_users_error(
    job: Job, tmp_path: Path, more: list[str], says: list[str], does_not_say: list[str]
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer = made_trainer(job.train_flags(tmp_path, *more), last="build_data")
    trainer.ready_autoencoder().model.encoder.forward = full
    with pytest.raises(SettingsError, match="too small to encode a picture of 96x64 pixels: ") as caught:
        trainer.encode_pictures(torch.zeros(2, 3, 64, 96))
    assert all(text in str(caught.value) for text in says)
    assert not any(text in str(caught.value) for text in does_not_say)


def test_tiles_are_another_cache(job: Job, tmp_path: Path) -> None:
    flags = job.train_flags(tmp_path, "--cache_latents_to_disk", f"--cache_dir={tmp_path / 'cache'}")
    whole, tiled = made_trainer(flags, last="build_data"), made_trainer([*flags, "--vae_tiling"], last="build_data")
    assert whole.latent_fingerprint((1296, 1280)) != tiled.latent_fingerprint((1296, 1280))
    assert whole.latent_fingerprint((1280, 1280)) == tiled.latent_fingerprint(
        (1280, 1280)
    )  # never cut, so never redone
    assert not whole.ready_autoencoder().tiled
    assert tiled.ready_autoencoder().tiled
