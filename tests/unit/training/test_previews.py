"""When previews are drawn, under which names, and what a short memory does to them."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from library.prompts import Prompt
from library.training.previews import Previews
from library.training.settings import SampleSettings


def previews(
    folder: Path, draw: object, prompts: list[Prompt], rank: int = 0, count: int = 1, **when: object
) -> Previews:
    (folder / "p.txt").write_text("a", encoding="utf-8")
    processes = SimpleNamespace(rank=rank, count=count, gather=lambda mine: [mine], on_cuda=False)
    trackers = SimpleNamespace(log_picture=lambda *_: None)
    settings = SampleSettings(sample_prompts=folder / "p.txt", **when)  # type: ignore[arg-type]
    return Previews(settings, prompts, 1, folder, "my", processes, trackers, draw)  # type: ignore[arg-type]


def blank(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8)) for _ in prompts]


def names(folder: Path) -> list[str]:
    found = sorted((folder / "sample").glob("*")) if (folder / "sample").exists() else []
    return [path.name.split("_2")[0] for path in found]


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
    assert seeds[:3] == seeds[3:]
    assert len(set(seeds)) == 3
    assert seeds[2] == 0


def test_processes_share_the_prompts(tmp_path: Path) -> None:
    for rank in range(2):
        one = previews(tmp_path, blank, [Prompt("a")] * 3, rank, 2, sample_every_n_steps=1)
        one.after_step(1)
        assert len(names(tmp_path)) == (2, 3)[rank]


def test_too_little_memory_for_a_preview_does_not_end_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def draw(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image.Image]:
        if prompts[0].width == 4096:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return blank(prompts, seeds)

    one = previews(tmp_path, draw, [Prompt("a", width=4096), Prompt("b")], sample_every_n_steps=1)
    one.after_step(1)
    assert names(tmp_path) == ["my_000001_01"]
    assert "too little memory for a preview of 4096x1024" in caplog.text
