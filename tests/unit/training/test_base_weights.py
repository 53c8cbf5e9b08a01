"""Merging LoRA files into the models before training."""

import hashlib
import json
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from e2e_helpers import Job, make_job
from safetensors.torch import load_file, save_file
from trainer_helpers import fill_network, made_trainer

from library.errors import NetworkError, SettingsError
from library.lumina import loading
from networks import lora_lumina

UNCACHED = ["--cache_latents", "--network_train_unet_only"]
CACHED = ["--cache_latents", "--cache_text_encoder_outputs"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def both(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of both models that changes their outputs."""
    return _made_lora(job, tmp_path_factory.mktemp("both"))


@pytest.fixture(scope="module")
def transformer_only(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the transformer."""
    return _made_lora(job, tmp_path_factory.mktemp("dit"), "--network_train_unet_only")


def _made_lora(job: Job, folder: Path, *more: str) -> Path:
    trainer = made_trainer(job.train_flags(folder, "--network_alpha=2", *more), last="build_network")
    fill_network(trainer.network, size=0.1)
    trainer.network.save_weights(folder / "base.safetensors", None, {"a": "b"})
    return folder / "base.safetensors"


def base_flags(*pairs: tuple[Path, float]) -> list[str]:
    files, multipliers = zip(*pairs, strict=True)
    return ["--base_weights", *map(str, files), "--base_weights_multiplier", *map(str, multipliers)]


def merged_as_in_inference(trainer: Any, pairs: list[tuple[Path, float]]) -> tuple[Any, Any]:
    """Returns the models as the inference program makes them for ``--merge_lora_weights``."""
    dit = loading.load_next_dit(trainer.files.dit, torch.float32, show_progress=False)
    encoder = loading.load_gemma2(trainer.files, torch.float32, 256, "")
    for path, multiplier in pairs:
        network, weights = lora_lumina.create_network_from_weights(
            multiplier, path, None, [encoder.model], dit, for_inference=True
        )
        network.merge_to([encoder.model], dit, weights, None, None)
    return dit, encoder


@pytest.mark.parametrize("flags", [UNCACHED, CACHED], ids=["uncached", "cached text"])
def test_the_models_are_those_of_inference_with_the_same_files(
    job: Job, tmp_path: Path, both: Path, transformer_only: Path, flags: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """defect 38: merged after the text had been encoded; and what is on disk stays as it is."""
    caplog.set_level(logging.INFO)
    model_files = list(job.models.iterdir())
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in model_files}
    pairs = [(both, 0.5), (transformer_only, 1.5)]
    trainer = made_trainer(job.train_flags(tmp_path, *flags, *base_flags(*pairs)), last="load_models")
    dit, encoder = merged_as_in_inference(trainer, pairs)
    found = trainer.dit.state_dict()
    assert all(torch.equal(found[name], expected) for name, expected in dit.state_dict().items())

    batch = trainer.data.load(trainer.data.plan_epoch(1, 1).batch(0).draws)
    with torch.no_grad():
        expected = encoder.encode(batch.captions)
        (plain,) = loading.load_gemma2(trainer.files, torch.float32, 256, "").encode(batch.captions[:1])
    features = trainer.caption_features(batch)
    rounded = expected[0].bfloat16().float() if flags is CACHED else expected[0]  # caches hold bfloat16
    # Cached captions are encoded in batches, where padding changes the order of float32 sums.
    torch.testing.assert_close(features[0], rounded, rtol=2**-7 if flags is CACHED else 0, atol=0)
    assert not torch.allclose(features[0], plain, rtol=0.05)

    assert {path: hashlib.sha256(path.read_bytes()).digest() for path in model_files} == before
    merged = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Merging")]
    num_gemma2 = sum("lora_te" in name and name.endswith("alpha") for name in load_file(both))
    num_dit = sum("lora_unet" in name and name.endswith("alpha") for name in load_file(both))
    assert sorted(merged) == sorted(
        [
            f"Merging {num_gemma2} modules of base.safetensors into Gemma2, multiplier 0.5",
            f"Merging {num_dit} modules of base.safetensors into the Next-DiT, multiplier 0.5",
            f"Merging {num_dit} modules of base.safetensors into the Next-DiT, multiplier 1.5",
        ]
    )


def test_training_starts_from_the_merged_model(job: Job, tmp_path: Path, transformer_only: Path) -> None:
    flags = job.train_flags(tmp_path, *CACHED)
    losses = {}
    for name, more in {
        "plain": [],
        "merged": ["--base_weights", str(transformer_only)],
        "attached": [f"--network_weights={transformer_only}", "--network_alpha=2"],
    }.items():
        trainer = made_trainer([*flags, *more])
        batch = trainer.data.load(trainer.data.plan_epoch(1, 1).batch(0).draws)
        losses[name] = trainer.losses_of(batch).values.detach()
    # W x + s up(down x) against (W + s up down) x in float32.
    torch.testing.assert_close(losses["merged"], losses["attached"], rtol=1e-4, atol=0)
    assert not torch.allclose(losses["merged"], losses["plain"], rtol=2e-3)  # the LoRA matters more than the tolerance


def test_cached_text_knows_what_gemma2_was_merged_with(
    job: Job, tmp_path: Path, both: Path, transformer_only: Path
) -> None:
    """defects 6 and 38: no features of another Gemma2."""
    disk = ["--cache_text_encoder_outputs_to_disk", f"--cache_dir={tmp_path / 'cache'}"]
    found = {}
    for name, more in {
        "plain": [],
        "dit": base_flags((transformer_only, 1.0)),
        "off": base_flags((both, 0.0)),
        "one": base_flags((both, 1.0)),
        "half": base_flags((both, 0.5)),
    }.items():
        trainer = made_trainer(job.train_flags(tmp_path, *disk, *more), last="rehearse_network")
        found[name] = trainer.text_fingerprint()
    assert found["plain"] == found["dit"] == found["off"]  # these leave Gemma2 as it is
    assert len({found["plain"], found["one"], found["half"]}) == 3


def test_other_programs_keys_are_merged_too(job: Job, tmp_path: Path, transformer_only: Path) -> None:
    """defect 38: other key forms merged nothing and said so nowhere."""
    foreign = {}
    for key, tensor in load_file(transformer_only).items():
        name, dot, rest = key.removeprefix("lora_unet_").partition(".")
        if name == "layers_0_attention_qkv":
            new = rest.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
            foreign[f"diffusion_model.layers.0.attention.qkv{dot}{new}"] = tensor
    assert len(foreign) == 3
    save_file(foreign, tmp_path / "foreign.safetensors")
    flags = job.train_flags(tmp_path, *CACHED)
    plain = made_trainer(flags, last="load_models").dit
    dit = made_trainer([*flags, *base_flags((tmp_path / "foreign.safetensors", 1.0))], last="load_models").dit
    whole = made_trainer([*flags, *base_flags((transformer_only, 1.0))], last="load_models").dit
    assert torch.equal(dit.layers[0].attention.qkv.weight, whole.layers[0].attention.qkv.weight)
    assert not torch.equal(dit.layers[0].attention.qkv.weight, plain.layers[0].attention.qkv.weight)
    assert torch.equal(dit.layers[0].attention.out.weight, plain.layers[0].attention.out.weight)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (
            {"lora_unet_input_blocks_1.lora_down.weight": (2, 4), "lora_unet_input_blocks_1.lora_up.weight": (4, 2)},
            "SDXL",
        ),
        ({"x.weight": (2, 2)}, "no LoRA keys"),
        (
            {
                "lora_unet_layers_0_attention_qkv.lora_down.weight": (2, 3),
                "lora_unet_layers_0_attention_qkv.lora_up.weight": (5, 2),
            },
            "does not fit",
        ),
    ],
)
def test_a_file_that_does_not_fit_shows_before_anything_is_encoded(
    job: Job, tmp_path: Path, tensors: dict[str, tuple[int, int]], says: str
) -> None:
    path = tmp_path / "wrong.safetensors"
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, path)
    with pytest.raises(NetworkError, match=says) as caught:
        made_trainer(job.train_flags(tmp_path, *CACHED, *base_flags((path, 1.0))), last="rehearse_network")
    assert str(caught.value).startswith("--base_weights: ")


def test_metadata_names_them(job: Job, tmp_path: Path, both: Path) -> None:
    trainer = made_trainer(job.train_flags(tmp_path, *CACHED, *base_flags((both, 0.5))), last="rehearse_network")
    (entry,) = json.loads(trainer.base_weights.metadata()["base_weights"])
    assert entry == {
        "name": "base.safetensors",
        "multiplier": 0.5,
        "sha256": hashlib.sha256(both.read_bytes()).hexdigest(),
    }


class OtherNetwork(torch.nn.Module):
    """A third party's network; it keeps what it was asked to merge into."""

    merged: list[tuple[int, bool]] = []  # noqa: RUF012 - read by the test

    def merge_to(self, text_encoders: list, unet: Any, weights_sd: Any, dtype: Any, device: Any) -> None:
        self.merged.append((len(text_encoders), next(unet.parameters()).is_meta))


def other_module(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    module = ModuleType("other_network")
    module.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec("other_network", None)
    module.create_network = lambda *args, **kwargs: OtherNetwork()  # type: ignore[attr-defined]
    for name, function in functions.items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "other_network", module)


def test_a_third_partys_network_module(
    job: Job, tmp_path: Path, both: Path, transformer_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flags(file: Path, *more: str) -> list[str]:
        return [*job.train_flags(tmp_path, *more, *base_flags((file, 1.0))), "--network_module=other_network"]

    other_module(monkeypatch)
    with pytest.raises(SettingsError, match="no create_network_from_weights"):
        made_trainer(flags(both), last="rehearse_network")

    other_module(monkeypatch, create_network_from_weights=lambda *args, **kwargs: (OtherNetwork(), {}))
    with pytest.raises(SettingsError, match="leave out --cache_text_encoder_outputs"):
        made_trainer(flags(both, *CACHED), last="rehearse_network")
    made_trainer(flags(transformer_only, *CACHED), last="load_models")
    made_trainer(flags(both, *UNCACHED), last="load_models")
    assert OtherNetwork.merged == [(0, False), (1, False)]

    other_module(monkeypatch, create_network_from_weights=lambda *args, **kwargs: (torch.nn.Identity(), {}))
    with pytest.raises(SettingsError, match="no merge_to"):
        made_trainer(flags(transformer_only, *CACHED), last="load_models")
