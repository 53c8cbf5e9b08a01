"""Start-up checks of the machine, and the loss guard."""

import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed

from library.errors import SettingsError, UserError
from library.memory.settings import MemorySettings
from library.training import processes
from library.training.settings import LogSettings


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    from accelerate.state import AcceleratorState, PartialState

    yield
    AcceleratorState._reset_state(True)
    PartialState._reset_state()


def test_a_driver_beside_a_cpu_torch_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(processes.shutil, "which", lambda name: f"/bin/{name}")
    processes.start_accelerator("no", None, LogSettings())
    (record,) = caplog.records
    assert "built without CUDA" in record.getMessage()
    assert record.levelname == "WARNING"


def test_no_driver_no_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(processes.shutil, "which", lambda name: None)
    accelerator = processes.start_accelerator("no", 5, LogSettings())
    assert not caplog.records
    one = processes.Processes(accelerator)
    assert (one.rank, one.count, one.is_main) == (0, 1, True)
    assert one.gather([1, 2]) == [[1, 2]]
    sharing = one.sharing()
    assert (sharing.rank, sharing.count, sharing.show_progress) == (0, 1, True)


@pytest.mark.parametrize(
    ("variable", "value", "settings", "says"),
    [
        (
            "ACCELERATE_MIXED_PRECISION",
            "bf16",
            MemorySettings(),
            "configured for the mixed precision bf16, which has no",
        ),
        ("ACCELERATE_MIXED_PRECISION", "fp16", MemorySettings(mixed_precision="bf16"), "of this program is bf16"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", MemorySettings(), "add --mixed_precision fp16 there"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", MemorySettings(mixed_precision="fp16"), ""),
        ("ACCELERATE_MIXED_PRECISION", "fp8", MemorySettings(), "add --mixed_precision bf16 there"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", MemorySettings(mixed_precision="bf16"), ""),
        ("ACCELERATE_MIXED_PRECISION", "no", MemorySettings(mixed_precision="bf16"), ""),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", MemorySettings(), "compiler inductor, which has no effect"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", MemorySettings(torch_compile=True), ""),
        ("ACCELERATE_DYNAMO_BACKEND", "NO", MemorySettings(), ""),
    ],
)
def test_what_the_launcher_asks_for_and_this_program_does_not(
    variable: str,
    value: str,
    settings: MemorySettings,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    monkeypatch.setenv(variable, value)
    processes.warn_of_launcher(settings)
    assert bool(caplog.messages) == bool(says)
    assert says in caplog.text


@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_sharding_in_accelerates_configuration_is_a_warning(
    variable: str, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processes.shutil, "which", lambda name: None)
    monkeypatch.setenv(variable, "true")
    accelerator = processes.start_accelerator("no", None, LogSettings())
    assert accelerator.distributed_type.value == "NO"
    (record,) = caplog.records
    assert f"accelerate is configured for {name}, which has no effect" in record.getMessage()


@pytest.mark.parametrize(
    ("precision", "has_units", "says"),
    [
        ("bf16", False, "--mixed_precision fp16 is made for such cards"),
        ("fp16", True, "here bf16 is faster"),
        ("bf16", True, ""),
        ("fp16", False, ""),
        ("no", False, ""),
    ],
)
def test_the_precision_that_a_card_is_made_for(
    precision: str, has_units: bool, says: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processes.shutil, "which", lambda name: None)
    monkeypatch.setattr(processes, "multiplies_bf16", lambda device: has_units)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla T4")
    accelerator = processes.start_accelerator(precision, None, LogSettings())
    assert accelerator.mixed_precision == ("bf16" if precision == "bf16" else "no")  # never a scaler of losses
    assert [says in record.getMessage() for record in caplog.records] == ([True] if says else [])


def test_more_processes_started_than_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.os, "environ", {**processes.os.environ, "WORLD_SIZE": "4"})
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: type("One", (), {"num_processes": 1})())
    with pytest.raises(SettingsError, match="4 processes, but accelerate sees 1"):
        processes.start_accelerator("no", None, LogSettings())


def test_missing_tracker_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.utils.imports.is_wandb_available", lambda: False)
    with pytest.raises(SettingsError, match=r"^--log_with wandb: wandb is not installed, .* run: pip install wandb"):
        processes.start_accelerator("no", None, LogSettings(log_with="wandb"))


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_no_number(loss: float) -> None:
    with pytest.raises(UserError, match=r"step 3 .*a\.png"):
        processes.check_finite(loss, 1.0, 3, ["a.png"])
    with pytest.raises(UserError, match=r"gradient's norm of step 3 .*a\.png"):
        processes.check_finite(1.0, loss, 3, ["a.png"])


def test_a_loss_that_is_a_number() -> None:
    processes.check_finite(0.5, 0.0, 1, [])


def _wait_for_a_slow_one(rank: int, folder: str) -> None:
    where = f"file://{folder}/meeting"
    # The timeout of what exchanges gradients; on GPUs it is some minutes.
    distributed.init_process_group("gloo", where, rank=rank, world_size=2, timeout=timedelta(seconds=1))
    one: Any = SimpleNamespace(
        process_index=rank,
        num_processes=2,
        is_main_process=rank == 0,
        device=torch.device("cpu"),
        wait_for_everyone=distributed.barrier,
    )
    together = processes.Processes(one)
    if rank == 0:
        time.sleep(3)  # as an upload
    together.wait()
    Path(folder, str(rank)).touch()


def test_others_wait_as_long_as_the_first_one_saves(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_wait_for_a_slow_one, (str(tmp_path),), nprocs=2)
    assert {"0", "1"} <= {path.name for path in tmp_path.iterdir()}
