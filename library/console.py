"""What a person sees while the program runs: log lines between progress bars, and nothing of other packages' noise."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from library.errors import UserError

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


class _BetweenBars(logging.Handler):
    """Writes records to standard error without tearing a progress bar apart."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

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
    """
    level = level or "INFO"
    handlers: list[logging.Handler] = [_BetweenBars()]
    if file is not None and process_rank() == 0:  # another process would empty the first one's file
        handlers[0].setLevel(logging.ERROR)
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(file, mode="w", encoding="utf-8"))
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


_stopped = threading.Event()
_put_off = threading.Event()
_signals: list[int] = []
# The user's Ctrl+C comes twice where a launcher passes it on; who presses it again does not want to wait.
_PATIENCE_SIGNALS = 2


def _stop(number: int = signal.SIGINT, *_: object) -> None:
    _stopped.set()
    _signals.append(number)
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
    """Runs an entry script: a user's error becomes one message and exit code 2, Ctrl+C exit code 130."""
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


def _run(main: Callable[[], None]) -> None:
    try:
        main()
    except UserError as error:
        if process_rank() == 0:
            logging.getLogger(__name__).error("%s", error)
        else:
            # Mostly all processes find the same error, and the launcher ends the others as soon as the first has said
            # it. What only this process has found is heard a moment later.
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(_LET_THE_FIRST_SPEAK_S)
                logging.getLogger(__name__).error("process %d: %s", process_rank(), error)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        logging.getLogger(__name__).debug("where it happened:", exc_info=True)
        logging.getLogger(__name__).error("%s: %s", error.filename, error.strerror)
        sys.exit(2)
    except Exception:
        raise_if_stopped()  # what went wrong after Ctrl+C went wrong because of it
        raise
