"""What users get wrong ends at once: one clear message, exit code 2, before any model is loaded."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from e2e_helpers import Job, make_pictures, python
from safetensors.torch import save_file

from library.errors import UserError
from library.lumina import loading


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded before the error was found")

    for name in ("load_next_dit", "load_gemma2", "load_autoencoder"):
        monkeypatch.setattr(loading, name, refuse)


def replaced(flags: list[str], **values: object) -> list[str]:
    """Returns the flags with some values changed; None removes a flag."""
    result = [flag for flag in flags if flag.lstrip("-").split("=")[0] not in values]
    return [*result, *(f"--{name}={value}" for name, value in values.items() if value is not None)]


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"pretrained_model_name_or_path": "nowhere.safetensors"}, ["--pretrained_model_name_or_path", "nowhere"]),
        ({"pretrained_model_name_or_path": "{models}/quickstart_ae.safetensors"}, ["not a Lumina", "autoencoder"]),
        ({"pretrained_model_name_or_path": "{models}/quickstart_gemma2.safetensors"}, ["not a Lumina", "Gemma"]),
        ({"gemma2": "{models}/quickstart_dit.safetensors"}, ["--gemma2", "not Gemma"]),
        ({"gemma2": None}, ["--gemma2 is missing"]),
        ({"ae": None}, ["--ae is missing"]),
        ({"blocks_to_swap": "3"}, ["--blocks_to_swap: 3 is more than the 2 blocks"]),
        ({"ae": "{folder}/broken.safetensors"}, ["--ae", "broken.safetensors"]),
        ({"ae": "{folder}/truncated.safetensors"}, ["--ae", "truncated.safetensors", "download"]),
        ({"pretrained_model_name_or_path": "{folder}/sdxl.safetensors"}, ["SDXL"]),
        ({"pretrained_model_name_or_path": "{folder}/model.ckpt"}, ["model.ckpt", "safetensors"]),
        ({"train_data_dir": "{folder}/empty"}, ["empty", "no picture"]),
        ({"train_data_dir": "{folder}/nowhere"}, ["--train_data_dir", "nowhere"]),
        ({"train_data_dir": None, "dataset_config": "{folder}/typo.toml"}, ["typo.toml", "did you mean 'image_dir'"]),
        ({"train_data_dir": None, "dataset_config": "{folder}/no_such.toml"}, ["no_such.toml"]),
        ({"resolution": None}, ["resolution"]),
        ({"resolution": "95", "enable_bucket": "false"}, ["multiples of 16"]),
        ({"bucket_reso_steps": "10"}, ["--bucket_reso_steps", "16"]),
        ({"network_args": "atn_dim=4"}, ["atn_dim", "attn_dim"]),
        ({"network_args": "attn_dim=four"}, ["attn_dim", "four"]),
        ({"network_module": "networks.no_such"}, ["--network_module", "networks.no_such"]),
        ({"optimizer_type": "AdamQ"}, ["AdamQ"]),
        ({"optimizer_type": "torch.optim.AdamQ"}, ["torch.optim", "AdamQ"]),
        ({"optimizer_type": "missing_package.Adam"}, ["missing_package"]),
        ({"optimizer_args": "nonsense=1"}, ["--optimizer_args", "nonsense"]),
        ({"lr_scheduler_args": "nonsense=1", "lr_scheduler": "cosine"}, ["--lr_scheduler", "nonsense"]),
        ({"lr_scheduler": "cosinus"}, ["cosinus", "cosine"]),
        ({"lr_scheduler_type": "NoSuchLR"}, ["NoSuchLR"]),
        ({"output_dir": None}, ["--output_dir"]),  # defect 14
        ({"output_dir": "{folder}/broken.safetensors"}, ["--output_dir", "is a file"]),
        ({"network_weights": "{folder}/nowhere.safetensors"}, ["--network_weights", "nowhere"]),
        ({"network_weights": "{models}/quickstart_ae.safetensors"}, ["--network_weights", "no LoRA keys"]),
        ({"network_args": "train_blocks=nowhere"}, ["train_blocks", "nowhere"]),
        ({"network_module": ".networks"}, ["--network_module", ".networks"]),
        ({"network_module": "os"}, ["--network_module", "no create_network"]),
        ({"learning_rate": "inf"}, ["--learning_rate", "a number"]),
        ({"output_dir": "{folder}/broken.safetensors/x"}, ["--output_dir"]),
        ({"output_name": "n" * 250}, ["--output_name", "too long"]),
        ({"lr_scheduler_type": "missing_package.Cosine"}, ["--lr_scheduler_type", "missing_package"]),
        ({"optimizer_type": "schedulefree.AdamWScheduleFree", "ema_decay": "0.9"}, ["--ema_decay", "averages"]),
        ({"metadata_thumbnail": "nowhere.png"}, ["--metadata_thumbnail", "nowhere.png"]),
        ({"sample_prompts": "{folder}/bad_prompts.txt"}, ["bad_prompts.txt, line 2", "--w"]),
        ({"gemma2_max_token_length": "-3"}, ["--gemma2_max_token_length"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_it_ends_before_a_model_is_loaded(
    job: Job, tmp_path: Path, train: Callable, values: dict[str, str], says: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.safetensors").write_bytes(b"<html>not found</html>")
    whole = (job.models / "quickstart_ae.safetensors").read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file(
        {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
         "conditioner.embedders.1.model.ln_final.weight": torch.zeros(1280)},
        tmp_path / "sdxl.safetensors",
    )  # fmt: skip
    torch.save({}, tmp_path / "model.ckpt")
    (tmp_path / "typo.toml").write_text(
        "[[datasets]]\nresolution = 96\n[[datasets.subsets]]\nimage_dirr = 'x'\n", "utf-8"
    )
    (tmp_path / "bad_prompts.txt").write_text("a cat\na dog --w wide\n", "utf-8")
    filled = {
        name: None if value is None else value.format(models=job.models, folder=tmp_path)
        for name, value in values.items()
    }
    with pytest.raises(UserError) as caught:
        train(replaced(job.train_flags(tmp_path / "out"), **filled))
    for part in says:
        assert part in str(caught.value), str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_users_error_is_one_message_and_exit_code_2(job: Job, tmp_path: Path) -> None:
    done = python("lumina_train_network.py", *replaced(job.train_flags(tmp_path / "out"), train_data_dir="nowhere"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.count("ERROR") == 1
    assert "nowhere" in done.stderr


def test_unreadable_pictures_and_missing_captions_are_named_once(
    job: Job, tmp_path: Path, train: Callable, capfd: pytest.CaptureFixture
) -> None:
    pictures = tmp_path / "pictures"
    make_pictures(pictures)
    (pictures / "p0.txt").unlink()
    (pictures / "broken.png").write_bytes(b"no picture")
    whole = (pictures / "p1.png").read_bytes()
    (pictures / "cut_off.png").write_bytes(whole[: len(whole) // 2])
    for name in ("broken", "cut_off"):
        (pictures / f"{name}.txt").write_text("a caption", encoding="utf-8")
    flags = replaced(job.train_flags(tmp_path / "out", "--cache_latents"), train_data_dir=pictures, max_train_epochs=1)
    train([*flags, "--network_train_unet_only"])
    log = capfd.readouterr().err
    assert log.count("broken.png") == 1
    assert log.count("cut_off.png") == 1
    assert log.count("p0.png") == 1
    assert (tmp_path / "out" / "my.safetensors").is_file()
    for path in pictures.glob("*.png"):
        if path.name not in ("broken.png", "cut_off.png"):
            path.unlink()
    with pytest.raises(UserError, match="No picture"):
        train(flags)


def test_captions_longer_than_300_tokens_train(job: Job, tmp_path: Path, train: Callable) -> None:
    pictures = tmp_path / "pictures"
    make_pictures(pictures)
    (pictures / "p0.txt").write_text("a red disc on a green background " * 80, "utf-8")
    flags = replaced(job.train_flags(tmp_path / "out"), train_data_dir=pictures, gemma2_max_token_length=400)
    train([*flags, "--max_train_epochs=1", "--cache_text_encoder_outputs", "--train_batch_size=2"])
    assert (tmp_path / "out" / "my.safetensors").is_file()


def test_a_lora_of_another_model_is_refused(job: Job, tmp_path: Path, train: Callable) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"lora_unet_down_blocks_0_attentions_0.lora_down.weight": torch.zeros(4, 8)}, other)
    with pytest.raises(UserError, match=r"--network_weights: .*other\.safetensors"):
        train(job.train_flags(tmp_path / "out", f"--network_weights={other}"))


def test_loss_that_is_no_number_ends_the_run(job: Job, tmp_path: Path, train: Callable) -> None:
    with pytest.raises(UserError, match="--learning_rate usually helps"):
        train(
            job.train_flags(tmp_path / "out", "--learning_rate=1e30", "--max_grad_norm=0", "--network_train_unet_only")
        )


def test_what_was_trained_is_saved_when_a_run_ends_in_an_error(
    job: Job, tmp_path: Path, train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    from library.training.saving import Saver

    def fail(self: Saver, step: int, epoch: int) -> None:
        if step == 3:
            raise RuntimeError("a defect")

    monkeypatch.setattr(Saver, "after_step", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        train(job.train_flags(tmp_path / "out", "--network_train_unet_only"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["my-step00000003.safetensors"]


def test_a_lora_that_is_spoilt_is_not_saved(
    job: Job, tmp_path: Path, train: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(optimizer: torch.optim.AdamW, *_: object) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    flags = replaced(job.train_flags(tmp_path / "out", "--network_train_unet_only"), max_train_epochs=None)
    with pytest.raises(UserError, match="not finite, so it is not saved"):
        train([*flags, "--max_train_steps=1"])
    assert list((tmp_path / "out").iterdir()) == []


def test_a_system_prompt_that_leaves_no_room(job: Job, tmp_path: Path, train: Callable) -> None:
    with pytest.raises(UserError, match="--system_prompt fills the 4 tokens"):
        train(job.train_flags(tmp_path / "out", "--gemma2_max_token_length=4", "--system_prompt=a b c d e f g"))


def test_many_captions_are_announced(job: Job, tmp_path: Path, train: Callable, capfd: pytest.CaptureFixture) -> None:
    train(job.train_flags(tmp_path / "out", "--cache_text_encoder_outputs", "--shuffle_caption"))
    log = capfd.readouterr().err
    assert "different ones for 5 pictures in 2 epochs; each is encoded once and kept, about" in log
    assert "--caption_variants 1 it would be" in log


def test_dim_from_weights_is_recorded_as_it_is(job: Job, tmp_path: Path, train: Callable) -> None:
    from safetensors import safe_open

    train(job.train_flags(tmp_path / "a", "--network_train_unet_only", "--network_dim=6", "--network_alpha=3"))
    start = f"--network_weights={tmp_path / 'a' / 'my.safetensors'}"
    flags = [flag for flag in job.train_flags(tmp_path / "b") if not flag.startswith("--network_dim")]
    train([*flags, start, "--dim_from_weights", "--network_train_unet_only"])
    with safe_open(tmp_path / "b" / "my.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("6", "3.0")
    with pytest.raises(UserError, match="no LoRA for the text encoder"):
        train([*flags, start, "--dim_from_weights"])


def test_pictures_folder_that_cannot_be_written(job: Job, tmp_path: Path) -> None:
    """The cache folder's name is taken by a file: works on every system and for every user."""
    pictures = tmp_path / "pictures"
    shutil.copytree(job.pictures, pictures, ignore=shutil.ignore_patterns("lumina_cache"))
    (pictures / "lumina_cache").write_text("in the way", "utf-8")
    flags = replaced(job.train_flags(tmp_path / "out", "--cache_latents_to_disk"), train_data_dir=pictures)
    done = python("lumina_train_network.py", *flags)
    assert done.returncode == 2, done.stderr
    assert "--cache_dir" in done.stderr
