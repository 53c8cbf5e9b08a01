"""What every benchmark reports beside its figures, and the memory of a running command. Linux only (reads /proc)."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import signal
import subprocess
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FIELDS = ("RssAnon", "RssFile", "RssShmem")


class Stopped(BaseException):
    """The process was asked to end; what has been measured so far can still be printed."""


def stop_when_asked() -> None:
    """Has :class:`Stopped` raised where the process is asked to end, as ``timeout`` does when time is up."""

    def stop(number: int, frame: object) -> None:
        raise Stopped

    signal.signal(signal.SIGTERM, stop)


def circumstances() -> dict[str, object]:
    """Returns date, commit, machine and versions. The variable COMMIT names the commit of a copy without git's folder."""
    try:
        commit = (
            os.environ.get("COMMIT")
            or subprocess.run(
                ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
            ).stdout.strip()
        )
    except OSError:  # a machine without git; what was measured must not be lost by it
        commit = ""
    packages = ("torch", "transformers", "diffusers", "accelerate", "safetensors")
    flags = _cpu_line("flags").split()
    return {
        "date": date.today().isoformat(),
        "commit": commit,
        "cpu": _cpu_line("model name"),
        "cores": os.cpu_count(),
        "avx512_bf16": "avx512_bf16" in flags,
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_line(name: str) -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return ""


def _tree(pid: int) -> list[int]:
    """Returns a process and all that descend from it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text(encoding="ascii").split()
        except OSError:  # ended meanwhile
            continue
        for child in children:
            found += _tree(int(child))
    return found


def _resident(pid: int) -> dict[str, int]:
    """Returns a process's resident memory in bytes: anonymous, mapped from files, shared."""
    sizes = dict.fromkeys(_FIELDS, 0)
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return sizes
    for line in lines:
        name, _, value = line.partition(":")
        if name in sizes:
            sizes[name] = int(value.split()[0]) * 1024
    return sizes


def run_and_watch(command: list[str], log: Path, interval_s: float = 0.05) -> dict[str, float]:
    """Runs a command with all its processes and returns its exit code, time and peak memory in GiB.

    Args:
        command: from the project's folder.
        log: file for its output.
        interval_s: between two looks.

    Returns:
        ``peak_gib`` (most resident memory at one time), ``anonymous_at_peak_gib`` and ``mapped_at_peak_gib`` of that
        moment, ``peak_anonymous_gib`` and ``peak_mapped_gib`` at their own times, ``seconds``, ``exit_code``.
    """
    started = time.monotonic()
    peak = {"total": 0, "anonymous": 0, "mapped": 0, "anonymous_then": 0, "mapped_then": 0}
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            sizes = [_resident(pid) for pid in _tree(process.pid)]
            anonymous = sum(size["RssAnon"] + size["RssShmem"] for size in sizes)
            mapped = sum(size["RssFile"] for size in sizes)
            peak["anonymous"] = max(peak["anonymous"], anonymous)
            peak["mapped"] = max(peak["mapped"], mapped)
            if anonymous + mapped > peak["total"]:
                peak.update(total=anonymous + mapped, anonymous_then=anonymous, mapped_then=mapped)
            time.sleep(interval_s)
    gib = {name: round(value / 2**30, 2) for name, value in peak.items()}
    return {
        "peak_gib": gib["total"],
        "anonymous_at_peak_gib": gib["anonymous_then"],
        "mapped_at_peak_gib": gib["mapped_then"],
        "peak_anonymous_gib": gib["anonymous"],
        "peak_mapped_gib": gib["mapped"],
        "seconds": round(time.monotonic() - started, 1),
        "exit_code": process.returncode,
    }
