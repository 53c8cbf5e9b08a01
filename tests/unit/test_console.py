"""What reaches the screen and the log file."""

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from library import console
from library.console import run_program, set_up_logging
from library.errors import SettingsError, UserError

logger = logging.getLogger("library.something")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    before = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = before


def test_screen_shows_level_only_where_it_matters(capsys: pytest.CaptureFixture) -> None:
    set_up_logging(simple=True)
    logger.info("hello %d", 1)
    logger.warning("careful")
    logger.debug("detail")
    assert capsys.readouterr().err == "hello 1\nWARNING: careful\n"


def test_log_file_keeps_errors_on_the_screen(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    set_up_logging("WARNING", tmp_path / "logs" / "run.log", simple=True)
    logger.info("hello")
    logger.warning("careful")
    logger.error("wrong")
    assert capsys.readouterr().err == "ERROR: wrong\n"
    assert (tmp_path / "logs" / "run.log").read_text(encoding="utf-8") == "WARNING: careful\nERROR: wrong\n"


def test_a_log_file_that_cannot_be_written_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    for path in (tmp_path, tmp_path / "file" / "run.log"):
        with pytest.raises(SettingsError, match=r"^--console_log_file: .* cannot be written .*give another file"):
            set_up_logging("WARNING", path)


def test_the_training_program_takes_the_console_flags(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import lumina_train_network

    flags = [
        "--console_log_level=WARNING",
        f"--console_log_file={tmp_path / 'run.log'}",
        "--console_log_simple",
        "--v2",
    ]
    models = [f"--pretrained_model_name_or_path={tmp_path / 'none.safetensors'}", f"--train_data_dir={tmp_path}"]
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    more = ["--resolution=64", f"--output_dir={tmp_path}", "--network_module=networks.lora_lumina"]
    with pytest.raises(UserError, match=r"none\.safetensors"):
        lumina_train_network.main([*flags, *models, *more])
    assert capsys.readouterr().err == ""
    text = (tmp_path / "run.log").read_text(encoding="utf-8")
    assert text.startswith("WARNING: These flags have no effect here: --v2")


def test_other_processes_say_only_what_went_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "1")
    set_up_logging(simple=True)
    logger.info("hello")
    logger.warning("careful")
    logger.error("wrong")
    assert capsys.readouterr().err == "ERROR: wrong\n"


def test_other_processes_leave_the_log_file_to_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    set_up_logging("INFO", tmp_path / "run.log", simple=True)
    logger.info("of the first")
    monkeypatch.setenv("RANK", "1")
    set_up_logging("INFO", tmp_path / "run.log", simple=True)
    logger.error("of the second")
    assert (tmp_path / "run.log").read_text(encoding="utf-8") == "of the first\n"
    assert capsys.readouterr().err == "ERROR: of the second\n"


def test_other_packages_are_quiet(capsys: pytest.CaptureFixture) -> None:
    set_up_logging(simple=True)
    logging.getLogger("diffusers.models").warning("noise")
    logging.getLogger("transformers").info("noise")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [(SettingsError("--x: wrong"), 2, "ERROR: --x: wrong"), (KeyboardInterrupt(), 130, "Stopped by the user")],
)
def test_a_users_error_becomes_a_message(
    error: BaseException, code: int, says: str, capsys: pytest.CaptureFixture
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_program(main)
    assert caught.value.code == code
    assert says in capsys.readouterr().err


def test_a_lost_ctrl_c_still_ends_the_program(capsys: pytest.CaptureFixture) -> None:
    import os
    import signal

    from library import console

    def main() -> None:
        with contextlib.suppress(KeyboardInterrupt):  # as an import that swallows it
            signal.raise_signal(signal.SIGINT)
        console.raise_if_stopped()
        os._exit(3)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            run_program(main)
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
        console._stopped.clear()
    assert caught.value.code == 130


def test_a_file_that_cannot_be_opened_is_one_line(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    def main() -> None:
        (tmp_path / "missing" / "x").read_text(encoding="utf-8")

    with pytest.raises(SystemExit) as caught:
        run_program(main)
    assert caught.value.code == 2
    assert "No such file" in capsys.readouterr().err


def test_a_full_disk_is_one_line_whatever_file_it_was(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(SystemExit) as caught:
        run_program(main)
    assert caught.value.code == 2
    assert "ERROR: a file cannot be written: No space left on device; free some space" in capsys.readouterr().err


def test_another_error_of_the_system_is_a_defect() -> None:
    def main() -> None:
        raise OSError(22, "Invalid argument")

    with pytest.raises(OSError, match="Invalid argument"):
        run_program(main)


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("import no_such_package.part", "the package no_such_package is not installed in this Python"),
        (
            "from json import no_such_name",
            "a package of this Python cannot be loaded (cannot import name 'no_such_name'",
        ),
        (
            "import json.no_such_module",
            "a package of this Python cannot be loaded (No module named 'json.no_such_module'",
        ),
    ],
)
def test_a_package_that_is_missing_or_broken_is_one_line(
    statement: str, says: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_program(lambda: exec(statement))
    assert caught.value.code == 2
    screen = capsys.readouterr().err
    assert says in screen
    assert f'"{sys.executable}" -m pip install -r requirements.txt' in screen
    assert "Traceback" not in screen


def test_a_module_of_ours_that_is_missing_is_a_defect() -> None:
    with pytest.raises(ImportError):
        run_program(lambda: exec("from library.errors import no_such_name"))


def test_the_screen_needs_no_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    set_up_logging(simple=True)
    monkeypatch.setitem(sys.modules, "tqdm", None)  # as if it were not installed
    logger.error("tqdm is missing")
    assert capsys.readouterr().err == "ERROR: tqdm is missing\n"


def test_a_defect_keeps_its_traceback() -> None:
    def main() -> None:
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError):
        run_program(main)


def test_old_python_ends_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    monkeypatch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
    for script in ("lumina_train_network.py", "lumina_minimal_inference.py"):
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(Path(__file__).resolve().parents[2] / script))
        assert caught.value.code == "This program needs Python 3.11 or newer; this is Python 3.10."


def test_who_waits_for_a_step_to_end_is_told(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    """While a step is compiled that takes minutes, in which Ctrl+C seemed to do nothing."""
    monkeypatch.setattr(console, "_stopped", threading.Event())
    monkeypatch.setattr(console, "_signals", [])
    with console.uninterrupted():
        console._stop()
        console._stop()
    assert capfd.readouterr().err.count("Stopping as soon as this step is done") == 1
    console._signals.clear()
    with pytest.raises(KeyboardInterrupt):
        console._stop()
    assert capfd.readouterr().err == ""


def test_ctrl_c_is_put_off_unless_it_comes_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_stopped", threading.Event())
    monkeypatch.setattr(console, "_signals", [])
    with console.uninterrupted():
        with console.uninterrupted():
            console._stop()
        console._stop()  # a launcher passes the same Ctrl+C on
        assert console.is_stopped()
        with pytest.raises(KeyboardInterrupt):
            console._stop()
    console._signals.clear()
    with pytest.raises(KeyboardInterrupt):
        console._stop()
