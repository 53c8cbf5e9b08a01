"""What is drawn for a comparison, in which order, and what the texts of models and files are."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from library.errors import DrawingError, SettingsError
from library.inference.comparison import compare, labels_of
from library.inference.settings import CompareFlags
from library.prompts import Prompt

PROMPTS = [Prompt("a", width=64, height=64, seed=1), Prompt("b", width=64, height=64, seed=2)]


class Painting:
    """Stands in for painter and LoRA files, and notes what is asked of them."""

    def __init__(self, folder: Path, reaching_text: Sequence[str]) -> None:
        self._folder, self._reaching_text = folder, reaching_text
        self.network: Any = None
        self.seen: list[str] = []

    @contextlib.contextmanager
    def beside(self, path: Path) -> Iterator[Any]:
        assert self.network is None
        self.network = SimpleNamespace(text_encoder_loras=["one"] if path.stem in self._reaching_text else [])
        self.network.set_multiplier = lambda value: self.seen.append(f"{path.stem} x {value:g}")
        yield self.network
        self.network = None

    def encode(self, prompts: Sequence[Prompt]) -> str:
        self.seen.append("encoded")
        return "with LoRA" if self.network else "plain"

    def draw(self, prompts: Sequence[Prompt], features: str, name: str) -> list[Path]:
        self.seen.append(f"drawn, {features}")
        if "broken" in name:
            raise DrawingError("not finite")
        paths = []
        for prompt in prompts:
            paths.append(self._folder / f"{name}_{prompt.seed}.png")
            Image.new("RGB", (64, 64), (255, 0, 0)).save(paths[-1])
        return paths


def test_one_file_at_a_time_and_texts_once(tmp_path: Path) -> None:
    files = tuple(tmp_path / f"{name}.safetensors" for name in ("a", "b"))
    for file in files:
        file.touch()
    painting: Any = Painting(tmp_path, ["b"])
    flags = CompareFlags(compare_lora_weights=files, compare_multipliers=(0.0, 0.5, 1.0, 0.5))
    sheets = compare(painting, PROMPTS, flags, tmp_path)
    assert painting.seen == [
        "encoded",
        "drawn, plain",
        "a x 0.5",
        "drawn, plain",
        "a x 1",
        "drawn, plain",
        "b x 0.5",
        "encoded",
        "drawn, with LoRA",
        "b x 1",
        "encoded",
        "drawn, with LoRA",
    ]
    names = sorted(path.name.split("_", 2)[2] for path in tmp_path.glob("compare_*.png"))
    assert names == sorted(
        f"{name}_{seed}.png" for name in ("a_0.5", "a_1", "b_0.5", "b_1", "without") for seed in (1, 2)
    )
    assert [path.name.split("_", 2)[2] for path in sheets] == ["sheet_000.jpg", "sheet_001.jpg"]
    with Image.open(sheets[0]) as sheet:
        assert sheet.width == 2 * (384 + 16) + 16  # pictures of 64 px are shown six times as large
        assert sheet.height > 3 * 384


def test_without_a_multiplier_of_zero_nothing_is_drawn_without(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    painting: Any = Painting(tmp_path, [])
    compare(painting, PROMPTS, CompareFlags(compare_lora_weights=(tmp_path / "a.safetensors",)), tmp_path)
    assert painting.seen == ["encoded", "a x 1", "drawn, plain"]


def test_a_file_that_draws_nothing_leaves_its_place_empty(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = tuple(tmp_path / f"{name}.safetensors" for name in ("broken", "good"))
    for file in files:
        file.touch()
    painting: Any = Painting(tmp_path, [])
    sheet, _ = compare(painting, PROMPTS, CompareFlags(compare_lora_weights=files), tmp_path)
    assert "broken with multiplier 1 is left out: not finite" in caplog.text
    with Image.open(sheet) as picture:
        colours = [picture.getpixel((left, 150)) for left in (200, 600)]
    assert colours[0] == pytest.approx((215, 215, 215), abs=3)  # JPEG
    assert colours[1] == pytest.approx((255, 0, 0), abs=3)
    with pytest.raises(DrawingError, match="not finite"):
        compare(painting, PROMPTS, CompareFlags(compare_lora_weights=files[:1]), tmp_path)


def test_files_of_a_folder_and_of_a_pattern(tmp_path: Path) -> None:
    for name in ("my.safetensors", "my-000002.safetensors", "my-000001.safetensors", "other.safetensors", "my.txt"):
        (tmp_path / name).touch()
    (tmp_path / ".my-ab12cd34.partial.safetensors").touch()  # of a run that is saving
    (tmp_path / "my-folder.safetensors").mkdir()
    run = ["my-000001", "my-000002", "my"]
    assert [file.stem for file in CompareFlags(compare_lora_weights=(tmp_path,)).files] == [*run, "other"]
    assert [file.stem for file in CompareFlags(compare_lora_weights=(tmp_path / "my*.safetensors",)).files] == run
    both = CompareFlags(compare_lora_weights=(tmp_path / "other.safetensors", tmp_path))
    assert [file.stem for file in both.files] == ["other", *run]


@pytest.mark.parametrize("name", ["nowhere", "my.safetensors;0.5", "*.ckpt", "empty"])
def test_no_files_are_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "my.safetensors").touch()
    with pytest.raises(SettingsError, match=r"--compare_lora_weights: .* is neither a file nor a folder"):
        CompareFlags(compare_lora_weights=(tmp_path / name,))


def test_multipliers_without_files_and_none(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--compare_multipliers has no effect without --compare_lora_weights"):
        CompareFlags(compare_multipliers=(0.5,))
    (tmp_path / "my.safetensors").touch()
    with pytest.raises(SettingsError, match="--compare_multipliers: there is no number"):
        CompareFlags(compare_lora_weights=(tmp_path / "my.safetensors",), compare_multipliers=())


def test_files_of_one_name_are_told_apart() -> None:
    names = ["a/my.safetensors", "b/my.safetensors", "b/other.safetensors", "x/b/my.safetensors"]
    assert list(labels_of([Path(name) for name in names]).values()) == ["a/my", "b/my (1)", "other", "b/my (2)"]
    assert list(labels_of([Path("a\udcff.safetensors")]).values()) == ["a?"]


def test_names_of_pictures_are_allowed_everywhere(tmp_path: Path) -> None:
    file = tmp_path / 'a <b> "c"?.safetensors'
    file.touch()
    painting: Any = Painting(tmp_path, [])
    compare(painting, PROMPTS, CompareFlags(compare_lora_weights=(file,)), tmp_path)
    names = [path.name.split("_", 2)[2] for path in tmp_path.glob("compare_*.png")]
    assert sorted(names) == ["a _b_ _c___1_1.png", "a _b_ _c___1_2.png"]
