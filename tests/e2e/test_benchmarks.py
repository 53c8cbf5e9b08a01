"""The benchmark of the data side reaches into the trainer; it is run here on a few pictures, so that it goes on working."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from e2e_helpers import ROOT, make_pictures


def task(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "tests" / "bench" / "bench_data.py"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if lines else {}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "pictures"
    make_pictures(folder)
    task("fill", str(folder))
    return folder


def test_a_start_is_measured(pictures: Path) -> None:
    found = task("start", str(pictures))
    assert found["first_step_s"] > 0
    assert found["seconds"]["cache_text"] >= 0


def test_the_wait_for_batches_is_measured(pictures: Path) -> None:
    found = task("wait", str(pictures), "--steps=3")
    assert 0 < found["share"] < 1
