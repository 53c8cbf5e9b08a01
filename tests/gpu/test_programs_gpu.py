"""The programs on CUDA: the same LoRA as on the CPU, and pictures from every placement of the models."""

import re
from pathlib import Path

import numpy
import pytest
import torch
from e2e_helpers import Job, distance, log_lines, make_job, python
from PIL import Image

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    pytest.importorskip("diffusers", reason="the programs need it for the autoencoder")
    return make_job(tmp_path_factory.mktemp("job"))


def test_cuda_trains_what_the_cpu_trains(job: Job, tmp_path: Path) -> None:
    more = ["--train_batch_size=2", "--network_dropout=0.1", "--flip_aug"]
    on_cpu = python(
        "lumina_train_network.py",
        *job.train_flags(tmp_path / "cpu", *more),
        environment={"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""},
    )
    on_cuda = python("lumina_train_network.py", *job.train_flags(tmp_path / "cuda", *more))
    assert on_cpu.returncode == on_cuda.returncode == 0, on_cuda.stderr
    assert not any("Device: cpu" in line for line in log_lines(on_cuda))
    # All draws are made on the CPU; the rest is float32 in another order, and Adam's first steps go by signs.
    assert distance(tmp_path / "cpu" / "my.safetensors", tmp_path / "cuda" / "my.safetensors") < 0.1


@pytest.mark.parametrize(
    "more",
    [
        ["--cache_latents", "--cache_text_encoder_outputs"],
        ["--cache_latents_to_disk", "--gradient_checkpointing", "--network_args", "split_qkv=true", "rank_dropout=0.1"],
        ["--network_train_unet_only", "--no_half_vae", "--full_bf16", "--optimizer_type=AdamW8bit"],
        ["--cache_text_encoder_outputs", "--gradient_checkpointing", "--network_module=other_network"],
    ],
    ids=["cached", "gemma2", "uncached", "another's network, under autocast"],
)
def test_bf16_with_previews(job: Job, tmp_path: Path, more: list[str]) -> None:
    if "--optimizer_type=AdamW8bit" in more:
        pytest.importorskip("bitsandbytes")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc --w 64 --h 64 --s 3 --d 0\n", encoding="utf-8")
    flags = ["--mixed_precision=bf16", f"--cache_dir={tmp_path / 'cache'}", f"--sample_prompts={prompts}"]
    done = python(
        "lumina_train_network.py",
        *job.train_flags(tmp_path / "out", *flags, "--sample_every_n_epochs=1", "--sample_at_first", *more),
        environment={"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    for kind in ("_00_*.png", "_sheet_*.jpg"):  # the picture and the sheet of each moment
        assert len(list((tmp_path / "out" / "sample").glob(f"my_e*{kind}"))) == 3
    assert (tmp_path / "out" / "my.safetensors").is_file()
    assert any(re.search(r"Peak GPU memory: .* GiB in tensors, while \w+", line) for line in log_lines(done))


@pytest.mark.parametrize("how", [[], ["--offload"], ["--blocks_to_swap=2"], ["--fp8_base", "--offload"]], ids=str)
def test_compared_files_draw_what_they_draw_alone(job: Job, tmp_path: Path, how: list[str]) -> None:
    """Files are attached to models that are placed, quantised and streamed already."""
    done = python("lumina_train_network.py", *job.train_flags(tmp_path, "--learning_rate=2e-2"))
    assert done.returncode == 0, done.stderr
    lora, together = tmp_path / "my.safetensors", tmp_path / "together"
    compared = ["--compare_lora_weights", str(lora), "--compare_multipliers", "0", "1"]
    flags = [*job.inference_flags, *how]
    done = python("lumina_minimal_inference.py", *flags, f"--output_dir={together}", *compared)
    assert done.returncode == 0, done.stderr
    for name, more in (("without", []), ("my_1", ["--lora_weights", str(lora)])):
        done = python("lumina_minimal_inference.py", *flags, f"--output_dir={tmp_path / name}", *more)
        assert done.returncode == 0, done.stderr
        (alone,) = (tmp_path / name).iterdir()
        (found,) = together.glob(f"compare_*_{name}_0.png")
        assert numpy.array_equal(numpy.asarray(Image.open(alone)), numpy.asarray(Image.open(found)))
    assert len(list(together.glob("compare_*_sheet_000.jpg"))) == 1


def test_inference_with_and_without_offload(job: Job, tmp_path: Path) -> None:
    # defect 39
    pictures = []
    for name, more in (("on", []), ("off", ["--offload"])):
        done = python("lumina_minimal_inference.py", *job.inference_flags, f"--output_dir={tmp_path / name}", *more)
        assert done.returncode == 0, done.stderr
        (path,) = (tmp_path / name).iterdir()
        pictures.append(numpy.asarray(Image.open(path)).astype(int))
    assert numpy.array_equal(*pictures)
