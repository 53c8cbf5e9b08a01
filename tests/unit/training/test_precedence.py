"""What is typed goes before --config_file, also where two flags answer one question."""

from pathlib import Path

import pytest

from library.settings import as_given, shown
from library.training.arguments import TrainConfig, all_specs, parse_arguments
from library.training.flag_notices import give_notices
from library.training.precedence import ONE_WAY, RIVALS, TURNED_ON_BY, say_what_is_switched_off, switched_off
from library.training.report import RunPlan
from library.training.unused_flags import warn_of_unused

ENOUGH = [
    "--pretrained_model_name_or_path=model.safetensors",
    "--resolution=256",
    "--output_dir=out",
    "--network_module=networks.lora_lumina",
]
PICTURES = "--train_data_dir=pictures"


@pytest.fixture
def parse(tmp_path: Path):
    def parse(file: str, *typed: str) -> TrainConfig:
        (tmp_path / "run.toml").write_text(file, encoding="utf-8")
        config = parse_arguments([*ENOUGH, *typed, f"--config_file={tmp_path / 'run.toml'}"])
        assert config is not None
        return config

    return parse


@pytest.mark.parametrize(("typed_steps", "file_steps", "steps"), [(2, None, 2), (None, 2, 30), (2, 7, 2)])
def test_typed_steps_go_before_the_files_epochs(
    parse, typed_steps: int | None, file_steps: int | None, steps: int
) -> None:
    file = "max_train_epochs = 3\n" + (f"max_train_steps = {file_steps}\n" if file_steps else "")
    typed = [f"--max_train_steps={typed_steps}"] if typed_steps else []
    assert RunPlan.of(parse(file, PICTURES, *typed).schedule, num_batches=10).num_steps == steps


def test_where_both_are_typed_the_order_is_sd_scripts(parse) -> None:
    config = parse("seed = 1", PICTURES, "--max_train_steps=2", "--max_train_epochs=3")
    assert RunPlan.of(config.schedule, num_batches=10).num_steps == 30
    assert config.switched_off == ()
    config = parse("max_train_epochs = 5", PICTURES, "--max_train_steps=2", "--max_train_epochs=3")
    assert RunPlan.of(config.schedule, num_batches=10).num_steps == 30


def test_previews_by_typed_steps(parse, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a disc", encoding="utf-8")
    file = f"sample_prompts = '{tmp_path / 'prompts.txt'}'\nsample_every_n_epochs = 10\n"
    samples = parse(file, PICTURES, "--sample_every_n_steps=1").samples
    assert (samples.sample_every_n_steps, samples.sample_every_n_epochs) == (1, None)
    # 0 or less turns the flag itself off and asks for nothing in the place of the file's.
    for nothing in ("0", "-1"):
        samples = parse(file, PICTURES, f"--sample_every_n_steps={nothing}").samples
        assert (samples.sample_every_n_steps, samples.sample_every_n_epochs) == (None, 10)
    samples = parse(file.replace("epochs", "steps"), PICTURES, "--sample_every_n_epochs=-1").samples
    assert (samples.sample_every_n_steps, samples.sample_every_n_epochs) == (10, None)


def test_files_saved_by_steps_and_by_epochs_are_no_rivals(parse) -> None:
    output = parse("save_every_n_epochs = 2", PICTURES, "--save_every_n_steps=5").output
    assert (output.save_every_n_steps, output.save_every_n_epochs) == (5, 2)


def test_another_optimizer_and_kernel_than_the_files(parse) -> None:
    assert parse("use_8bit_adam = true", PICTURES, "--optimizer_type=Lion").optimizer.resolved_optimizer == "Lion"
    assert parse("sdpa = true", PICTURES, "--attn_mode=flash").attention.mode == "flash"
    config = parse("network_train_unet_only = true", PICTURES, "--network_train_text_encoder_only")
    assert not config.trains_dit


def test_the_files_rate_of_the_transformer_stays_and_is_told(parse, caplog: pytest.LogCaptureFixture) -> None:
    config = parse("unet_lr = 1e-3\ntext_encoder_lr = 1e-5", PICTURES, "--learning_rate=1e-4")
    assert (config.optimizer.learning_rate, config.optimizer.unet_lr) == (1e-4, 1e-3)
    give_notices(config)
    assert "--learning_rate 0.0001 is not the transformer's, which has unet_lr = 0.001" in caplog.text
    caplog.clear()
    for line, typed in (
        ("unet_lr = 1e-3\nlearning_rate = 1e-4", "--text_encoder_lr=1e-5"),
        ("learning_rate = 1e-3", "--unet_lr=1e-4"),
        ("unet_lr = 0.0", "--learning_rate=1e-4"),
    ):
        give_notices(parse(line, PICTURES, typed))
    assert "is not the transformer's" not in caplog.text


def test_ranks_and_alphas_of_a_file_leave_nothing_to_warn_of(
    parse, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "lora.safetensors").touch()
    weights = f"--network_weights={tmp_path / 'lora.safetensors'}"
    config = parse("network_dim = 16\nnetwork_alpha = 16", PICTURES, weights, "--dim_from_weights")
    assert [one.name for one in config.switched_off] == ["network_dim", "network_alpha"]
    warn_of_unused(config, all_specs())
    assert not caplog.records
    config = parse("dim_from_weights = true", PICTURES, weights, "--network_alpha=8")
    assert config.network.dim_from_weights


def test_other_pictures_than_the_files(parse) -> None:
    data = parse('dataset_config = "data.toml"', PICTURES).data
    assert (data.dataset_config, data.train_data_dir) == (None, "pictures")
    data = parse('train_data_dir = "pictures"', "--dataset_config=data.toml").data
    assert (data.dataset_config, data.train_data_dir) == (Path("data.toml"), None)


@pytest.mark.parametrize("name", TURNED_ON_BY)
def test_a_cache_that_is_turned_off_is_off(parse, name: str) -> None:
    assert getattr(parse(f"{name}_to_disk = true", PICTURES).data, name)
    assert not getattr(parse(f"{name}_to_disk = true", PICTURES, f"--{name}=false").data, name)
    assert getattr(parse(f"{name} = false", PICTURES, f"--{name}_to_disk").data, name)


def test_one_line_says_so(parse, caplog: pytest.LogCaptureFixture) -> None:
    config = parse("max_train_epochs = 30\ncache_latents_to_disk = true\nseed = 1", PICTURES)
    with caplog.at_level("INFO"):
        say_what_is_switched_off(config.switched_off, config.config_file)
        assert not caplog.records
        typed = ["--max_train_steps=2", "--cache_latents=false", "--seed=2"]
        config = parse("max_train_epochs = 30\ncache_latents_to_disk = true\nseed = 1", PICTURES, *typed)
        say_what_is_switched_off(config.switched_off, config.config_file)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"The command line goes before {config.config_file}: --max_train_steps 2 replaces max_train_epochs = 30,"
        " --cache_latents=false replaces cache_latents_to_disk = true"
    )
    assert "max_train_epochs" not in config.given
    assert config.given["seed"] == 2


def test_of_several_typed_flags_one_is_named() -> None:
    typed = {"nf4_base": True, "fp8_base": True, "dataset_config": Path("a"), "max_train_steps": 1}
    assert switched_off(typed, {"nf4_base": True, "fp8_base": True, "max_train_epochs": 0}) == []
    (line,) = switched_off({"sdpa": True, "attn_mode": "flash"}, {"xformers": True, "mem_eff_attn": False})
    assert line.name == "xformers"


def test_the_declared_flags_exist() -> None:
    names = {name for names in (*RIVALS, *ONE_WAY, *TURNED_ON_BY.items()) for name in names}
    assert names <= set(all_specs())


@pytest.mark.parametrize(
    ("value", "text"), [(True, "true"), (1e-4, "0.0001"), ((512, 768), "512,768"), ("", '""'), (Path("a/b"), "a/b")]
)
def test_values_are_shown_as_users_write_them(value: object, text: str) -> None:
    assert shown(value) == text


def test_flags_are_shown_as_users_write_them() -> None:
    given = [("sdpa", True), ("sdpa", False), ("seed", 3)]
    assert [as_given(*one) for one in given] == ["--sdpa", "--sdpa=false", "--seed 3"]
