"""Files and folders that cannot be read, each with its own message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from library.errors import ModelFileError
from library.lumina.checkpoint_files import open_checkpoint


def refusal(path: Path) -> str:
    with pytest.raises(ModelFileError) as error:
        open_checkpoint(path, "--gemma2", "text_encoder")
    message = str(error.value)
    assert message.startswith("--gemma2: ")
    assert str(path) in message
    return message


def good_file(path: Path) -> Path:
    save_file({"a": torch.arange(600.0), "b": torch.zeros(3, 5, dtype=torch.bfloat16)}, path, {"config": "{}"})
    return path


def test_names_shapes_and_places_are_read_from_the_header(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(good_file(tmp_path / "x.safetensors"), "--gemma2", "text_encoder")
    assert checkpoint.shapes == {"a": (600,), "b": (3, 5)}
    assert checkpoint.metadata == {"config": "{}"}
    entry = checkpoint.entries["a"]
    data = entry.file.read_bytes()[entry.start : entry.end]
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.float32), torch.arange(600.0))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html><body>Log in</body></html>", "web page"),
        (b'{"error":"Access to model google/gemma-2-2b is restricted"}', "server's error message"),
        (b"PK\x03\x04" + bytes(40), "pickle"),
        (b"GGUF" + bytes(40), "GGUF"),
        (bytes(4096), "begins with zeros"),
        (b"no model at all, but some text", "does not begin with a safetensors header"),
        ((40).to_bytes(8, "little") + b"{" * 40, "not valid JSON"),
    ],
)
def test_what_is_no_safetensors_file_is_recognised(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert text in refusal(path)


@pytest.mark.parametrize("name", ["x.pth", "x.ckpt", "x.pt", "x.bin"])
def test_pickles_are_refused_with_what_to_use_instead(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"PK\x03\x04")
    message = refusal(path)
    assert "can run any program" in message
    assert ".safetensors version" in message


def test_a_truncated_file_is_named_without_reading_it(tmp_path: Path) -> None:
    path = good_file(tmp_path / "x.safetensors")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    message = refusal(path)
    assert f"promises {size} bytes and the file has {size - 100} bytes" in message
    assert "download it again" in message


def test_a_file_cut_inside_its_header_is_no_safetensors_file(tmp_path: Path) -> None:
    path = good_file(tmp_path / "x.safetensors")
    path.write_bytes(path.read_bytes()[:40])
    assert "is not a safetensors file" in refusal(path)


def test_surplus_bytes_and_false_sizes_are_damage(tmp_path: Path) -> None:
    path = good_file(tmp_path / "x.safetensors")
    path.write_bytes(path.read_bytes() + b"12")
    assert "2 bytes behind its last tensor" in refusal(path)
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "a of shape [3] does not fill its 4 bytes" in refusal(path)
    header = json.dumps({"a": {"dtype": "F32"}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "broken safetensors header" in refusal(path)


def test_a_missing_path_names_its_nearest_neighbour(tmp_path: Path) -> None:
    good_file(tmp_path / "gemma_2_2b.safetensors")
    assert "did you mean 'gemma_2_2b.safetensors'?" in refusal(tmp_path / "gema_2_2b.safetensors")
    assert "repository on Hugging Face" in refusal(Path("Alpha-VLLM/Lumina-Image-2.0"))


def test_folders_without_one_clear_model_are_refused(tmp_path: Path) -> None:
    assert "holds no .safetensors file" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    assert "pytorch_model.bin and no .safetensors" in refusal(tmp_path)
    good_file(tmp_path / "a.safetensors")
    good_file(tmp_path / "b.safetensors")
    message = refusal(tmp_path)
    assert "a.safetensors, b.safetensors" in message
    assert "Give the path of the file." in message


@pytest.mark.parametrize("with_index", [True, False])
def test_a_missing_shard_is_named(tmp_path: Path, with_index: bool) -> None:
    names = [f"model-{index:05}-of-00003.safetensors" for index in (1, 2, 3)]
    if with_index:
        index = {"weight_map": dict(zip("abc", names, strict=True))}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    for name in names[:2]:
        good_file(tmp_path / name)
    message = refusal(tmp_path)
    assert "lacks 1 of 3 shards: model-00003-of-00003.safetensors" in message


def test_a_sub_folder_of_a_pipeline_is_found(tmp_path: Path) -> None:
    (tmp_path / "text_encoder").mkdir()
    file = good_file(tmp_path / "text_encoder" / "model.safetensors")
    assert open_checkpoint(tmp_path, "--gemma2", "text_encoder").files == (file,)
