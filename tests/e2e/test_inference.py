"""Pictures from the command line: bases, LoRAs attached and merged, every source of models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from e2e_helpers import Job, python
from models_helpers import tiny_models
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lumina_minimal_inference
from configs.quickstart.make_models import write_all_in_one, write_folder
from library.errors import DrawingError
from library.prompts import PromptError


@pytest.fixture
def draw(job: Job, tmp_path: Path) -> Callable[..., numpy.ndarray]:
    """Draws one picture in this process and returns its pixels (H,W,3)."""
    count = 0

    def run(*flags: str, models: list[str] | None = None) -> numpy.ndarray:
        nonlocal count
        count += 1
        folder = tmp_path / f"drawn_{count}"
        base = job.inference_flags if models is None else [*models, *job.inference_flags[3:]]
        lumina_minimal_inference.main([*base, f"--output_dir={folder}", *flags])
        (path,) = folder.iterdir()
        assert path.name.endswith("_0.png")
        with Image.open(path) as picture:
            assert picture.mode == "RGB"
            return numpy.asarray(picture).astype(int)

    return run


@pytest.fixture(scope="module")
def lora(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for transformer and Gemma2 that visibly does something."""
    folder = tmp_path_factory.mktemp("lora")
    done = python("lumina_train_network.py", *job.train_flags(folder, "--learning_rate=2e-2"))
    assert done.returncode == 0, done.stderr
    return folder / "my.safetensors"


FLOAT32 = ["--dtype=fp32", "--gemma2_dtype=fp32", "--ae_dtype=fp32"]


def test_multipliers(draw: Callable, lora: Path) -> None:
    base = draw()
    assert base.shape == (96, 64, 3)
    full = draw("--lora_weights", str(lora))
    assert numpy.array_equal(draw("--lora_weights", f"{lora};0.0"), base)
    assert numpy.array_equal(draw("--lora_weights", f"{lora};1.0"), full)
    assert numpy.abs(full - base).mean() > 2  # the LoRA shows
    half = draw("--lora_weights", f"{lora};0.5")
    twice_half = draw("--lora_weights", f"{lora};0.5", f"{lora};0.5")
    assert numpy.abs(half - full).mean() > 0.5
    # The same sum in another order, in bf16: a level of 255 or two here and there.
    assert numpy.abs(twice_half - full).mean() < 3


def test_merged_equals_attached(draw: Callable, lora: Path) -> None:
    attached = draw("--lora_weights", str(lora), *FLOAT32)
    merged = draw("--lora_weights", str(lora), "--merge_lora_weights", *FLOAT32)
    assert numpy.abs(attached - merged).max() <= 1  # float32 rounding can turn a level of 255
    attached = draw("--lora_weights", str(lora))
    merged = draw("--lora_weights", str(lora), "--merge_lora_weights")
    base = draw()
    # bf16 keeps 8 bits of a weight: merging rounds once more. The LoRA's own effect is much larger.
    assert numpy.abs(attached - merged).mean() < 0.25 * numpy.abs(attached - base).mean()


def test_pictures_say_how_they_were_drawn(job: Job, lora: Path, tmp_path: Path) -> None:
    flags = ["--negative_prompt=blue", "--system_prompt=You are", "--lora_weights", f"{lora};0.5"]
    lumina_minimal_inference.main([*job.inference_flags, *flags, f"--output_dir={tmp_path}"])
    (path,) = tmp_path.iterdir()
    with safe_open(lora, "pt") as file:
        content_hash = file.metadata()["sshs_model_hash"]
    with Image.open(path) as picture:
        assert picture.text["parameters"].splitlines() == [
            "a red disc",
            "Negative prompt: blue",
            'Steps: 4, Sampler: Euler, CFG scale: 3.5, Seed: 0, Size: 64x96, Model: quickstart_dit, Lora: "my: 0.5",'
            f' Lora hashes: "my: {content_hash[:12]}",'
            " Shift: 6, CFG truncation: 0.25, CFG renormalization: 1, System prompt: You are",
        ]


def test_all_in_one_file_and_folder_draw_the_same_picture(draw: Callable, tmp_path: Path) -> None:
    write_all_in_one(tiny_models(), tmp_path / "all.safetensors", torch.float32)
    write_folder(tiny_models(), tmp_path / "folder", torch.float32)
    base = draw(*FLOAT32)
    for source in ("all.safetensors", "folder"):
        found = draw(*FLOAT32, models=[f"--pretrained_model_name_or_path={tmp_path / source}"])
        assert numpy.array_equal(found, base)


def test_flags_that_change_the_picture(draw: Callable) -> None:
    base = draw()
    for flag in (
        "--prompt=a blue square",
        "--negative_prompt=red",
        "--guidance_scale=1",
        "--cfg_trunc_ratio=1",
        "--renorm_cfg=0",
        "--discrete_flow_shift=2",
        "--steps=5",
        "--system_prompt=You are",
    ):
        assert not numpy.array_equal(draw(flag), base), flag
    assert numpy.array_equal(draw("--offload"), base)
    assert numpy.array_equal(draw("--blocks_to_swap=2"), base)
    assert numpy.array_equal(draw(), base)


def test_system_prompt_of_the_negative_prompt(draw: Callable) -> None:
    flags = ["--system_prompt=You are", "--negative_prompt=red"]
    assert not numpy.array_equal(draw(*flags), draw(*flags, "--add_system_prompt_to_negative_prompt"))


def test_a_system_prompt_with_its_mark_or_inside_the_prompt_draws_the_same(draw: Callable) -> None:
    expected = draw("--system_prompt=You are")
    assert numpy.array_equal(draw("--system_prompt=You are <Prompt Start> "), expected)
    assert numpy.array_equal(draw("--prompt=You are <Prompt Start> a red disc"), expected)


def pixels(path: Path) -> numpy.ndarray:
    with Image.open(path) as picture:
        return numpy.asarray(picture).astype(int)


def test_a_prompt_file_draws_what_its_prompts_draw_alone(job: Job, lora: Path, tmp_path: Path) -> None:
    file, together, alone = tmp_path / "p.txt", tmp_path / "together", tmp_path / "alone"
    file.write_text(
        "a cat --d 5 --m 0.5\n# no\na dog, long hair --n red --w 80\na cat\na cat --d 8\n", encoding="utf-8"
    )
    # As in a training command: its names of the models and of the prompt file are taken too.
    flags = [*job.model_flags, *job.inference_flags[3:], "--lora_weights", f"{lora};0.8"]
    lumina_minimal_inference.main([*flags, f"--sample_prompts={file}", f"--output_dir={together}", "--num_images=2"])
    names = sorted(path.name for path in together.iterdir())
    assert [name.split("_")[2:] for name in names] == [
        [f"{number:03d}", f"{seed}.png"] for number, seed in enumerate([5, 6, 0, 1, 0, 1, 8, 9])
    ]
    for index, how in [
        (1, ["--prompt=a cat", "--seed=6", "--lora_weights", f"{lora};0.5"]),
        (2, ["--prompt=a dog, long hair", "--negative_prompt=red", "--image_width=80"]),
        (6, ["--prompt=a cat", "--seed=8"]),
    ]:
        lumina_minimal_inference.main([*flags, *how, f"--output_dir={alone / str(index)}"])
        (path,) = (alone / str(index)).iterdir()
        assert path.read_bytes() == (together / names[index]).read_bytes()  # with its text


def test_multipliers_of_a_file_are_checked_before_models_are_read(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "p.txt").write_text("a cat\na cat --m 0.5\n", encoding="utf-8")
    with caplog.at_level("INFO"), pytest.raises(PromptError, match="1 multipliers; the number of LoRAs is 0"):
        lumina_minimal_inference.main([*job.inference_flags, f"--from_file={tmp_path / 'p.txt'}"])
    assert "Reading the models" not in caplog.text


def test_pictures_of_one_size_are_drawn_at_a_time(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from library.lumina import drawing

    sizes: list[int] = []
    draw = drawing.draw_latents

    def noted(model: Any, prompts: Any, *rest: Any) -> torch.Tensor:
        sizes.append(len(prompts))
        return draw(model, prompts, *rest)

    monkeypatch.setattr(drawing, "draw_latents", noted)
    flags = [*job.inference_flags, *FLOAT32, "--images_per_prompt=3"]
    for size in (1, 2):
        lumina_minimal_inference.main([*flags, f"--batch_size={size}", f"--output_dir={tmp_path / str(size)}"])
    assert sizes == [1, 1, 1, 2, 1]
    for one, other in zip(*(sorted((tmp_path / str(size)).iterdir()) for size in (1, 2)), strict=True):
        assert numpy.abs(pixels(one) - pixels(other)).max() <= 1  # float32 rounding can turn a level of 255


@pytest.mark.parametrize("how", [[], ["--offload"], ["--blocks_to_swap=2"]], ids=str)
def test_compared_files_draw_what_each_draws_alone(job: Job, lora: Path, tmp_path: Path, how: list[str]) -> None:
    """With Gemma2's part and without it, beside a LoRA that is always there."""
    folder, together = tmp_path / "loras", tmp_path / "together"
    folder.mkdir()
    whole = load_file(lora)
    save_file(whole, folder / "my-000001.safetensors")
    save_file({key: whole[key] for key in whole if "lora_te" not in key}, folder / "my.safetensors")
    flags = [*job.inference_flags, *how, "--images_per_prompt=2", "--lora_weights", f"{lora};0.3"]
    compared = ["--compare_lora_weights", str(folder), "--compare_multipliers", "0", "0.5", "1"]
    lumina_minimal_inference.main([*flags, f"--output_dir={together}", *compared])
    names = {path.name.split("_", 2)[2]: path for path in together.iterdir()}
    labels = ["my-000001_0.5", "my-000001_1", "my_0.5", "my_1", "without"]
    pictures = {f"{label}_00{seed}_{seed}.png" for label in labels for seed in (0, 1)}
    assert names.keys() == pictures | {"sheet_000.jpg", "sheet_001.jpg"}
    for name, more in [
        ("without", []),
        ("my-000001_0.5", [f"{folder / 'my-000001.safetensors'};0.5"]),
        ("my_1", [f"{folder / 'my.safetensors'};1"]),
    ]:
        alone = tmp_path / name
        lumina_minimal_inference.main([*flags, *more, f"--output_dir={alone}"])
        for seed, path in enumerate(sorted(alone.iterdir())):
            assert path.read_bytes() == names[f"{name}_00{seed}_{seed}.png"].read_bytes()  # with its text
    assert len({names[name].read_bytes() for name in pictures}) == 10


def test_interactive(job: Job, lora: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    lines = "a cat --w 64 --h 80 --s 2 --d 3\n\na dog --m 0.5 --s x\na dog --m 0.5,1\na dog --d 0 --zz 1\nEXIT\nnever\n"
    flags = [*job.inference_flags, f"--output_dir={folder}", "--lora_weights", str(lora), "--interactive"]
    done = python("lumina_minimal_inference.py", *flags, standard_input=lines)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    names = sorted(path.name for path in folder.iterdir())
    assert {name.rsplit("_", 1)[1] for name in names} == {"3.png", "0.png"}
    sizes = set()
    for name in names:
        with Image.open(folder / name) as picture:
            sizes.add(picture.size)
    assert sizes == {(64, 80)}  # the size holds until it is changed
    assert "2 multipliers; the number of LoRAs is 1" in done.stderr
    assert "--s 'x'" in done.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--lora_weights", "nowhere.safetensors;0.5"], "nowhere.safetensors"),
        (["--lora_weights", "a;b"], "no multiplier"),
        (["--lora_weights", "{models}/quickstart_ae.safetensors"], "--lora_weights: "),
        (["--steps=0"], "--steps"),
        (["--seed=99999999999999999999"], "--seed"),
        (["--device=gpu"], "--device: 'gpu'"),
        (["--gemma2=x"], "--gemma2_path: x does not exist"),
        (["--image=64"], "--image is the beginning of several flags; write one of them out: --images_per_prompt"),
        (["--compare_lora_weights", "{models}/quickstart_ae.safetensors"], "--compare_lora_weights: "),
        (["--from_file=nowhere.txt"], "--from_file: nowhere.txt is no file"),
        (["--ae_path=nowhere"], "--ae_path"),
        (["--blocks_to_swap=27"], "--blocks_to_swap: 27 is more than the 2 blocks"),
        (["--blocks_to_swap=-1"], "--blocks_to_swap: -1 is no number"),
    ],
)
def test_wrong_flags(job: Job, flags: list[str], says: str) -> None:
    from library.errors import UserError

    with pytest.raises(UserError) as caught:
        lumina_minimal_inference.main([*job.inference_flags, *(flag.format(models=job.models) for flag in flags)])
    assert says in str(caught.value)


def test_too_little_memory_for_quantised_blocks_is_told(
    draw: Callable[..., numpy.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go to the device while the model is read."""

    def short(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("library.memory.quantised.quantise_block", short)
    with pytest.raises(DrawingError, match="too small for the three models; close other programs"):
        draw("--fp8_base")
