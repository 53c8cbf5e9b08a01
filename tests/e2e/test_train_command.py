"""The documented command line, as a user types it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from e2e_helpers import NUM_PICTURES, Job, difference, distance, launch, log_lines, python
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

DOCUMENTED = [
    "--output_name=my_lumina_lora",
    "--save_model_as=safetensors",
    "--network_module=networks.lora_lumina",
    "--network_dim=8",
    "--network_alpha=8",
    "--learning_rate=1e-4",
    "--optimizer_type=AdamW",
    "--lr_scheduler=constant",
    "--timestep_sampling=nextdit_shift",
    "--discrete_flow_shift=6.0",
    "--model_prediction_type=raw",
    "--system_prompt=You are an assistant designed to generate high-quality images based on user prompts.",
    "--max_train_epochs=3",
    "--save_every_n_epochs=1",
    "--mixed_precision=bf16",
    "--gradient_checkpointing",
    "--cache_latents",
    "--cache_text_encoder_outputs",
]


@pytest.fixture
def dataset(job: Job, tmp_path: Path) -> Path:
    path = tmp_path / "dataset.toml"
    path.write_text(
        f"""
[general]
caption_extension = ".txt"
enable_bucket = true
bucket_reso_steps = 16
[[datasets]]
resolution = 96
batch_size = 2
min_bucket_reso = 32
max_bucket_reso = 256
[[datasets.subsets]]
image_dir = '{job.pictures}'
num_repeats = 2
""",
        encoding="utf-8",
    )
    return path


def test_the_documented_command_through_accelerate(job: Job, dataset: Path, output: Path) -> None:
    done = launch(
        "--num_cpu_threads_per_process",
        "1",
        "lumina_train_network.py",
        *job.model_flags,
        f"--dataset_config={dataset}",
        f"--output_dir={output}",
        *DOCUMENTED,
    )
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in output.iterdir())
    assert set(names) == {f"my_lumina_lora{end}.safetensors" for end in ("", "-000001", "-000002")}
    lines = log_lines(done)
    assert sum("Gemma2 is not trained" in line for line in lines) == 1
    assert sum("--discrete_flow_shift 6 is the previews' shift" in line for line in lines) == 1
    assert not [line for line in lines if line.startswith(("WARNING", "ERROR"))]
    # Everything that is neither our log nor a progress bar would be another package's noise.
    known = ("steps:", "Caching", "Looking at", "drawing:")
    stray = [
        line
        for line in done.stderr.replace("\r", "\n").splitlines()
        if line.strip() and line[2:3] != ":" and not line.lstrip("\x1b[A ").startswith(known)
    ]
    # accelerate says once that its own launcher flags were left out.
    stray = [line for line in stray if "accelerate" not in line and not line.startswith("\t`--")]
    assert stray == []


def test_what_the_file_holds(job: Job, output: Path, train: Callable) -> None:
    train(job.train_flags(output, "--cache_latents", "--cache_text_encoder_outputs", "--training_comment=hello"))
    with safe_open(output / "my.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert metadata["ss_base_model_version"] == "lumina2"
    assert metadata["ss_training_comment"] == "hello"
    assert metadata["ss_num_train_images"] == str(NUM_PICTURES)
    assert metadata["ss_epoch"] == "2"
    assert metadata["modelspec.architecture"] == "lumina-2/lora"
    assert metadata["modelspec.resolution"] == "96x96"
    assert len(metadata["sshs_model_hash"]) == 64
    assert len(metadata["ss_new_sd_model_hash"]) == 64
    assert sum(json.loads(metadata["ss_tag_frequency"])["pictures"].values()) > NUM_PICTURES
    assert all(name.startswith("lora_unet_") for name in tensors)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    ups = [tensor for name, tensor in tensors.items() if name.endswith("lora_up.weight")]
    assert all(tensor.abs().max() > 0 for tensor in ups)  # every module was trained


def test_plain_python_trains_gemma2_too(job: Job, output: Path) -> None:
    done = python(
        "lumina_train_network.py",
        *job.train_flags(output, "--max_train_epochs=1", "--gradient_checkpointing", "--save_precision=bf16"),
    )
    assert done.returncode == 0, done.stderr
    tensors = load_file(output / "my.safetensors")
    from_gemma = [name for name in tensors if name.startswith("lora_te_") and name.endswith("lora_up.weight")]
    assert len(from_gemma) == 3 * 7  # three of the tiny Gemma2's four layers
    # The last layer in use feeds the features directly, so all of them get gradients.
    assert all(tensors[name].abs().max() > 0 for name in from_gemma)
    assert all(tensor.dtype == torch.bfloat16 for name, tensor in tensors.items() if "lora_" in name.split(".")[-2])


def test_only_the_text_encoder_or_only_the_transformer(job: Job, tmp_path: Path, train: Callable) -> None:
    train(job.train_flags(tmp_path / "te", "--network_train_text_encoder_only", "--max_train_epochs=1"))
    assert all(name.startswith("lora_te_") for name in load_file(tmp_path / "te" / "my.safetensors"))
    train(job.train_flags(tmp_path / "dit", "--network_train_unet_only", "--max_train_epochs=1"))
    assert all(name.startswith("lora_unet_") for name in load_file(tmp_path / "dit" / "my.safetensors"))


def test_same_seed_same_lora_and_caching_changes_nothing_but_rounding(
    job: Job, tmp_path: Path, train: Callable
) -> None:
    more = ["--network_train_unet_only", "--train_batch_size=2", "--network_dropout=0.1", "--flip_aug"]
    for name, extra in (
        ("a", []),
        ("b", []),
        ("cached", ["--cache_latents", "--cache_text_encoder_outputs"]),
        ("recomputed", ["--gradient_checkpointing"]),
        ("other_seed", ["--seed=8"]),
    ):
        train(job.train_flags(tmp_path / name, *more, *extra))
    files = {path.name: path / "my.safetensors" for path in tmp_path.iterdir()}
    assert difference(files["a"], files["b"]) == 0
    assert difference(files["a"], files["recomputed"]) == 0
    # Cached latents and features are rounded to bfloat16 (2^-9 of their size). Adam's first steps go by the gradient's
    # sign, so rounding turns the few whose gradient is about zero: measured 0.01, another seed's LoRA is 1.5 away.
    assert 0 < distance(files["a"], files["cached"]) < 0.05
    assert distance(files["a"], files["other_seed"]) > 0.5


def test_previews_and_tensorboard(job: Job, output: Path, tmp_path: Path, train: Callable) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc --w 64 --h 96 --s 3 --d 0\na blue disc --n red --w 64 --h 64 --s 2\n", "utf-8")
    flags = [f"--sample_prompts={prompts}", "--sample_every_n_epochs=1", "--sample_at_first", "--max_train_epochs=2"]
    train(job.train_flags(output, *flags, f"--logging_dir={tmp_path / 'logs'}", "--network_dropout=0.5"))
    pictures = sorted(path.name for path in (output / "sample").glob("*.png"))
    stems = [name.split("_2")[0] for name in pictures]  # up to the date
    assert stems == [f"my_e{epoch:06d}_{index:02d}" for epoch in range(3) for index in range(2)]
    assert all(name.endswith("_0.png") == ("_00_2" in name) for name in pictures)
    with Image.open(output / "sample" / pictures[0]) as picture:
        assert picture.size == (64, 96)
        first = picture.tobytes()
    with Image.open(output / "sample" / pictures[4]) as picture:
        assert picture.tobytes() != first  # the LoRA shows

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (tmp_path / "logs").rglob("events.*")
    log = EventAccumulator(str(events.parent))
    log.Reload()
    assert {"loss/current", "loss/average", "loss/epoch_average", "lr/unet", "lr/textencoder"} <= set(
        log.Tags()["scalars"]
    )
    assert len(log.Scalars("loss/current")) == 2 * NUM_PICTURES
    assert {name.split("/")[0] for name in log.Tags()["images"]} == {"sample_0", "sample_1", "sample_sheet"}
    sheets = sorted(path.name.split("_2")[0] for path in (output / "sample").glob("*.jpg"))
    assert sheets == [f"my_e{epoch:06d}_sheet" for epoch in range(3)]


def test_previews_do_not_change_the_training(job: Job, tmp_path: Path, train: Callable) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc --w 64 --h 64 --s 2\n", "utf-8")
    train(job.train_flags(tmp_path / "a", "--network_dropout=0.2"))
    train(
        job.train_flags(
            tmp_path / "b", "--network_dropout=0.2", f"--sample_prompts={prompts}", "--sample_every_n_steps=2"
        )
    )
    assert difference(tmp_path / "a" / "my.safetensors", tmp_path / "b" / "my.safetensors") == 0


def test_filled_caches_need_neither_gemma2_nor_the_autoencoder(job: Job, tmp_path: Path) -> None:
    flags = ["--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", f"--cache_dir={tmp_path / 'cache'}"]
    program = (
        "import sys; sys.path.insert(0, '.'); import lumina_train_network; lumina_train_network.main(sys.argv[1:]);"
        "print('LOADED', [name for name in ('transformers', 'diffusers') if name in sys.modules])"
    )
    import sys

    from e2e_helpers import run

    outputs = []
    for name in ("cold", "warm"):
        done = run(sys.executable, "-c", program, *job.train_flags(tmp_path / name, *flags))
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert "LOADED ['transformers', 'diffusers']" in outputs[0]
    assert "LOADED []" in outputs[1]
    assert difference(tmp_path / "cold" / "my.safetensors", tmp_path / "warm" / "my.safetensors") == 0


def test_training_goes_on_from_a_lora_file(job: Job, tmp_path: Path, train: Callable) -> None:
    base = ["--network_train_unet_only", "--max_train_epochs=1"]
    train(job.train_flags(tmp_path / "a", *base, "--network_alpha=2", "--network_args", "attn_dim=3", "split_qkv=true"))
    start = tmp_path / "a" / "my.safetensors"
    assert load_file(start)["lora_unet_layers_0_attention_qkv.lora_down.weight"].shape[0] == 9
    # A learning rate that moves nothing visible: what comes out is what went in.
    more = [f"--network_weights={start}", "--learning_rate=1e-12"]
    train(job.train_flags(tmp_path / "b", *base, *more, "--dim_from_weights"))
    assert difference(start, tmp_path / "b" / "my.safetensors") < 1e-6
    train(job.train_flags(tmp_path / "c", *base, *more, "--dim_from_weights", "--network_args", "split_qkv=true"))
    assert difference(start, tmp_path / "c" / "my.safetensors") < 1e-6


def test_max_train_steps_and_accumulation(job: Job, output: Path, train: Callable) -> None:
    flags = ["--gradient_accumulation_steps=2", "--save_every_n_steps=2", "--cache_latents"]
    given = [flag for flag in job.train_flags(output, *flags) if not flag.startswith("--max_train_epochs")]
    train([*given, "--max_train_steps=5", "--network_train_unet_only"])
    names = {path.name for path in output.iterdir()}
    assert names == {"my.safetensors", "my-step00000002.safetensors", "my-step00000004.safetensors"}
    with safe_open(output / "my.safetensors", "pt") as file:
        metadata = file.metadata()
    # Five pictures a step each, two a step: three steps an epoch, so five steps end in the second epoch.
    assert (metadata["ss_steps"], metadata["ss_num_epochs"]) == ("5", "2")
