"""Contradicting flags end the run before anything is loaded, and flags without effect are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.errors import SettingsError
from library.training.arguments import TrainConfig, all_specs, parse_arguments
from library.training.run_checks import CONTRADICTIONS
from library.training.unused_flags import CONDITIONS, warn_of_unused

ENOUGH = {
    "pretrained_model_name_or_path": "model.safetensors",
    "train_data_dir": "pictures",
    "resolution": "256",
    "output_dir": "out",
    "network_module": "networks.lora_lumina",
}


def parse(*more: str, **replaced: str | None) -> TrainConfig:
    flags = [f"--{name}={value}" for name, value in {**ENOUGH, **replaced}.items() if value is not None]
    config = parse_arguments([*flags, *more])
    assert config is not None
    return config


CONTRADICTING = [
    (["--masked_loss"], "no masks"),
    (["--resume_from_huggingface"], "--resume is missing"),
    (["--resume_from_huggingface", "--resume=latest"], "--output_dir"),
    (["--save_state_to_huggingface", "--save_state"], "--huggingface_repo_id"),
    (["--save_state_to_huggingface", "--huggingface_repo_id=me/it"], "--save_state"),
    (["--initial_epoch=5", "--max_train_epochs=4"], "nothing is left to train"),
    (["--initial_step=1600"], "nothing is left to train"),
    (["--validation_split=1"], "nothing is left to train on"),
    (["--use_sage_attn"], "SageAttention has no gradients"),  # defect 35
    (["--attn_mode=sage"], "SageAttention has no gradients"),
    (["--fp8_fast", "--fp8_base"], "--mixed_precision bf16"),
]


@pytest.mark.parametrize(("argv", "says"), CONTRADICTING, ids=str)
def test_contradictions_end_before_anything_is_read(argv: list[str], says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse(*argv)
    assert says in str(caught.value)
    assert argv[0].split("=")[0] in str(caught.value)


def test_every_contradiction_is_tried() -> None:
    found = set()
    for argv, _ in CONTRADICTING:
        with pytest.raises(SettingsError) as caught:
            parse(*argv)
        found |= {line.partition(";")[2] for line in str(caught.value).splitlines()}
    assert found == {message.partition(";")[2] for _, message in CONTRADICTIONS}  # the remedies hold no values


@pytest.mark.parametrize(
    "argv",
    [
        ["--masked_loss", "--alpha_mask"],
        ["--masked_loss", "--conditioning_data_dir=masks"],
        ["--initial_epoch=4", "--max_train_epochs=4"],
        ["--initial_step=1600", "--max_train_epochs=4"],
        ["--initial_epoch=9", "--initial_step=5", "--max_train_epochs=4"],
        ["--resume_from_huggingface", "--resume=me/it/state"],
        ["--save_state_to_huggingface", "--huggingface_repo_id=me/it", "--save_state_on_train_end"],
        ["--sample_every_n_steps=0", "--sample_every_n_epochs=-1"],
    ],
    ids=" ".join,
)
def test_what_goes_together_passes(argv: list[str]) -> None:
    parse(*argv)


def test_a_dataset_file_may_bring_the_masks() -> None:
    parse("--masked_loss", "--validation_split=1", train_data_dir=None, dataset_config="data.toml")


WITHOUT_EFFECT = [
    ["--system_prompt_on_empty_caption"],
    ["--bucket_no_upscale"],
    ["--bucket_reso_steps=32"],
    ["--min_bucket_reso=128", "--enable_bucket", "--bucket_no_upscale"],
    ["--max_bucket_reso=2048"],
    ["--keep_tokens=1"],
    ["--token_warmup_min=2"],
    ["--caption_variants=4"],
    ["--prior_loss_weight=0.5"],
    ["--conditioning_data_dir=masks"],
    ["--validation_seed=1"],
    ["--discrete_flow_shift=3", "--timestep_sampling=uniform"],
    ["--save_every_n_epochs=2", "--save_n_epoch_ratio=3"],
    ["--save_last_n_epochs_state=2", "--save_state"],
    ["--save_last_n_steps_state=2", "--save_every_n_steps=5"],
    ["--metadata_author=me", "--save_model_as=ckpt"],
    ["--training_comment=x", "--no_metadata"],
    ["--initial_epoch=2", "--initial_step=5"],
    ["--sample_batch_size=2"],
    ["--sample_weights=raw"],
    ["--huggingface_path_in_repo=x"],
    ["--async_upload"],
    ["--huggingface_token=x"],
]


@pytest.mark.parametrize("argv", WITHOUT_EFFECT, ids=" ".join)
def test_flags_without_effect_are_named(argv: list[str], caplog: pytest.LogCaptureFixture) -> None:
    warn_of_unused(parse(*argv), all_specs())
    (record,) = caplog.records
    assert argv[0].split("=")[0] in record.getMessage()


def test_weights_that_a_state_replaces_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "lora.safetensors"
    file.touch()
    warn_of_unused(parse(f"--network_weights={file}", f"--resume={tmp_path}"), all_specs())
    assert "--network_weights (--resume brings" in caplog.text
    caplog.clear()
    warn_of_unused(parse(f"--network_weights={file}", f"--resume={tmp_path}", "--dim_from_weights"), all_specs())
    assert "--network_weights" not in caplog.text


def test_previews_may_be_drawn_with_raw_weights_only_where_there_are_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat", encoding="utf-8")
    warn_of_unused(parse("--sample_weights=raw", f"--sample_prompts={prompts}", "--sample_at_first"), all_specs())
    assert "--sample_weights (there is no moving average" in caplog.text


def test_flags_with_effect_are_not_named(caplog: pytest.LogCaptureFixture) -> None:
    argv = [
        "--enable_bucket",
        "--min_bucket_reso=128",
        "--bucket_reso_steps=32",
        "--shuffle_caption",
        "--keep_tokens=1",
    ]
    more = ["--caption_variants=4", "--token_warmup_min=2", "--token_warmup_step=10", "--reg_data_dir=reg"]
    last = ["--prior_loss_weight=0.5", "--validation_split=0.1", "--validation_seed=1", "--discrete_flow_shift=3"]
    warn_of_unused(parse(*argv, *more, *last), all_specs())
    assert not caplog.records


def test_a_flag_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_unused(parse("--training_comment=x", "--no_metadata", "--save_model_as=pt"), all_specs())
    (record,) = caplog.records
    assert record.getMessage().count("--training_comment") == 1


def test_conditions_name_flags_that_exist() -> None:
    assert {name for names, _, _ in CONDITIONS for name in names} <= set(all_specs())
