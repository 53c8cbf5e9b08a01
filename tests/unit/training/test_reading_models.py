"""Models that compute on a device go there block by block while they are read. The meta device stands for one."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from e2e_helpers import Job, make_job
from torch import nn
from trainer_helpers import made_trainer

from library.errors import DrawingError
from library.inference.loras import LoraFiles
from library.inference.models import DrawingModels
from library.inference.settings import ModelFlags
from library.lumina import loading
from library.lumina.prompt_template import PromptTemplate
from library.memory.settings import AttentionSettings, QuantisationSettings

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"))


def place_of(finish: Any) -> str:
    """Returns where a block with a large matrix is after ``finish``, which only keeps or moves what was read."""
    block = nn.Sequential(nn.Linear(64, 64, bias=False), nn.LayerNorm(64)).requires_grad_(False)
    if finish is not None:
        finish(block, ["0"])
    places = {tensor.device.type for tensor in (*block.parameters(), *block.buffers())}
    assert len(places) == 1
    return places.pop()


def test_blocks_that_are_trained_with(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = made_trainer(job.train_flags(tmp_path), last="rehearse_network")
    readings: dict[str, Any] = {}
    for name in ("load_text_encoder", "load_model"):
        monkeypatch.setattr(trainer, name, lambda dtype, reading, name=name: readings.setdefault(name, reading))
    monkeypatch.setattr("library.memory.prepare.place", lambda model, *_, **__: model)
    for device, blocks_to_swap, expected in ((META, None, "meta"), (META, 2, "cpu"), (CPU, None, "cpu")):
        readings.clear()
        trainer.device = device
        memory = dataclasses.replace(trainer.config.memory, blocks_to_swap=blocks_to_swap)
        data = dataclasses.replace(trainer.config.data, cache_text_encoder_outputs=True, cache_latents=True)
        trainer.config = dataclasses.replace(trainer.config, memory=memory, data=data)
        monkeypatch.setattr(trainer, "_streamed_blocks", list)
        trainer.load_models()
        assert place_of(readings["load_model"].finish) == expected
        trainer.text_encoder = None
        trainer._read_text_encoder()
        # Gemma2's layers are streamed on GPUs alone.
        assert place_of(readings["load_text_encoder"].finish) == device.type


def test_what_merges_behind_reading_finds_the_model_on_the_cpu(job: Job, tmp_path: Path) -> None:
    trainer = made_trainer(job.train_flags(tmp_path), last="rehearse_network")
    trainer.device = META
    trainer.base_weights.weights = ["a file"]
    for fits_without_weights, expected in ((False, "cpu"), (True, "meta")):
        trainer.base_weights._fits_without_weights = fits_without_weights
        assert place_of(trainer._reading(None, None, META).finish) == expected


@pytest.mark.parametrize("offload", [False, True])
def test_blocks_that_draw(job: Job, monkeypatch: pytest.MonkeyPatch, offload: bool) -> None:
    """With ``--offload`` a model goes to the device when its turn comes."""
    places = {}

    def noted(name: str) -> Any:
        def load(*_: Any, finish: Any, **__: Any) -> Any:
            places[name] = place_of(finish)
            if len(places) == 2:
                raise DrawingError("enough")

        return load

    for name in ("load_gemma2", "load_next_dit"):
        monkeypatch.setattr(loading, name, noted(name))
    monkeypatch.setattr("library.inference.models._device", torch.device)  # which refuses what does not compute
    monkeypatch.setattr("library.memory.attention.choose_attention", lambda *_: SimpleNamespace(function=None))
    flags = ModelFlags(
        pretrained_model_name_or_path=job.models / "quickstart_dit.safetensors",
        gemma2_path=job.models / "quickstart_gemma2.safetensors",
        ae_path=job.models / "quickstart_ae.safetensors",
        device="meta",
        offload=offload,
    )
    loras = LoraFiles((), False, lambda *_: None)
    with pytest.raises(DrawingError, match="enough"):
        DrawingModels(flags, AttentionSettings(), QuantisationSettings(), loras, 40, PromptTemplate(""))
    assert set(places.values()) == {"cpu" if offload else "meta"}
