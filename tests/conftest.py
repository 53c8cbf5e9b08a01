"""Makes the project and the tests' shared helpers importable, and keeps tests small on the machine they run on."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before torch is imported. The tests' models are so small that threads wait for each other longer than they compute, and
# runs that are compared bit for bit, in this process and in others, have equal numbers of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Remembered hashes of files go where they do not outlive the tests.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="lumina-tests-")

TESTS = Path(__file__).resolve().parent
for folder in (TESTS.parent, TESTS):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture(scope="module", autouse=True)
def _accelerate_forgets() -> Iterator[None]:
    """Lets no file of tests find the state of accelerate, of which a process has only one, that another file left."""
    yield
    if "accelerate.state" in sys.modules:
        from trainer_helpers import fresh_accelerate

        fresh_accelerate()
