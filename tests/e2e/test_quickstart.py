"""The quickstart really teaches the small model something, and its files are what they say."""

from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from e2e_helpers import log_lines, python
from PIL import Image

from configs.quickstart.make_pictures import PICTURES
from library import keyed_random
from library.data.dataset import TrainingData
from library.lumina import flow
from library.lumina.gemma2 import pad_features
from library.lumina.loading import ModelPaths, inspect_models, load_autoencoder, load_gemma2, load_next_dit
from library.lumina.settings import FlowSettings
from library.training.arguments import TrainConfig, parse_arguments
from networks import lora_lumina

CONFIG = "configs/quickstart/quickstart.toml"
SIGMAS = (0.2, 0.4, 0.6, 0.8, 0.95)


@pytest.fixture
def trained(train: Callable, tmp_path: Path) -> tuple[TrainConfig, Path]:
    """Runs a third of the quickstart and returns its settings and its LoRA."""
    shorter = ["--max_train_epochs=10", "--sample_every_n_epochs=5", "--save_every_n_epochs=5"]
    train([f"--config_file={CONFIG}", f"--output_dir={tmp_path}", f"--logging_dir={tmp_path / 'logs'}", *shorter])
    config = parse_arguments([f"--config_file={CONFIG}", f"--output_dir={tmp_path}"])
    assert config is not None
    return config, tmp_path / "zorp.safetensors"


@torch.no_grad()
def loss_at_fixed_noise(config: TrainConfig, lora: Path, multiplier: float) -> float:
    """Returns the mean loss over all training pictures at the same noise and noise levels each time."""
    model = config.model
    assert model.pretrained_model_name_or_path is not None
    files = inspect_models(ModelPaths(dit=model.pretrained_model_name_or_path, gemma2=model.gemma2, ae=model.ae))
    dit = load_next_dit(files.dit, torch.float32)
    encoder = load_gemma2(files, torch.float32, model.gemma2_max_token_length, model.system_prompt)
    autoencoder = load_autoencoder(files.ae, torch.float32)
    network, _ = lora_lumina.create_network_from_weights(multiplier, str(lora), None, None, dit, for_inference=True)
    network.apply_to(None, dit)
    data = TrainingData.build(config.data, seed=0, show_progress=False)
    data.latents = data.text = None  # encode here, without the caches
    losses = []
    for item in data.items:
        batch = data.load([data.draw(item.index, epoch=1, repeat=0)])
        assert batch.pixels is not None
        latents = autoencoder.encode(batch.pixels)
        features, mask = pad_features(encoder.encode([item.caption]))
        noise = keyed_random.normal("fixed noise", [item.index], latents.shape[1:])
        for level in SIGMAS:
            sigma = torch.tensor([level])
            noisy = flow.add_noise(latents, noise, sigma)
            velocity = dit(noisy, flow.lumina_time(sigma), features, mask)
            losses.append(float(flow.loss_map(FlowSettings(), velocity, latents, noise, noisy, sigma).mean()))
    return sum(losses) / len(losses)


def test_the_loss_falls_and_the_pictures_change(trained: tuple[TrainConfig, Path]) -> None:
    config, lora = trained
    before = loss_at_fixed_noise(config, lora, 0.0)
    after = loss_at_fixed_noise(config, lora, 1.0)
    assert after < 0.95 * before, f"{before:.4f} -> {after:.4f}"
    pictures = sorted((lora.parent / "sample").glob("*.png"))
    assert [path.name.split("_2")[0] for path in pictures] == [
        f"zorp_e{epoch:06d}_{index:02d}" for epoch in (0, 5, 10) for index in (0, 1)
    ]
    first, last = (numpy.asarray(Image.open(path)).astype(int) for path in (pictures[0], pictures[4]))
    assert numpy.abs(first - last).mean() > 10


def test_typed_steps_go_before_the_files_epochs_and_nothing_is_warned_of(tmp_path: Path) -> None:
    folders = [f"--output_dir={tmp_path}", f"--logging_dir={tmp_path / 'logs'}"]
    typed = ["--max_train_steps=2", "--sample_every_n_steps=1", "--sample_at_first=false"]
    done = python("lumina_train_network.py", f"--config_file={CONFIG}", *folders, *typed)
    assert done.returncode == 0, done.stderr
    lines = log_lines(done)
    assert "Steps: 2 in 1 epoch (13 batches an epoch)" in lines
    assert not [line for line in lines if line.startswith("WARNING")]
    assert lines[0] == (
        f"The command line goes before {CONFIG}: --max_train_steps 2 replaces max_train_epochs = 30,"
        " --sample_every_n_steps 1 replaces sample_every_n_epochs = 10"
    )
    names = sorted(path.name[:14] for path in (tmp_path / "sample").glob("zorp_*_00_*.png"))
    assert names == ["zorp_000001_00", "zorp_000002_00"]


def test_pictures_are_what_the_script_draws(tmp_path: Path) -> None:
    """Sizes, formats and captions; the encoded bytes may differ between versions of Pillow."""
    from configs.quickstart.make_pictures import write_pictures

    write_pictures(tmp_path)
    folder = Path(__file__).parents[2] / "configs" / "quickstart" / "pictures"
    for name, width, height, *_ in PICTURES:
        with Image.open(tmp_path / name) as made, Image.open(folder / name) as stored:
            assert (made.format, made.mode, made.getexif().get(0x0112)) == (
                stored.format,
                stored.mode,
                stored.getexif().get(0x0112),
            )
            assert sorted(made.size) == sorted(stored.size) == sorted((width, height))
            difference = numpy.asarray(made.convert("RGB")).astype(int) - numpy.asarray(stored.convert("RGB"))
            assert numpy.abs(difference).mean() < 1
        caption = (folder / name).with_suffix(".txt")
        assert caption.read_text(encoding="utf-8") == (tmp_path / name).with_suffix(".txt").read_text(encoding="utf-8")
