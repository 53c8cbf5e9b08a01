import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from library.memory import host_memory

ROOT = Path(__file__).resolve().parents[3]
_SIZE = 2**22 * 4  # bytes of the tensor: 16 MiB
_RESIDENT = """
import torch
from pathlib import Path
from library.memory.host_memory import keep_freed_memory
if {kept}:
    assert keep_freed_memory()
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
before = resident()
tensor = torch.full((2**22,), 1.0)
assert resident() - before > 2**23
del tensor
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_freed_memory_stays_with_the_process() -> None:
    stayed = {}
    for kept in (False, True):
        done = subprocess.run(
            [sys.executable, "-c", _RESIDENT.format(kept=kept)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        stayed[kept] = int(done.stdout)
    assert stayed[True] > 0.9 * _SIZE
    assert stayed[False] < 0.5 * _SIZE


_GIVEN_BACK = """
import torch
from pathlib import Path
from library.memory.host_memory import give_freed_memory_back, keep_freed_memory
assert keep_freed_memory()
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
before = resident()
model = [torch.full((2**20,), 1.0) for _ in range(16)]
kept = model[8]  # what lies between must not keep the rest
del model
stayed = resident() - before
assert give_freed_memory_back()
print(stayed, resident() - before, float(kept.sum()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_memory_of_a_model_that_was_let_go_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", _GIVEN_BACK], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stayed, at_last, kept = map(float, done.stdout.split())
    assert stayed > 0.9 * 16 * 2**22
    assert at_last < 0.25 * 16 * 2**22  # the tensor that is kept is a sixteenth
    assert kept == 2**20


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory.sys, "platform", "win32")
    assert not host_memory.keep_freed_memory()
    assert not host_memory.give_freed_memory_back()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_an_old_glibc_keeps_blocks_as_large_as_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.35 it refuses a threshold above 32 MiB; then 128 KiB would stay, because the others end its growing."""
    taken: dict[int, int] = {}

    def mallopt(name: int, value: int) -> int:
        if name == host_memory._MMAP_THRESHOLD and value > 32 * 2**20:
            return 0
        taken[name] = value
        return 1

    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    assert host_memory.keep_freed_memory()
    assert taken[host_memory._MMAP_THRESHOLD] == 32 * 2**20
    assert len(taken) == 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_nothing_is_set_where_no_threshold_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []

    def refusing(name: int, value: int) -> int:
        called.append(name)
        return 0

    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=refusing))
    assert not host_memory.keep_freed_memory()
    assert set(called) == {host_memory._MMAP_THRESHOLD}
