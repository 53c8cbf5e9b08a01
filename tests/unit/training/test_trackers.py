"""TensorBoard and wandb: what reaches them. wandb is not installed, so a small package stands in for it."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.utils import LoggerType
from PIL import Image
from trainer_helpers import fresh_accelerate

from library.errors import SettingsError
from library.settings import specs_of
from library.training.arguments import GROUPS, parse_arguments
from library.training.processes import start_accelerator
from library.training.settings import LogSettings
from library.training.trackers import Trackers, accelerate_arguments, logged_settings, tracker_arguments

FAKE_WANDB = """
calls = []

class Image:
    def __init__(self, pixels):
        self.shape = pixels.shape

class Run:
    def log(self, values, step=None):
        calls.append(("log", step, values))
    def finish(self):
        calls.append(("finish",))

class config:
    @staticmethod
    def update(values, allow_val_change):
        calls.append(("config", values))

def init(**arguments):
    calls.append(("init", arguments))
    return Run()

def login(key):
    if len(key) != 40:
        raise ValueError(f"API key must be 40 characters long, yours was {key}")
    calls.append(("login", key))
"""
KEY = "k" * 40
ARGV = [
    "--pretrained_model_name_or_path=/home/jane/models/dit.safetensors",
    "--train_data_dir=/home/jane/pictures",
    "--resolution=256",
    "--output_dir=out/there",
    "--network_module=networks.lora_lumina",
    "--network_args",
    "attn_dim=4",
    "mlp_dim=8",
    "--system_prompt=Be kind.",
    f"--wandb_api_key={KEY}",
    "--huggingface_token=hf_secret",
]


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A package called wandb, as far as accelerate and we look at it; it keeps what is done with it."""
    site = tmp_path / "site"
    (site / "wandb").mkdir(parents=True)
    (site / "wandb" / "__init__.py").write_text(FAKE_WANDB, encoding="utf-8")
    (site / "wandb-0.1.dist-info").mkdir()
    (site / "wandb-0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: wandb\nVersion: 0.1\n", "utf-8"
    )
    monkeypatch.syspath_prepend(site)
    # accelerate looks once, when it is imported.
    found = [LoggerType.TENSORBOARD, LoggerType.WANDB]
    monkeypatch.setattr("accelerate.tracking._available_trackers", found)
    yield importlib.import_module("wandb")
    del sys.modules["wandb"]


def run(settings: LogSettings, run_settings: dict[str, Any] | None = None) -> None:
    """Starts the trackers, reports a little, and ends them."""
    fresh_accelerate()
    accelerator = start_accelerator("no", None, settings)
    trackers = Trackers(accelerator, settings)
    if run_settings is not None:
        trackers.log_settings(run_settings)
    trackers.log({"loss/current": 0.5}, 3)
    trackers.log({}, 4)
    trackers.log_picture("preview", Image.new("RGB", (8, 4)), 3)
    accelerator.end_training()


def events_of(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = list(folder.rglob("events.*"))
    log = EventAccumulator(str(events[0].parent))
    log.Reload()
    return log


def test_wandb(wandb: Any, tmp_path: Path) -> None:
    config = tmp_path / "tracker.toml"
    config.write_text('[wandb]\nentity = "us"\nname = "other"\n', encoding="utf-8")
    run(
        LogSettings(
            log_with="wandb",
            wandb_run_name="mine",
            wandb_api_key=KEY,
            log_tracker_config=config,
            log_tracker_name="project",
            log_config=True,
        ),
        {"seed": 1, "network_dim": None},
    )
    assert wandb.calls[0] == ("login", KEY)
    assert wandb.calls[1] == ("init", {"project": "project", "entity": "us", "name": "mine"})
    assert wandb.calls[2] == ("config", {"seed": 1, "network_dim": None})
    assert wandb.calls[3] == ("log", 3, {"loss/current": 0.5})
    _, step, pictures = wandb.calls[4]
    assert (step, pictures["preview"][0].shape) == (3, (4, 8, 3))
    assert wandb.calls[5:] == [("finish",)]


def test_both(wandb: Any, tmp_path: Path) -> None:
    run(LogSettings(log_with="all", logging_dir=tmp_path / "logs", log_prefix="run-"))
    assert [call[0] for call in wandb.calls] == ["init", "log", "log", "finish"]
    (folder,) = (tmp_path / "logs").iterdir()
    assert folder.name.startswith("run-2")
    log = events_of(folder)
    assert [(event.step, event.value) for event in log.Scalars("loss/current")] == [(3, 0.5)]
    assert log.Tags()["images"] == ["preview"]


def test_tensorboard_takes_all_settings(tmp_path: Path) -> None:
    config = parse_arguments(ARGV)
    assert config is not None
    run(LogSettings(logging_dir=tmp_path, log_config=True), logged_settings(config))
    (stored,) = tmp_path.rglob("hparams.yml")
    text = stored.read_text(encoding="utf-8")
    assert "seed: null" in text
    assert "network_args: attn_dim=4 mlp_dim=8" in text


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (LogSettings(logging_dir=Path("logs")), "--logging_dir: tensorboard is not installed"),
        (LogSettings(log_with="all", logging_dir=Path("logs")), "--log_with all: tensorboard is not installed"),
    ],
)
def test_a_missing_tracker_is_named_by_the_flag_that_asks_for_it(
    settings: LogSettings, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.utils.imports.is_tensorboard_available", lambda: False)
    with pytest.raises(SettingsError, match=f"^{says}.* pip install tensorboard, or leave the flag out"):
        accelerate_arguments(settings)


@pytest.mark.parametrize("method", ["start", "store_init_configuration"])
def test_a_folder_that_cannot_be_written_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"accelerate.tracking.TensorBoardTracker.{method}", full)
    with pytest.raises(SettingsError, match=r"^--logging_dir: .* cannot be written to \(No space left on device\)"):
        run(LogSettings(logging_dir=tmp_path, log_config=True), {"seed": 1})


def test_a_key_that_wandb_refuses(wandb: Any) -> None:
    with pytest.raises(SettingsError, match="40 characters long") as caught:
        run(LogSettings(log_with="wandb", wandb_api_key="secret"))
    assert "secret" not in str(caught.value)


def test_logged_settings_are_complete_and_keep_secrets() -> None:
    """defect 62: paths and keys of newer flags leaked."""
    config = parse_arguments(ARGV)
    assert config is not None
    shown = logged_settings(config)
    assert set(shown) == {spec.name for _, cls in GROUPS.values() for spec in specs_of(cls)}
    assert shown["wandb_api_key"] == shown["huggingface_token"] == "(hidden)"
    everything = json.dumps(shown)  # plain values
    assert not [part for part in (KEY, "hf_secret", "jane", "there/", "/home") if part in everything]
    assert shown["pretrained_model_name_or_path"] == "dit.safetensors"
    assert shown["train_data_dir"] == "pictures"
    assert shown["output_dir"] == "there"
    assert shown["system_prompt"] == "Be kind."
    assert shown["learning_rate"] == 2e-6
    assert shown["network_dim"] is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[wandb", "tracker.toml"),
        ('entity = "us"\n', "entity is no tracker's table"),
        ("[mlflow]\nx = 1\n", "mlflow is no"),
    ],
)
def test_a_wrong_tracker_config(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "tracker.toml").write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError, match=says):
        tracker_arguments(LogSettings(log_tracker_config=tmp_path / "tracker.toml"))
