"""--config_file and --output_config: types, front ends' ways to say nothing, their keys, and the way back."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest

from library.errors import SettingsError
from library.settings import FlagSpec
from library.training.arguments import GROUPS, all_specs, parse_arguments
from library.training.config_file import read_config_file, toml_text, warn_of_gui_keys, write_config_file
from library.training.gui_keys import GUI_KEYS, REASONS, WORDS_FOR_NOTHING, ZERO_MEANS_OFF

ENOUGH = """
pretrained_model_name_or_path = "model.safetensors"
train_data_dir = "pictures"
resolution = 256
output_dir = "out"
network_module = "networks.lora_lumina"
"""


def write(tmp_path: Path, text: str, name: str = "run.toml") -> Path:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return file


def read(tmp_path: Path, text: str) -> dict[str, Any]:
    return read_config_file(write(tmp_path, text), all_specs())[0]


# defect 62: no type, choice or unknown-key check, and a true flag could not be turned off on the command line


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning_rate = 1", "learning_rate", 1.0),
        ('learning_rate = "1e-4"', "learning_rate", 1e-4),
        ("network_dim = 8.0", "network_dim", 8),
        ('resolution = "512,512"', "resolution", (512, 512)),
        ('resolution = "512"', "resolution", (512, 512)),
        ("resolution = 512", "resolution", (512, 512)),
        ("resolution = [512, 768]", "resolution", (512, 768)),
        ("text_encoder_lr = 1e-5", "text_encoder_lr", (1e-5,)),
        ("text_encoder_lr = [0.0001, 1]", "text_encoder_lr", (1e-4, 1.0)),
        ('network_args = ["attn_dim=4", ""]', "network_args", ("attn_dim=4",)),
        ("persistent_data_loader_workers = 1", "persistent_data_loader_workers", True),
        ('cache_latents = "False"', "cache_latents", False),
        ("lr_warmup_steps = 0.1", "lr_warmup_steps", 0.1),
        ("output_name = 7", "output_name", "7"),
        ("seed = 0", "seed", 0),
        ('weighting_scheme = "none"', "weighting_scheme", "none"),
        ('output_name = "None"', "output_name", "None"),
        ('caption_separator = " "', "caption_separator", " "),
        ('[a]\nlog_with = "wandb"', "log_with", "wandb"),
    ],
)
def test_values_become_what_the_command_line_makes_of_them(tmp_path: Path, line: str, name: str, value: Any) -> None:
    flags = read(tmp_path, line)
    assert flags == {name: value}
    assert type(flags[name]) is type(value)


@pytest.mark.parametrize(
    "line",
    [
        'network_weights = ""',
        'network_weights = "None"',
        'vae = ""',
        'learning_rate = ""',
        'seed = "None"',
        'log_with = ""',
        'log_with = "null"',
        'resolution = ""',
        'lr_scheduler = ""',
        'caption_extension = ""',
        'cache_latents = ""',
        "network_args = []",
        'network_args = ""',
        'base_weights = [""]',
        "text_encoder_lr = []",
        "save_every_n_steps = 0",
        "max_train_epochs = 0",
        "vae_batch_size = 0",
        "scale_weight_norms = 0.0",
        "blocks_to_swap = 0",
        'dynamo_backend = "no"',
        'config_file = ""',
        "output_config = false",
        'config_file = "None"',
    ],
)
def test_what_front_ends_write_for_not_set(tmp_path: Path, line: str) -> None:
    assert read(tmp_path, line) == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learnin_rate = 1", "no flag is called 'learnin_rate' (did you mean 'learning_rate'?)"),
        ("learnin_rate = 1\nsede = 2", "'sede' (did you mean 'seed'?); mend or remove the lines"),
        ('learning_rate = "oops"', "learning_rate: 'oops' is not a number"),
        ('mixed_precision = "int4"', "'int4' is none of no, fp16, bf16"),
        ("mixed_precision = false", "False is none of"),
        ("seed = true", "seed: True is not a whole number"),
        ("seed = 1.5", "seed: 1.5 is not a whole number"),
        ("seed = [1]", "seed: [1] is not a whole number"),
        ("seed = 1979-05-27", "is not a whole number"),
        ("cache_latents = 3", "neither true nor false"),
        ("[a]\nb = {c = 1}", "b is a table inside a table"),
        ("[a]\nseed = 1\n[b]\nseed = 2", "seed stands in two sections, as 1 and 2"),
        ('caption_extension = ".txt"\ncaption_extention = ".cap"', "are the same flag"),
        ("[[datasets]]\nresolution = 5", "is a dataset file; give it with --dataset_config"),
        ('config_file = "other.toml"', "config_file = 'other.toml' has no place in a file"),
        ("output_config = true", "output_config = True has no place in a file"),
        ('output_dir = "C:\\Users\\x"', "forward slashes"),
        ("vae = None", "remove the line"),
        ("cache_latents = True", "small letters"),
        ("seed = 1\nseed = 2", "not valid TOML"),
        ("seed = 1\nseed = 2", "a second time; keep one of the lines"),
        ("ae = \N{RIGHT DOUBLE QUOTATION MARK}ae.safetensors\N{RIGHT DOUBLE QUOTATION MARK}", "Write straight quotes"),
        ("torch_compile: true", "with an equals sign"),
        ("optimizer_type = AdamW", "Put texts in quotes"),
        ('ae = "a\\u0000b"', "is not a path"),
        ("a = " + "[" * 100_000, "not valid TOML"),
    ],
)
def test_what_is_wrong_is_said_with_the_file(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(tmp_path, text)
    assert says in str(caught.value)
    assert "run.toml" in str(caught.value)


def test_a_json_preset_is_not_taken_for_a_broken_file(tmp_path: Path) -> None:
    file = write(tmp_path, '{"LoRA_type": "Standard"}', "preset.json")
    with pytest.raises(SettingsError, match=r"preset\.json.*Print training command"):
        read_config_file(file, all_specs())


def test_a_file_that_names_itself_is_read(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f'config_file = "{file.as_posix()}"\nseed = 1\n', encoding="utf-8")
    assert read_config_file(file, all_specs())[0] == {"seed": 1}


def test_the_command_line_wins_and_turns_off(tmp_path: Path) -> None:
    more = "seed = 7\ncache_latents = true\nnetwork_args = ['attn_dim=4']\n"
    file = write(tmp_path, ENOUGH + more)
    config = parse_arguments([f"--config_file={file}", "--seed=8", "--cache_latents=false", "--network_args"])
    assert config is not None
    assert (config.schedule.seed, config.data.cache_latents, config.network.network_args) == (8, False, ())


def test_keys_of_front_ends_are_named_in_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = ["epoch", "noise_offset_type", "train_inpainting", "stop_text_encoder_training", "t5xxl", "LoRA_type"]
    file = write(tmp_path, ENOUGH + "".join(f"{key} = 1\n" for key in keys))
    config = parse_arguments([f"--config_file={file}"])
    assert config is not None
    assert config.gui_keys == tuple(keys)
    warn_of_gui_keys(config.gui_keys, config.config_file)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert all(key in record.getMessage() for key in keys)
    assert "run.toml" in record.getMessage()


def test_tables_name_what_they_should() -> None:
    listed = [key for _, keys in GUI_KEYS for key in keys]
    assert sorted(listed) == sorted(set(listed))
    specs = all_specs()
    flags = {name for spec in specs.values() for name in (spec.name, *spec.aliases)}
    assert set(REASONS) & flags == set()
    assert ZERO_MEANS_OFF | set(WORDS_FOR_NOTHING) <= set(specs)
    assert all(specs[name].kind in (int, float) for name in ZERO_MEANS_OFF)


# ---- the way back

ODD_TEXTS = [
    'quo"te',
    "back\\slash",
    "new\nline\ttab",
    "ünï 漢 😀",
    "a=b # c",
    "\x00\x1f\x7f",
    "'single'",
    "[x]",
    "1",
    "true",
]


def _other_value(spec: FlagSpec, number: int) -> list[str]:
    """Returns words for the command line that set a flag to something else than its default."""
    own = {
        "resolution": "384,512",
        "face_crop_aug_range": "1.5,2.25",
        "lr_warmup_steps": "0.123456789",
        "lr_decay_steps": "100%",
        "token_warmup_step": "0.3",
    }
    if spec.name in own:
        return [own[spec.name]]
    if spec.choices:
        return [next(choice for choice in spec.choices if choice != spec.default)]
    one = {
        bool: str(not spec.default),
        int: "7",
        float: "1.2345678901234567e-05",
        Path: f"~/{ODD_TEXTS[number]}".replace("\0", ""),
    }
    text = one.get(spec.kind, ODD_TEXTS[number])
    return [text, text] if spec.many else [text]


@pytest.mark.parametrize("number", range(len(ODD_TEXTS)), ids=[repr(text) for text in ODD_TEXTS])
def test_every_flag_survives_writing_and_reading(tmp_path: Path, number: int) -> None:
    specs = all_specs()
    file = tmp_path / "run.toml"
    given = {}
    for name, spec in specs.items():
        if name not in ("config_file", "output_config"):
            words = _other_value(spec, number)
            given[name] = spec.convert(words if spec.many else words[0], f"--{name}")
            assert given[name] != spec.default
    write_config_file(file, given)
    again, gui_keys = read_config_file(file, specs)
    assert again == given
    assert {name: type(value) for name, value in again.items()} == {name: type(given[name]) for name in given}
    assert gui_keys == ()


def test_output_config_writes_what_was_set_and_no_secret(tmp_path: Path) -> None:
    secrets = [name for name, spec in all_specs().items() if spec.secret]
    assert {"huggingface_token", "wandb_api_key"} <= set(secrets)  # defect 62
    file = tmp_path / "run.toml"
    argv = re.findall(r"(\w+) = (.+)", ENOUGH)
    flags = [f"--{name}={value.strip(chr(34))}" for name, value in argv]
    hidden = [f"--{name}=SECRET" for name in secrets]
    assert parse_arguments([*flags, *hidden, "--seed=3", f"--config_file={file}", "--output_config"]) is None
    text = file.read_text(encoding="utf-8")
    assert "SECRET" not in text
    assert [line.split(" = ")[0] for line in text.splitlines()] == [*(name for name, _ in argv), "seed"]
    again, direct = parse_arguments([f"--config_file={file}"]), parse_arguments([*flags, "--seed=3"])
    assert all(getattr(again, group) == getattr(direct, group) for group in GROUPS)


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"--output_dir .* is not UTF-8"):
        toml_text("caf\udce9", "output_dir")


def test_of_several_processes_the_first_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.toml"
    monkeypatch.setenv("RANK", "1")
    write_config_file(file, {"seed": 1})
    assert not file.exists()
    monkeypatch.setenv("RANK", "0")
    write_config_file(file, {"seed": 1})
    monkeypatch.setenv("RANK", "1")
    write_config_file(file, {"seed": 2})  # no error, though the file is there by now
    assert file.read_text(encoding="utf-8") == "seed = 1\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[a]\nwandb_api_key = "key-1"\n[b]\nwandb_api_key = "key-2"', "stands in two sections; keep one"),
        ('huggingface_token = ["key-1"]', "huggingface_token: the value is not a text"),
    ],
)
def test_no_message_holds_a_secret(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(tmp_path, text)
    assert says in str(caught.value)
    assert "key-" not in str(caught.value)
