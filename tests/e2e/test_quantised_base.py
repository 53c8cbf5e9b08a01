"""Quantised base weights from the command line: training, metadata, caches, continued runs, pictures, errors."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from e2e_helpers import Job, log_lines, python
from lora_helpers import metadata_of
from PIL import Image
from quantisation_helpers import needs_cpu_products
from safetensors.torch import load_file
from trainer_helpers import fill_network, fresh_accelerate, made_trainer

import lumina_minimal_inference
from library.errors import SettingsError
from library.memory import fp8
from library.memory.quantised import QuantisedLinear

CACHED = ["--cache_latents", "--cache_text_encoder_outputs"]
BF16 = "--mixed_precision=bf16"
FAST = ["--fp8_base_unet", "--fp8_fast"]


@pytest.fixture(autouse=True)
def own_accelerate_state() -> Iterator[None]:
    fresh_accelerate()
    yield
    fresh_accelerate()


@pytest.fixture
def on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets --fp8_fast run on a CPU, where torch computes fp8 products slowly but rightly."""
    monkeypatch.setattr(fp8, "require_fp8_products", lambda device: None)


def losses(trainer: Any) -> torch.Tensor:
    batch = trainer.data.load(trainer.data.plan_epoch(1, 1).batch(0).draws)
    with torch.no_grad():
        return trainer.losses_of(batch).values


@pytest.mark.usefixtures("on_any_device")
@pytest.mark.parametrize(
    ("flags", "gemma2_too"),
    [
        (["--fp8_base", "--gradient_checkpointing"], True),
        (["--fp8_base", *CACHED], False),
        pytest.param([*FAST, "--gradient_checkpointing", *CACHED], False, marks=needs_cpu_products),
        (["--nf4_base", "--gradient_checkpointing"], True),
    ],
    ids=["fp8 with gemma2 trained", "fp8 with caches", "fp8_fast", "nf4"],
)
def test_a_run_saves_a_lora_like_any_other(
    job: Job, tmp_path: Path, train: Callable, flags: list[str], gemma2_too: bool
) -> None:
    if "--nf4_base" in flags:
        pytest.importorskip("bitsandbytes")
    train(job.train_flags(tmp_path, BF16, "--max_train_epochs=1", *flags))
    file = tmp_path / "my.safetensors"
    tensors, metadata = load_file(file), metadata_of(file)
    ups = {name: tensor for name, tensor in tensors.items() if name.endswith("lora_up.weight")}
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    # A LoRA stands beside every quantised Linear and has learned.
    for name in ("attention_qkv", "attention_out", "feed_forward_w1", "feed_forward_w2", "feed_forward_w3"):
        assert bool(ups[f"lora_unet_layers_1_{name}.lora_up.weight"].any()), name
    assert any(name.startswith("lora_te") for name in ups) == gemma2_too
    for name in ("fp8_base", "fp8_base_unet", "fp8_fast", "nf4_base"):
        assert metadata[f"ss_{name}"] == str(f"--{name}" in flags)


def test_the_whole_program_with_previews(job: Job, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc --w 64 --h 64 --s 2 --d 0\n", encoding="utf-8")
    more = [f"--sample_prompts={prompts}", "--sample_every_n_epochs=1", "--gradient_checkpointing", *CACHED]
    done = python("lumina_train_network.py", *job.train_flags(tmp_path / "out", BF16, "--fp8_base", *more))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "my.safetensors").is_file()
    assert len(list((tmp_path / "out" / "sample").glob("my_e*_00_*.png"))) == 2  # one an epoch


@needs_cpu_products
@pytest.mark.usefixtures("on_any_device")
def test_losses_are_near_those_of_whole_weights(job: Job, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    found = {}
    for name, flags in {"whole": [], "fp8": ["--fp8_base_unet"], "fast": FAST, "nf4": ["--nf4_base"]}.items():
        trainer = made_trainer(job.train_flags(tmp_path, BF16, "--train_batch_size=4", *CACHED, *flags))
        fill_network(trainer.network)
        found[name] = losses(trainer)
        quantised = [module for module in trainer.dit.modules() if isinstance(module, QuantisedLinear)]
        assert len(quantised) == (0 if name == "whole" else 5 * 6)
        assert all(getattr(module, "fast", False) == (name == "fast") for module in quantised)
    for name, bound in (("fp8", 0.02), ("fast", 0.03), ("nf4", 0.1)):
        # A loss changes by about the error of the velocity (2, 3 and 8 %), less where noise dominates the target.
        torch.testing.assert_close(found[name], found["whole"], rtol=bound, atol=0)
        assert not torch.equal(found[name], found["whole"])


def test_cached_text_knows_whether_gemma2_was_quantised(job: Job, tmp_path: Path) -> None:
    """defect 6: no features of another Gemma2."""
    disk = ["--cache_text_encoder_outputs_to_disk", f"--cache_dir={tmp_path / 'cache'}", BF16]
    found = [
        made_trainer(job.train_flags(tmp_path, *disk, *more), last="start").text_fingerprint()
        for more in ([], ["--fp8_base_unet"], ["--fp8_base"])
    ]
    assert found[0] == found[1] != found[2]


def test_embedders_norms_and_time_keep_their_precision(job: Job, tmp_path: Path) -> None:
    """defect 36: there the whole model is cast to fp8, so that time is rounded too."""
    trainer = made_trainer(job.train_flags(tmp_path, "--fp8_base", *CACHED), last="load_models")
    whole = made_trainer(job.train_flags(tmp_path, *CACHED), last="load_models").dit.state_dict()
    others = {name: tensor for name, tensor in trainer.dit.state_dict().items() if tensor.dtype == torch.float32}
    others = {name: tensor for name, tensor in others.items() if not name.endswith("weight_scale")}
    assert {name.rpartition(".")[0] for name in others} >= {"x_embedder", "t_embedder.mlp.0", "final_layer.linear"}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in others.items())


def test_a_run_continued_with_other_base_weights_says_so(
    job: Job, tmp_path: Path, train: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = job.train_flags(tmp_path, BF16, "--network_train_unet_only", "--cache_latents")
    train([*flags, "--max_train_epochs=1", "--save_state_on_train_end"])
    train([*flags, "--resume=latest", "--fp8_base_unet"])
    assert "this has changed: --fp8_base_unet False -> True" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--fp8_base", "--fp8_fast", BF16], "--fp8_fast needs an NVIDIA GPU"),
        (["--fp8_base", "--fp8_fast"], "add --mixed_precision bf16"),
        (["--fp8_base_unet", "--network_module=json"], "--fp8_base_unet: --network_module json"),
        (["--nf4_base", "--network_module=json"], "--nf4_base: --network_module json"),
        (["--mixed_precision=fp16", "--network_module=json"], "--mixed_precision fp16: --network_module json"),
        (["--fp8_base", "--fp8_fast", "--mixed_precision=fp16"], "add --mixed_precision bf16"),
    ],
)
def test_what_cannot_work_ends_before_a_model_is_read(
    job: Job, tmp_path: Path, train: Callable, monkeypatch: pytest.MonkeyPatch, flags: list[str], says: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(SettingsError) as caught:
        train(job.train_flags(tmp_path, *flags))
    assert says in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from library.memory.settings import QuantisationSettings

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="pip install bitsandbytes"):
        QuantisationSettings(nf4_base=True)


@pytest.fixture
def draw(job: Job, tmp_path: Path) -> Callable[..., numpy.ndarray]:
    """Draws one picture in this process and returns its pixels (H,W,3)."""
    count = 0

    def run(*flags: str) -> numpy.ndarray:
        nonlocal count
        count += 1
        folder = tmp_path / f"drawn_{count}"
        lumina_minimal_inference.main([*job.inference_flags, f"--output_dir={folder}", *flags])
        (path,) = folder.iterdir()
        with Image.open(path) as picture:
            return numpy.asarray(picture).astype(int)

    return run


@needs_cpu_products
@pytest.mark.usefixtures("on_any_device")
def test_pictures(draw: Callable, job: Job, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = draw()
    for flags in (["--fp8_base"], ["--fp8_base_unet"], FAST, ["--nf4_base"]):
        found = draw(*flags)
        assert not numpy.array_equal(found, base)
        # A random model's picture of 4 steps; another prompt changes it by far more.
        assert numpy.abs(found - base).mean() < 20
    trainer = made_trainer(job.train_flags(tmp_path), last="build_network")
    fill_network(trainer.network, size=0.3)
    lora = tmp_path / "lora.safetensors"
    trainer.network.save_weights(lora, None, {})
    attached = draw("--fp8_base", "--lora_weights", str(lora))
    merged = draw("--fp8_base", "--lora_weights", str(lora), "--merge_lora_weights")
    plain = draw("--fp8_base")
    assert numpy.abs(attached - plain).mean() > 2  # the LoRA shows
    # Merged before the weights are rounded to fp8: other roundings, but the LoRA's effect.
    assert numpy.abs(merged - attached).mean() < 0.5 * numpy.abs(attached - plain).mean()


def test_drawing_refuses_what_cannot_work(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for flags, says in (
        (["--fp8_base", "--fp8_fast", "--device=cpu"], "--fp8_fast needs an NVIDIA GPU"),
        (["--fp8_base", "--fp8_fast", "--dtype=fp32"], "--dtype is fp32"),
        (["--fp8_base", "--fp8_fast", "--dtype=fp16"], "--dtype is fp16"),
        (["--fp8_base", "--nf4_base"], "leave one of them out"),
    ):
        with pytest.raises(SettingsError, match=says):
            lumina_minimal_inference.main([*job.inference_flags, *flags])


def test_a_wrong_combination_is_one_line_and_exit_code_2(job: Job, tmp_path: Path) -> None:
    done = python("lumina_train_network.py", *job.train_flags(tmp_path, "--fp8_base", "--nf4_base"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(log_lines(done)) <= 1
