"""When previews are drawn, under which names, and what a short memory does to them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image

from library.errors import DrawingError, SettingsError
from library.picture_text import DrawnWith, LoraInUse
from library.prompts import Prompt, batches_of
from library.training.arguments import all_specs, parse_arguments
from library.training.previews import Previews
from library.training.settings import SampleSettings
from library.training.unused_flags import warn_of_unused
from library.training.weights import Weights
from lumina_train_network import LuminaNetworkTrainer

_REQUIRED = [
    "--pretrained_model_name_or_path=m.safetensors",
    "--output_dir=out",
    "--resolution=64",
    "--network_module=networks.lora_lumina",
]

HOW = DrawnWith("lumina", 6.0, loras=(LoraInUse("my", 1.0),))
LOGGED: list[tuple[str, tuple[int, int], int]] = []


@pytest.fixture(autouse=True)
def _nothing_logged() -> None:
    LOGGED.clear()


def previews(
    folder: Path, draw: object, prompts: list[Prompt], rank: int = 0, count: int = 1, **when: object
) -> Previews:
    (folder / "p.txt").write_text("a", encoding="utf-8")
    processes = SimpleNamespace(rank=rank, count=count, gather=lambda mine: [mine], on_cuda=False)
    trackers = SimpleNamespace(log_picture=lambda name, picture, step: LOGGED.append((name, picture.size, step)))
    settings = SampleSettings(sample_prompts=folder / "p.txt", **when)  # type: ignore[arg-type]
    return Previews(settings, prompts, 1, folder, "my", processes, trackers, draw, HOW)  # type: ignore[arg-type]


def blank(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8)) for _ in prompts]


def names(folder: Path) -> list[str]:
    found = sorted((folder / "sample").glob("*")) if (folder / "sample").exists() else []
    return [path.name.split("_2")[0] for path in found if "_sheet_" not in path.name]


def test_epochs_go_before_steps(tmp_path: Path) -> None:
    one = previews(tmp_path, blank, [Prompt("a")], sample_every_n_epochs=2, sample_every_n_steps=1)
    one.at_first()
    one.after_step(1)
    one.after_epoch(1, 3)
    assert names(tmp_path) == []
    one.after_epoch(2, 6)
    assert names(tmp_path) == ["my_e000002_00"]


def test_steps_and_at_first(tmp_path: Path) -> None:
    one = previews(tmp_path, blank, [Prompt("a")], sample_every_n_steps=2, sample_at_first=True)
    one.at_first()
    for step in range(1, 5):
        one.after_step(step)
    assert names(tmp_path) == ["my_000002_00", "my_000004_00", "my_e000000_00"]


def test_a_prompt_without_a_seed_has_the_same_one_each_time(tmp_path: Path) -> None:
    seeds: list[int] = []

    def draw(prompts: Sequence[Prompt], given: Sequence[int]) -> list[Image.Image]:
        seeds.extend(given)
        return blank(prompts, given)

    one = previews(tmp_path, draw, [Prompt("a"), Prompt("b"), Prompt("c", seed=0)], sample_every_n_steps=1)
    one.after_step(1)
    one.after_step(2)
    # defect 40: seed 0 is a seed, and prompts without one do not share theirs
    assert seeds[:3] == seeds[3:]
    assert len(set(seeds)) == 3
    assert seeds[2] == 0
    files = sorted(path.name for path in (tmp_path / "sample").glob("*.png"))
    assert [name.endswith("_0.png") for name in files] == [False, False, True] * 2


def test_prompts_of_one_size_and_one_set_of_options_are_drawn_together(tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def draw(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image.Image]:
        assert (
            len({(p.width, p.height, p.sample_steps, p.scale, p.cfg_trunc_ratio, p.renorm_cfg) for p in prompts}) == 1
        )
        calls.append([prompt.prompt for prompt in prompts])
        return blank(prompts, seeds)

    prompts = [Prompt("a", "not", seed=1), Prompt("b", width=512), Prompt("c"), Prompt("d", scale=2.0), Prompt("e")]
    prompts += [Prompt("f", sample_steps=3), Prompt("g", cfg_trunc_ratio=1.0), Prompt("h", renorm_cfg=0.0), Prompt("i")]
    previews(tmp_path, draw, prompts, sample_every_n_steps=1, sample_batch_size=3).after_step(1)
    assert calls == [["a", "c", "e"], ["i"], ["b"], ["d"], ["f"], ["g"], ["h"]]
    assert names(tmp_path) == [f"my_000001_{index:02d}" for index in range(9)]
    assert [name for name, _, _ in LOGGED] == [*(f"sample_{index}" for index in range(9)), "sample_sheet"]


def test_files_say_how_they_were_drawn(tmp_path: Path) -> None:
    one = previews(tmp_path, blank, [Prompt("a", seed=3), Prompt("b")], sample_every_n_epochs=2)
    one.after_epoch(2, 7)
    first, second = sorted((tmp_path / "sample").glob("*.png"))
    with Image.open(first) as picture:
        assert picture.text["parameters"].startswith("a\nSteps: 36, Sampler: Euler, CFG scale: 3.5, Seed: 3, ")
        assert picture.text["parameters"].endswith(
            'Lora: "my: 1", Shift: 6, CFG truncation: 0.25, CFG renormalization: 1, Training: "epoch 2, step 7"'
        )
    with Image.open(second) as picture:
        assert f"Seed: {one._seeds[1]}, " in picture.text["parameters"]  # also of a prompt that names none


def test_processes_share_a_group(tmp_path: Path) -> None:
    prompts = [Prompt(str(number)) for number in range(5)]
    assert batches_of(prompts, 8, 1) == [[0, 1, 2, 3, 4]]
    assert batches_of(prompts, 8, 2) == [[0, 1, 2], [3, 4]]
    assert batches_of(prompts, 2, 2) == [[0, 1], [2, 3], [4]]
    assert batches_of(prompts, 1, 3) == [[0], [1], [2], [3], [4]]


def test_one_sheet_shows_all_pictures_of_an_event(tmp_path: Path) -> None:
    def draw(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image.Image]:
        return [Image.new("RGB", (prompt.width, prompt.height), (255, 0, 0)) for prompt in prompts]

    one = previews(tmp_path, draw, [Prompt("a", width=64, height=128), Prompt("b" * 500)], sample_every_n_epochs=1)
    one.after_epoch(1, 7)
    (path,) = (tmp_path / "sample").glob("my_e000001_sheet_*.jpg")
    with Image.open(path) as sheet:
        assert LOGGED[-1] == ("sample_sheet", sheet.size, 7)
        pixels = numpy.asarray(sheet)
        red = int(((pixels[..., 0] > 200) & (pixels[..., 1] < 60) & (pixels[..., 2] < 60)).sum())
    # Both are half their size: the larger one has 1024 px, and cells have 512.
    assert red == pytest.approx(32 * 64 + 512 * 512, rel=0.01)  # JPEG blurs edges


@pytest.mark.parametrize("name", ["sample_every_n_steps", "sample_every_n_epochs"])
@pytest.mark.parametrize("value", [0, -3])
def test_below_one_draws_nothing(tmp_path: Path, name: str, value: int) -> None:
    one = previews(tmp_path, blank, [Prompt("a")], **{name: value})
    one.after_step(3)
    one.after_epoch(3, 3)
    assert names(tmp_path) == []


def test_processes_share_the_prompts(tmp_path: Path) -> None:
    for rank in range(2):
        one = previews(tmp_path, blank, [Prompt("a")] * 3, rank, 2, sample_every_n_steps=1)
        one.after_step(1)
        assert len(names(tmp_path)) == (2, 3)[rank]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")],
)
def test_too_little_memory_for_a_preview_does_not_end_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def draw(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image.Image]:
        if prompts[0].width == 4096:
            raise error
        return blank(prompts, seeds)

    one = previews(tmp_path, draw, [Prompt("a", width=4096), Prompt("b")], sample_every_n_steps=1)
    one.after_step(1)
    assert names(tmp_path) == ["my_000001_01"]
    assert "too little memory for a preview of 4096x1024" in caplog.text


def test_a_batch_that_does_not_fit_is_drawn_one_by_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tried: list[int] = []

    def draw(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image.Image]:
        tried.append(len(prompts))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if prompts[0].prompt == "b":
            raise DrawingError("the picture came out as numbers that are not finite")
        return blank(prompts, seeds)

    prompts = [Prompt("a"), Prompt("b"), Prompt("c")]
    previews(tmp_path, draw, prompts, sample_every_n_steps=1, sample_batch_size=3).after_step(1)
    assert tried == [3, 1, 1, 1]
    assert names(tmp_path) == ["my_000001_00", "my_000001_02"]
    assert "No preview of prompt 2: the picture came out" in caplog.text


def test_a_folder_that_cannot_be_written_to_does_not_end_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "sample").write_bytes(b"")
    previews(tmp_path, blank, [Prompt("a")], sample_every_n_steps=1).after_step(1)
    assert "could not be written" in caplog.text


@pytest.mark.parametrize(
    ("flags", "averaged"),
    [([], False), (["--ema_decay=0.9"], True), (["--ema_decay=0.9", "--sample_weights=raw"], False)],
)
def test_dropout_is_off_and_the_average_in_use_while_drawing(tmp_path: Path, flags: list[str], averaged: bool) -> None:
    # defect 2
    config = parse_arguments([*_REQUIRED, f"--train_data_dir={tmp_path}", *flags])
    assert config is not None
    trainer = LuminaNetworkTrainer(config)
    asked: list[bool] = []

    class Recording(Weights):
        def in_use(self, averaged: bool = False) -> AbstractContextManager[None]:
            asked.append(averaged)
            return Weights(self._network, self._optimizer).in_use()

    network = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout(0.5))
    trainer.weights = Recording(network, torch.optim.AdamW(network.parameters()))
    trainer.draw = lambda prompts, seeds: asked.append(network.training) or []  # type: ignore[method-assign,func-returns-value]
    trainer._draw_in_use([Prompt("a")], [1])
    assert asked == [averaged, False]
    assert network.training


def test_an_average_that_is_not_kept_cannot_be_drawn_with(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--sample_weights ema: there is no moving average"):
        parse_arguments([*_REQUIRED, f"--train_data_dir={tmp_path}", "--sample_weights=ema"])


def test_0_or_less_is_never_and_needs_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """That is how previews of --config_file are turned off on the command line."""
    (tmp_path / "p.txt").write_text("a", encoding="utf-8")
    (tmp_path / "run.toml").write_text(
        f"sample_prompts = '{tmp_path / 'p.txt'}'\nsample_every_n_epochs = 1\n", encoding="utf-8"
    )
    required = [*_REQUIRED, f"--train_data_dir={tmp_path}", "--learning_rate=1e-4"]
    for flags in (["steps=0"], ["epochs=0"], ["steps=-1", "epochs=-1"]):
        typed = [f"--sample_every_n_{flag}" for flag in flags]
        config = parse_arguments([*required, *typed, f"--config_file={tmp_path / 'run.toml'}"])
        assert config is not None
        assert (config.samples.sample_every_n_steps, config.samples.sample_every_n_epochs) == (
            None,
            1 if flags == ["steps=0"] else None,
        )
        warn_of_unused(config, all_specs())
    assert not caplog.records
    config = parse_arguments([*required, f"--sample_prompts={tmp_path / 'p.txt'}"])
    assert config is not None
    warn_of_unused(config, all_specs())
    assert "--sample_prompts (nothing says when to draw" in caplog.text
