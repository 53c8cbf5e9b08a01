"""Hashes of files are remembered until the file changes."""

import os
from pathlib import Path

import pytest

from library import file_hashes


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_computed_once_until_the_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"1")
    made: list[str] = []

    def compute() -> str:
        made.append("x")
        return f"hash {len(made)}"

    assert file_hashes.remembered("k", [file], compute) == "hash 1"
    assert file_hashes.remembered("k", [file], compute) == "hash 1"
    assert file_hashes.remembered("other", [file], compute) == "hash 2"
    os.utime(file, ns=(1, 1))
    assert file_hashes.remembered("k", [file], compute) == "hash 3"
    file.write_bytes(b"22")
    os.utime(file, ns=(1, 1))
    assert file_hashes.remembered("k", [file], compute) == "hash 4"


def test_a_damaged_or_unwritable_store_costs_only_time(tmp_path: Path, own_store: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"1")
    store = own_store / "lumina-lora-trainer" / "file_hashes.json"
    store.parent.mkdir(parents=True)
    store.write_text("{not json", encoding="utf-8")
    assert file_hashes.remembered("k", [file], lambda: "x") == "x"
    assert file_hashes.remembered("k", [file], lambda: "y") == "x"
    store.unlink()
    store.parent.rmdir()
    store.parent.write_text("a file in the way", encoding="utf-8")
    assert file_hashes.remembered("k", [file], lambda: "y") == "y"
