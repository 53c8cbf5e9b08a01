"""When PyTorch is told to let segments grow, and that it takes the words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.memory import device_memory
from library.memory.device_memory import let_segments_grow

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file of NVIDIA's driver."""
    path = tmp_path / "nvidiactl"
    path.touch()
    monkeypatch.setattr(device_memory, "_NVIDIA", (tmp_path / "none", path))
    monkeypatch.setattr(sys, "platform", "linux")
    return path


@pytest.mark.usefixtures("nvidia")
def test_it_is_set_once_on_linux_with_nvidias_driver() -> None:
    environment: dict[str, str] = {}
    assert let_segments_grow(environment)
    assert environment == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert not let_segments_grow(environment)


@pytest.mark.usefixtures("nvidia")
@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
@pytest.mark.parametrize("value", ["", "expandable_segments:False", "max_split_size_mb:128"])
def test_a_users_own_words_stand(name: str, value: str) -> None:
    environment = {name: value}
    assert not let_segments_grow(environment)
    assert environment == {name: value}


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_it_is_not_set_elsewhere(nvidia: Path, platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", platform)
        assert not let_segments_grow(environment)
    nvidia.unlink()  # AMD's driver, WSL, or none
    assert not let_segments_grow(environment)
    assert environment == {}


_TRAINING = "gemma2=a ae=a train_data_dir=a network_module=networks.lora_lumina max_train_steps=1"


@pytest.mark.parametrize(
    ("program", "flags"),
    [("lumina_train_network", _TRAINING), ("lumina_minimal_inference", "gemma2_path=a ae_path=a prompt=a")],
)
def test_the_programs_set_it_before_torch_is_there(program: str, flags: str, tmp_path: Path) -> None:
    given = [f"--{flag}" for flag in f"pretrained_model_name_or_path=a output_dir={tmp_path} {flags}".split()]
    code = (
        "import sys\n"
        f"import {program} as program\n"
        "def noted():\n"
        "    sys.exit('torch' in sys.modules)\n"
        "program.let_segments_grow = noted\n"
        f"program.main({given!r})\n"
        "sys.exit(2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it is set on Linux alone")
def test_torch_takes_it_without_a_warning() -> None:
    """A CUDA build parses it without a GPU too, and a word that it does not know is an error."""
    code = "import torch; torch._C._accelerator_setAllocatorSettings('garbage_collection_threshold:0.8')"
    for value, is_known in (("expandable_segments:True", True), ("expandible_segments:True", False)):
        if not is_known and torch.version.cuda is None:
            continue
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env={**os.environ, "PYTORCH_ALLOC_CONF": value},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode == 0) == is_known, done.stderr
        assert done.stderr == "" or not is_known
