"""Atomic writing and hashes."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library import files
from library.errors import SettingsError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        files.write_with(path, fail)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_text_and_json_are_utf8_with_unix_line_ends(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a.txt", "猫\nx")
    assert (tmp_path / "a.txt").read_bytes() == "猫\nx".encode()
    files.write_json(tmp_path / "sub" / "a.json", {"猫": 1})
    assert json.loads((tmp_path / "sub" / "a.json").read_text(encoding="utf-8")) == {"猫": 1}


def test_safetensors_of_views_and_metadata(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    files.write_safetensors(tmp_path / "a.safetensors", {"t": whole.T}, {"k": "v"})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["t"], whole.T)
    header, start = files.read_safetensors_header(tmp_path / "a.safetensors")
    assert header["__metadata__"] == {"k": "v"}
    assert (tmp_path / "a.safetensors").stat().st_size == start + 48


@pytest.mark.parametrize("content", [b"", b"123", b"\xff" * 64, (10).to_bytes(8, "little") + b"not json !"])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="header"):
        files.read_safetensors_header(tmp_path / "a.safetensors")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256_of_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_what_safetensors_cannot_write_is_an_oserror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def full(*_: object, **__: object) -> None:
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_safetensors(tmp_path / "a.safetensors", {"t": torch.zeros(1)}, None)
    assert list(tmp_path.iterdir()) == []


def test_what_safetensors_says_of_the_system_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def full(*_: object, **__: object) -> None:
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '.*a\.safetensors'$"):
        files.write_safetensors(tmp_path / "a.safetensors", {"t": torch.zeros(1)}, None)


def test_an_error_of_an_open_file_gets_the_files_name(tmp_path: Path) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"a\.png") as caught:
        files.write_with(tmp_path / "a.png", full)
    assert (caught.value.errno, caught.value.filename) == (28, str(tmp_path / "a.png"))
    assert list(tmp_path.iterdir()) == []


def test_a_write_within_another_has_its_temporary_file(tmp_path: Path) -> None:
    """What a killed program leaves has a name that the next one knows, and errors name the file that is written."""
    path, seen = tmp_path / "my.safetensors", []

    def note_and_fill(temporary: Path) -> None:
        seen.extend(entry.name for entry in tmp_path.iterdir())
        temporary.write_text("new")
        raise OSError(28, "No space left on device", str(temporary))

    with pytest.raises(OSError, match="No space") as caught:
        files.write_with(path, lambda outer: files.write_with(outer, note_and_fill))
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / seen[0]).touch()
    assert files.remove_leftovers(tmp_path, lambda name: name == "my", lambda _: False) == seen
    files.write_with(path, lambda outer: files.write_text(outer, "new"))
    assert path.read_text() == "new"


def test_folders_are_tried_before_they_are_needed(tmp_path: Path) -> None:
    files.check_writable("--output_dir", tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(SettingsError, match=r"--output_dir: .*file.* cannot be written to"):
        files.check_writable("--output_dir", tmp_path / "file")


def test_names_that_are_no_unicode_survive_in_json(tmp_path: Path) -> None:
    name = b"\x83\x65.png".decode("utf-8", "surrogateescape")
    files.write_json(tmp_path / "a.json", {name: 1})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {name: 1}


def test_tensors_are_written_in_parts_as_safetensors_reads_them(tmp_path):
    tensors = {"b": torch.randn(3, 5), "a": torch.arange(6, dtype=torch.uint8), "none": torch.zeros(0)}
    entries = {
        "b": ("F32", (3, 5), 60),
        "a": ("U8", (6,), 6),
        "none": ("F32", (0,), 0),
    }
    parts = {name: [tensor.view(torch.uint8).reshape(-1).numpy().data] for name, tensor in tensors.items()}
    parts["a"] = [b"\0\1\2", b"", b"\3\4\5"]
    files.write_safetensors_in_parts(tmp_path / "x.safetensors", entries, parts.__getitem__, {"k": "ü"})
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert files.read_safetensors_header(tmp_path / "x.safetensors")[0]["__metadata__"] == {"k": "ü"}
    assert files.read_safetensors_header(tmp_path / "x.safetensors")[1] % 64 == 0


def test_a_tensor_of_another_size_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError, match="b: 3 bytes instead of 4"):
        files.write_safetensors_in_parts(tmp_path / "x.safetensors", {"b": ("F32", (1,), 4)}, lambda _: [b"123"], None)
    assert not list(tmp_path.iterdir())


def test_a_target_is_prepared_without_what_a_killed_writer_left_of_it(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / ".out-a1b2c3d4.partial.safetensors").write_bytes(b"half")
    (tmp_path / ".other-a1b2c3d4.partial.safetensors").write_bytes(b"half")
    files.prepare_target("--save_to", tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == [".other-a1b2c3d4.partial.safetensors"]
    assert not caplog.records
    (tmp_path / "out.safetensors").write_bytes(b"whole")
    files.prepare_target("--save_to", tmp_path / "out.safetensors")
    assert "out.safetensors of 20" in caplog.text
    assert (tmp_path / "out.safetensors").read_bytes() == b"whole"
