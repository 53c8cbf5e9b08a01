"""Makes the project and the tests' shared helpers importable, and keeps tests small on the machine they run on."""

import os
import sys
import tempfile
from pathlib import Path

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
