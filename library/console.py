"""What a person sees while the program runs: log lines between progress bars, and nothing of other packages' noise."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from library.errors import SettingsError, UserError

_NOISY = (
    "accelerate",
    "bitsandbytes",
    "diffusers",
    "filelock",
    "fsspec",
    "httpcore",
    "httpx",
    "httpx2",
    "huggingface_hub",
    "torch",
    "transformers",
    "PIL",
    "urllib3",
)


_LET_THE_FIRST_SPEAK_S = 3.0
_OURS = ("library", "networks", "lumina_train_network", "lumina_minimal_inference")
"""Modules of this project: one that is missing is a defect."""
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""A disk's, whatever file it was: full, over the user's share or a limit, or not to be written to."""


class _BetweenBars(logging.Handler):
    """Writes records to standard error without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            from tqdm import tqdm
        except ImportError:  # the message may be the one that says so
            sys.stderr.write(self.format(record) + "\n")
            return
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except (OSError, ValueError):  # the stream is gone, as at the end of a killed terminal
            self.handleError(record)


class _Format(logging.Formatter):
    """``12:34:56 text``, with the level's name where it is not INFO."""

    def __init__(self, with_time: bool) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self._with_time = with_time

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname}: "
        time = f"{self.formatTime(record, self.datefmt)} " if self._with_time else ""
        return f"{time}{level}{record.message}"


def process_rank() -> int:
    """Returns this process's number among all of the run, as the launcher says; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def set_up_logging(level: str | None = None, file: Path | None = None, simple: bool = False) -> None:
    """Sends this program's log to the screen or ``file``, and quiets other packages unless ``level`` is DEBUG.

    Args:
        level: least level shown; INFO when None.
        file: written anew, by the first process alone, instead of the screen, which then shows errors only.
        simple: leave the time out.

    Raises:
        SettingsError: ``file`` cannot be written.
    """
    level = level or "INFO"
    handlers: list[logging.Handler] = [_BetweenBars()]
    if file is not None and process_rank() == 0:  # another process would empty the first one's file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(logging.FileHandler(file, mode="w", encoding="utf-8"))
        except OSError as error:
            reason = error.strerror or error
            raise SettingsError(
                f"--console_log_file: {file} cannot be written ({reason}), so there is no place for the log; give another"
                " file"
            ) from error
        handlers[0].setLevel(logging.ERROR)
    for handler in handlers:
        handler.setFormatter(_Format(with_time=not simple))
    root = logging.getLogger()
    root.handlers[:] = handlers
    # Processes other than the first say only what went wrong; the first one speaks for all.
    root.setLevel(level if process_rank() == 0 else max(logging.ERROR, logging.getLevelName(level)))
    for name in _NOISY:  # also where an earlier call with another level quieted them
        logging.getLogger(name).setLevel(logging.NOTSET if level == "DEBUG" else logging.ERROR)
    if level != "DEBUG":
        warnings.filterwarnings("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


_PUT_OFF_NOTE = b"\nStopping as soon as this step is done and saved; press Ctrl+C twice more to end at once\n"

_stopped = threading.Event()
_put_off = threading.Event()
_signals: list[int] = []
# The user's Ctrl+C comes twice where a launcher passes it on; who presses it again does not want to wait.
_PATIENCE_SIGNALS = 2


def _stop(number: int = signal.SIGINT, *_: object) -> None:
    _stopped.set()
    _signals.append(number)
    if _put_off.is_set() and len(_signals) == 1 and process_rank() == 0:
        # Not through the logger: what the signal interrupted may be writing to the same stream.
        os.write(2, _PUT_OFF_NOTE)
    if not _put_off.is_set() or len(_signals) > _PATIENCE_SIGNALS:
        raise KeyboardInterrupt


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Puts Ctrl+C off while the block runs, unless it comes again and again: ask :func:`is_stopped` afterwards.

    Blocks may stand within each other.
    """
    outermost = not _put_off.is_set()
    _put_off.set()
    try:
        yield
    finally:
        if outermost:
            _put_off.clear()


def is_stopped() -> bool:
    """Returns whether the user stopped the program."""
    return _stopped.is_set()


def raise_if_stopped() -> None:
    """Raises KeyboardInterrupt where the user stopped the program and the exception was lost.

    Python drops it where it comes up in a destructor, and some imports swallow it.
    """
    if _stopped.is_set():
        raise KeyboardInterrupt


def run_program(main: Callable[[], None]) -> None:
    """Runs an entry script: a user's error becomes one message and exit code 2, Ctrl+C exit code 130.

    So does a package that is missing or broken, which is a matter of how the program was installed.
    """
    set_up_logging()
    _stopped.clear()
    _signals.clear()
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)  # how schedulers and containers end a program
    try:
        _run(main)
    except KeyboardInterrupt:
        logging.getLogger(__name__).warning("Stopped by the user")
        sys.exit(130)


def _end_with(message: str) -> NoReturn:
    """Says what the user can mend, and ends the program."""
    if process_rank() == 0:
        logging.getLogger(__name__).error("%s", message)
    else:
        # Mostly all processes find the same error, and the launcher ends the others as soon as the first has said
        # it. What only this process has found is heard a moment later.
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(_LET_THE_FIRST_SPEAK_S)
            logging.getLogger(__name__).error("process %d: %s", process_rank(), message)
    sys.exit(2)


def _about_package(error: ImportError) -> str:
    """Returns what to do about a package of others that is missing or broken."""
    remedy = f'run: "{sys.executable}" -m pip install -r requirements.txt'
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.partition(".")[0]
        if error.name == package:
            return f"the package {package} is not installed in this Python, and nothing works without it; {remedy}"
    return (
        f"a package of this Python cannot be loaded ({error}): it is broken, or does not go with another one; {remedy}"
    )


def _run(main: Callable[[], None]) -> None:
    try:
        main()
    except UserError as error:
        _end_with(str(error))
    except ImportError as error:
        raise_if_stopped()
        if (error.name or "").partition(".")[0] in _OURS:
            raise
        logging.getLogger(__name__).debug("where it happened:", exc_info=True)
        _end_with(_about_package(error))
    except OSError as error:
        if error.filename is None and error.errno not in _DISK_ERRORS:
            raise
        logging.getLogger(__name__).debug("where it happened:", exc_info=True)
        where = error.filename if error.filename is not None else "a file cannot be written"
        remedy = "; free some space there" if error.errno == errno.ENOSPC else ""
        logging.getLogger(__name__).error("%s: %s%s", where, error.strerror, remedy)
        sys.exit(2)
    except Exception:
        raise_if_stopped()  # what went wrong after Ctrl+C went wrong because of it
        raise
