"""The scripts that make small and full-size models write what the loader reads."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from bench.make_full_size import make

from configs.quickstart.make_models import make_models, write_files
from configs.quickstart.teach_models import draw_picture, teach_autoencoder, teach_next_dit
from library.lumina.autoencoder import Autoencoder, build_autoencoder
from library.lumina.loading import ModelPaths, inspect_models, load_gemma2, load_next_dit


def test_full_size_models_with_fewer_layers_and_widths_load(tmp_path: Path) -> None:
    files = inspect_models(ModelPaths(*make(tmp_path, layers=1, shrink=8)))
    assert files.dit.config.num_layers == 1
    # As in the usual files: a run in bf16 converts Gemma2 and the autoencoder.
    for component, dtype in ((files.dit, "BF16"), (files.gemma2, "F16"), (files.ae, "F32")):
        assert {entry.dtype for source in component.sources.values() for entry in source.entries} == {dtype}
    weights = files.dit.tensors(torch.bfloat16)
    assert abs(weights["layers.0.feed_forward.w2.weight"].float().std().item() * 1152**0.5 - 1) < 0.02
    assert weights["norm_final.weight"].eq(1).all()
    load_next_dit(files.dit, torch.bfloat16)
    encoder = load_gemma2(files, torch.bfloat16, 16, "")
    (features,) = encoder.encode(["a cat"])
    assert features.isfinite().all()


def test_the_quickstart_models_are_small_and_every_part_has_an_effect(tmp_path: Path) -> None:
    models = make_models("quickstart")
    paths = write_files(models, tmp_path)
    assert sum(path.stat().st_size for path in paths) < 6e6
    files = inspect_models(ModelPaths(*paths))
    model = load_next_dit(files.dit, torch.float32)
    cat, dog = load_gemma2(files, torch.float32, 64, "").encode(["a red disc", "a blue ring"])
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    time = torch.tensor([0.5])
    first, second = model(latents, time, cat[None]), model(latents, time, dog[None])
    assert first.std() > 0.1
    assert (first - second).abs().max() > 0.01


def test_teaching_brings_the_models_nearer_to_the_pictures(tmp_path: Path) -> None:
    models, taught = make_models("tiny"), make_models("tiny")
    teach_autoencoder(taught, 30)
    teach_next_dit(taught, 2, num_pictures=4)
    picture, caption = draw_picture(random.Random(5), 32, 48)
    assert picture.shape == (3, 32, 48)
    assert picture.abs().max() <= 1
    assert caption.startswith("a ")
    errors = []
    for each in (models, taught):
        ae = Autoencoder(build_autoencoder(each.ae_config, each.ae), each.ae_config)
        errors.append((ae.decode(ae.encode(picture[None])) - picture).abs().mean().item())
    assert errors[1] < 0.8 * errors[0]
    assert any(not torch.equal(models.dit[name], taught.dit[name]) for name in models.dit)
    inspect_models(ModelPaths(*write_files(taught, tmp_path)))


def test_the_same_seed_makes_the_same_models() -> None:
    first, second, other = make_models("tiny"), make_models("tiny"), make_models("tiny", seed=1)
    assert first.tokenizer == second.tokenizer
    for name in first.dit:
        assert torch.equal(first.dit[name], second.dit[name])
    assert not torch.equal(first.dit["x_embedder.weight"], other.dit["x_embedder.weight"])
