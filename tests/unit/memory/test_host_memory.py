import subprocess
import sys
from pathlib import Path

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
