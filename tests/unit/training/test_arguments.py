"""Command line and --config_file to settings, and how early a wrong one ends."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from library.errors import SettingsError
from library.settings import specs_of
from library.training.arguments import (
    GROUPS,
    ConfigFileSettings,
    all_specs,
    parse_arguments,
)
from library.training.legacy_flags import IGNORED, REFUSED
from library.training.unused_flags import CONDITIONS, warn_of_ignored, warn_of_unused

ROOT = Path(__file__).parents[3]
RECORDED = {
    flag["dest"]: flag for flag in json.loads((ROOT / "tests/golden/sd_scripts_flags.json").read_text(encoding="utf-8"))
}
ENOUGH = [
    "--pretrained_model_name_or_path=model.safetensors",
    "--train_data_dir=pictures",
    "--resolution=256",
    "--output_dir=out",
    "--network_module=networks.lora_lumina",
]
OURS = {
    "attn_mode": "one choice among seven ways to compute attention; sd-scripts has a flag for each of its own",
    "cache_dir": "where cached files go; sd-scripts has no choice there",
    "caption_variants": "bounds how many captions a shuffled run encodes; sd-scripts does not shuffle cached captions",
    "ema_decay": "a moving average of the LoRA; sd-scripts has none",
    "fp8_fast": "products in fp8; sd-scripts only stores weights in it",
    "gradient_checkpointing_level": "how much is computed again; sd-scripts computes everything again",
    "join_caption_lines": "captions of several lines; of a caption file sd-scripts reads the first alone",
    "nf4_base": "4-bit weights; sd-scripts has none",
    "normalize_masked_loss": "sd-scripts always divides by the whole picture's area",
    "sample_weights": "previews of the raw LoRA or of its moving average",
    "vae_tiling": "bounds the autoencoder's memory for large pictures; sd-scripts has it for other models only",
    "system_prompt_on_empty_caption": "sd-scripts' training does so and its sampling does not; here both follow this flag",
    "vram_gb": "chooses the memory flags; sd-scripts leaves that to its user",
}
OTHER_DEFAULTS = {
    "vae_batch_size": "1 there; here as many pictures as need no more memory than one of 1024 px does",
}


def parse(*more: str):
    return parse_arguments([*ENOUGH, *more])


def test_every_flag_of_sd_scripts_is_known_and_nothing_else() -> None:
    specs = all_specs()
    names = set(specs) | {alias for spec in specs.values() for alias in spec.aliases}
    assert set(RECORDED) - names == set()
    assert names - set(RECORDED) == set(OURS)


def test_no_flag_is_declared_twice() -> None:
    classes = [ConfigFileSettings, *(cls for _, cls in GROUPS.values())]
    names = [spec.name for cls in classes for spec in specs_of(cls)] + [spec.name for spec in (*IGNORED, *REFUSED)]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("name", sorted(set(RECORDED) - {"caption_extention"}))  # that one is an alias
def test_types_and_defaults_are_sd_scripts(name: str) -> None:
    recorded = RECORDED[name]
    specs = all_specs()
    spec = specs[name]
    assert (spec.kind is bool) == (recorded["nargs"] == 0)
    assert spec.many == (recorded["nargs"] == "*")
    if recorded["choices"] and spec.choices:
        assert set(spec.choices) == set(filter(None, recorded["choices"]))
    default = None if spec.default in ((), "") and recorded["default"] in (None, "") else spec.default
    if name in OTHER_DEFAULTS:
        assert default != recorded["default"]
        return
    assert default == (recorded["default"] or default)


def test_the_documented_command_line() -> None:
    config = parse(
        "--output_name=my_lumina_lora",
        "--network_dim=8",
        "--network_alpha=8",
        "--learning_rate=1e-4",
        "--optimizer_type=AdamW",
        "--lr_scheduler=constant",
        "--timestep_sampling=nextdit_shift",
        "--max_train_epochs=10",
        "--mixed_precision=bf16",
        "--gradient_checkpointing",
        "--cache_latents",
        "--cache_text_encoder_outputs",
        "--network_args",
        "attn_dim=4",
        "mlp_dim=8",
    )
    assert config.network.network_dim == 8
    assert config.network.arguments() == {"attn_dim": "4", "mlp_dim": "8"}
    assert config.optimizer.learning_rate == 1e-4
    assert config.memory.gradient_checkpointing
    assert config.data.cache_text_encoder_outputs
    assert not config.trains_text_encoder
    assert config.flow.timestep_sampling == "nextdit_shift"


def test_text_encoder_is_trained_unless_said_otherwise() -> None:
    assert parse().trains_text_encoder
    assert not parse("--network_train_unet_only").trains_text_encoder
    assert not parse("--network_train_text_encoder_only").trains_dit


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--learnin_rate=1"], "did you mean '--learning_rate'"),
        (["--network_dim=a"], "--network_dim: 'a' is not a whole number"),
        (["--network_dim=0"], "--network_dim: 0 must be above 0"),
        (["--mixed_precision=int4"], "none of no, fp16, bf16"),
        (["--optimizer_type=AdamWW"], "did you mean 'AdamW'"),
        (["--optimizer_type=Prodgy"], "did you mean 'Prodigy'"),
        (["--optimizer_type=prodigy", "--unet_lr=1", "--text_encoder_lr=0.5"], "cannot differ (0.5, 1)"),
        (["--optimizer_type=DAdaptAdam", "--network_args", "loraplus_lr_ratio=4"], "leave loraplus_lr_ratio out"),
        (["--optimizer_type=AdamWScheduleFree", "--ema_decay=0.99"], "averages the weights already"),
        (["--optimizer_type=torch.optim.LBFGS"], "several times a step"),
        (["--ema_decay=1"], "not between 0 and 1"),
        (["--sample_weights=ema"], "--ema_decay=0.999"),
        (["--lr_scheduler=adafactor"], "here the optimizer is AdamW"),  # defect 45: an IndexError there
        (
            ["--optimizer_type=Adafactor", "--optimizer_args=relative_step=False", "--lr_scheduler=adafactor"],
            "with relative_step=False",
        ),
        (
            ["--optimizer_type=DAdaptSGD", "--lr_scheduler=cosine", "--lr_warmup_steps=10"],
            "leave --lr_warmup_steps out",
        ),
        (["--lr_scheduler_min_lr_ratio=2"], "outside 0 to 1"),
        (["--optimizer_args", "weight_decay"], "name=value"),
        (["--optimizer_args", "betas=fast"], "no Python literal"),
        (["--lr_scheduler=cosin"], "did you mean 'cosine'"),
        (["--lr_scheduler=constant", "--lr_warmup_steps=10"], "constant_with_warmup"),
        (["--lr_scheduler=cosine_with_min_lr"], "--lr_scheduler_min_lr_ratio"),
        (["--lr_warmup_steps=1.5"], "--lr_warmup_steps"),
        (["--network_train_unet_only", "--network_train_text_encoder_only"], "nothing to train"),
        (["--cache_text_encoder_outputs", "--network_train_text_encoder_only"], "freezes Gemma2"),
        (["--network_args", "attn_dim"], "name=value"),
        (["--network_args", "attn_dim=1", "attn_dim=2"], "twice"),
        (["--sample_every_n_steps=5"], "--sample_prompts"),
        (["--sample_prompts=nowhere.txt"], "nowhere.txt is no file"),
        (["--log_with=tensorboard"], "--logging_dir"),
        (["--dim_from_weights"], "--network_weights"),
        (["--output_name=a/b"], "--output_name"),
        (["--output_name=.."], "is no name for a file"),
        (["--output_name= "], "is no name for a file"),
        (["--ip_noise_gamma=-1"], "outside 0 to 10"),
        (["--seed=-1"], "--seed"),
        (["--learning_rate=0"], "nothing would be learned"),
        (["--blocks_to_swap=-1"], "--blocks_to_swap: -1 is no number of blocks"),
        (["--attn_mode=flsh"], "--attn_mode: 'flsh' is none of auto, sdpa, cudnn, flash"),
        (["--fp8_base", "--nf4_base"], "leave one of them out"),
        (["--fp8_fast"], "add --fp8_base"),
        (["--full_fp16"], "fp16 overflows in this model"),  # defect 51
        (["stray"], "belongs to no flag"),
        (["--config_file=nowhere.toml"], "nowhere.toml is no file"),
        (["--gemma2_max_token_length=0"], "--gemma2_max_token_length"),
        (["--full_bf16"], "--mixed_precision bf16"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(argv: list[str], says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse(*argv)
    assert says in str(caught.value)


# --resolution is asked for by the dataset reader, because the dataset file may hold it.
@pytest.mark.parametrize("missing", [flag for flag in ENOUGH if not flag.startswith("--resolution")])
def test_what_a_run_needs(missing: str) -> None:
    with pytest.raises(SettingsError, match=missing.split("=")[0]):
        parse_arguments([flag for flag in ENOUGH if flag != missing])


def test_ignored_flags_are_named_once_with_their_reason(caplog: pytest.LogCaptureFixture) -> None:
    config = parse("--clip_skip=2", "--v2", "--lowram", "--multires_noise_discount=0.3")
    warn_of_ignored(config.given)
    (record,) = caplog.records
    message = record.getMessage()
    assert "--v2, --clip_skip (Stable Diffusion only)" in message
    assert "--lowram" in message
    assert "multires" not in message  # equal to sd-scripts' default: nothing was asked for


def test_refused_flags_pass_at_their_defaults() -> None:
    parse("--zero_stage=2", "--masked_loss=false", "--validation_split=0", "--token_warmup_min=1")


def test_config_file_under_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'learning_rate = 1\nseed = 7\n[any_section]\nresolution = "512,768"\ngradient_checkpointing = true\n'
        'network_args = ["attn_dim=4"]\nclip_skip = 1\ncaption_extention = "txt"\n',
        encoding="utf-8",
    )
    config = parse(f"--config_file={file}", "--seed=8", "--gradient_checkpointing=false")
    assert config.optimizer.learning_rate == 1.0
    assert config.schedule.seed == 8
    assert config.data.resolution == (256, 256)
    assert not config.memory.gradient_checkpointing
    assert config.network.arguments() == {"attn_dim": "4"}
    assert config.data.caption_extension == ".txt"
    # The ending may be left out, as with sd-scripts.
    assert parse(f"--config_file={file.with_suffix('')}").schedule.seed == 7


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("learnin_rate = 1", "did you mean 'learning_rate'"),
        ("[a]\nseed = 1\n[b]\nseed = 2", "seed stands in two sections"),
        ('learning_rate = "oops"', "learning_rate: 'oops' is not a number"),
        ('mixed_precision = "int4"', "none of"),
        ("gradient_checkpointing = 3", "neither true nor false"),
        ("a = [", "not valid TOML"),
    ],
)
def test_wrong_config_file(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(line, encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        parse(f"--config_file={file}")
    assert says in str(caught.value)
    assert "run.toml" in str(caught.value)


def test_output_config_round_trip_without_secrets(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    flags = ["--network_args", "attn_dim=4", "--lr_warmup_steps=10%", "--text_encoder_lr", "1e-5", "2e-5"]
    more = ["--lr_scheduler=cosine", "--log_with=wandb", "--wandb_api_key=SECRET", "--no_half_vae"]
    assert parse_arguments([*ENOUGH, *flags, *more, f"--config_file={file}", "--output_config"]) is None
    assert "SECRET" not in file.read_text(encoding="utf-8")
    assert "wandb_api_key" not in file.read_text(encoding="utf-8")
    again = parse_arguments([f"--config_file={file}"])
    direct = parse_arguments([*ENOUGH, *flags, *more[:2], *more[3:]])
    for field in GROUPS:
        assert getattr(again, field) == getattr(direct, field)
    with pytest.raises(SettingsError, match="exists already"):
        parse_arguments([*ENOUGH, f"--config_file={file}", "--output_config"])


@pytest.mark.parametrize("script", ["lumina_train_network.py", "lumina_minimal_inference.py"])
@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--no_such_flag", 2)])
def test_help_and_wrong_flags_import_nothing_heavy(script: str, argument: str, code: int) -> None:
    heavy = ("torch", "numpy", "transformers", "diffusers", "accelerate", "PIL", "safetensors")
    program = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, {argument!r}]\n"
        "try:\n"
        f"    runpy.run_path({script!r}, run_name='__main__')\n"
        "finally:\n"
        f"    loaded = [name for name in {heavy!r} if name in sys.modules]\n"
        "    print('LOADED', loaded)\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    assert done.returncode == code, done.stderr
    assert "LOADED []" in done.stdout
    assert "Traceback" not in done.stderr
    assert seconds < 2


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--text_encoder_lr=1e-5", "--network_train_unet_only"], "--text_encoder_lr (Gemma2 is not trained)"),
        (["--huber_c=0.2"], "--huber_c"),
        (["--sigmoid_scale=2", "--timestep_sampling=uniform"], "--sigmoid_scale"),
        (["--save_last_n_epochs=2"], "--save_every_n_epochs"),
        (["--vae_batch_size=4"], "latents are not cached"),
        (["--lr_scheduler=cosine", "--lr_scheduler_power=2"], "--lr_scheduler is not polynomial"),
        (["--log_prefix=a"], "there is no tracker"),
        (["--gradient_checkpointing_level=selective"], "without --gradient_checkpointing"),
    ],
)
def test_flags_without_effect_are_named(argv: list[str], named: str, caplog: pytest.LogCaptureFixture) -> None:
    config = parse(*argv)
    assert config is not None
    warn_of_unused(config, all_specs())
    (record,) = caplog.records
    assert named in record.getMessage()


def test_a_plain_run_names_none(caplog: pytest.LogCaptureFixture) -> None:
    config = parse("--huber_c=0.1", "--sigmoid_scale=1.0", "--timestep_sampling=nextdit_shift")
    assert config is not None
    warn_of_unused(config, all_specs())
    assert not caplog.records


def test_a_level_is_of_use_where_checkpointing_may_be_chosen(caplog: pytest.LogCaptureFixture) -> None:
    config = parse("--gradient_checkpointing_level=selective", "--vram_gb=8")
    assert config is not None
    warn_of_unused(config, all_specs())
    assert not caplog.records


def test_conditions_name_flags_that_exist() -> None:
    assert {name for names, _, _ in CONDITIONS for name in names} <= set(all_specs())


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--network_dim=999999999999", "--network_dim: 999999999999 is far more than the widths"),
        ("--ddp_timeout=999999999999", "--ddp_timeout: 999999999999 minutes are more than a year"),
    ],
)
def test_sizes_beyond_every_use_end_at_once(flag: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        parse(flag)
