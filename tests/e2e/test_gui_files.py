"""Config files that a graphical front end over sd-scripts writes train unchanged."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_helpers import ROOT, Job, make_pictures
from safetensors import safe_open
from safetensors.torch import load_file

from library.training.gui_keys import REASONS

FILES = ROOT / "tests" / "gui_files"
RECORDED = json.loads((ROOT / "tests" / "golden" / "sd_scripts_flags.json").read_text(encoding="utf-8"))
# What a run cannot do without, so that a file of defaults alone would train nothing.
NEEDED = {
    "pretrained_model_name_or_path",
    "gemma2",
    "ae",
    "train_data_dir",
    "resolution",
    "output_dir",
    "network_module",
    "max_train_steps",
    "sample_prompts",
    "min_timestep",
    "max_timestep",
}
NOT_SET = ("", "None", 0, [])


def fill_in(name: str, job: Job, folder: Path) -> Path:
    """Writes the file with this job's folders, and beside it what the front end writes; returns it."""
    pictures = folder / "img"
    make_pictures(pictures / "1_red disc")  # the front end's way: repeats and class in the folder's name
    (folder / "out").mkdir()
    (folder / "out" / "prompt.txt").write_text("", encoding="utf-8")  # made for every run, filled or not
    text = (FILES / name).read_text(encoding="utf-8")
    for mark, path in (("$MODELS", job.models), ("$PICTURES", pictures), ("$OUTPUT", folder / "out")):
        text = text.replace(mark, path.as_posix())
    file = folder / "config_lora-20260216-101500.toml"
    file.write_text(text, encoding="utf-8", newline="\r\n")
    return file


def test_the_file_of_defaults_holds_every_flag_at_its_default() -> None:
    content = tomllib.loads((FILES / "kohya_ss_defaults.toml").read_text(encoding="utf-8"))
    flags = {flag["dest"]: flag["default"] for flag in RECORDED}
    assert len(flags) == 213
    assert set(content) - set(flags) <= set(REASONS)
    assert len(set(content) - set(flags)) > 80
    assert set(flags) - set(content) == set()
    differs = {name for name, default in flags.items() if content[name] not in ((default,) if default else NOT_SET)}
    assert differs - NEEDED == set()


def test_every_flag_at_its_default_trains(
    job: Job, tmp_path: Path, train: Callable, capfd: pytest.CaptureFixture
) -> None:
    train([f"--config_file={fill_in('kohya_ss_defaults.toml', job, tmp_path)}"])
    weights = load_file(tmp_path / "out" / "last.safetensors")
    learned = [name for name in weights if name.endswith("lora_up.weight") and weights[name].any()]
    assert len(learned) == len([name for name in weights if name.endswith("lora_up.weight")]) > 0
    with safe_open(tmp_path / "out" / "last.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_steps"], metadata["ss_learning_rate"], metadata["ss_network_dim"]) == ("3", "2e-06", "4")
    log = capfd.readouterr().err
    assert log.count("these keys are no flags and have no effect") == 1
    assert "stop_text_encoder_training" in log
    assert "These flags have no effect here" not in log  # every flag is at its default
    assert "ERROR" not in log


def test_a_run_of_the_front_end_trains(job: Job, tmp_path: Path, train: Callable, capfd: pytest.CaptureFixture) -> None:
    file = fill_in("kohya_ss_run.toml", job, tmp_path)
    # What kohya_ss has no field for goes into its "Additional parameters" and so onto the command line, which wins.
    more = [f"--gemma2={job.models / 'quickstart_gemma2.safetensors'}", "--network_module=networks.lora_lumina"]
    train([f"--config_file={file.with_suffix('')}", *more, "--gradient_checkpointing=false"])
    with safe_open(tmp_path / "out" / "last.safetensors", "pt") as saved:
        metadata = saved.metadata()
    assert metadata["ss_gradient_checkpointing"] == "False"
    assert (metadata["ss_seed"], metadata["ss_steps"], metadata["ss_network_alpha"]) == ("42", "4", "4.0")
    assert not any(name.startswith("lora_te") for name in load_file(tmp_path / "out" / "last.safetensors"))
    log = capfd.readouterr().err
    named = next(line for line in log.splitlines() if "these keys are no flags" in line)
    assert all(key in named for key in ("epoch", "noise_offset_type", "max_resolution", "t5xxl_max_token_length"))
    ignored = next(line for line in log.splitlines() if "These flags have no effect here" in line)
    assert all(flag in ignored for flag in ("--clip_skip", "--max_token_length", "--sample_sampler"))
    assert "--dynamo_backend" not in ignored  # "no" asks for nothing
    shutil.rmtree(tmp_path / "out")
