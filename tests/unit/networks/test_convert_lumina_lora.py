import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lora_helpers import GOLDEN, gemma2, metadata_of, small_next_dit
from safetensors.torch import load_file, save_file

from library.errors import NetworkError, SettingsError
from networks.convert_lumina_lora import main
from networks.lora_files import content_hashes
from networks.lora_lumina import create_network

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "networks" / "convert_lumina_lora.py"
GOLDEN_LORA = GOLDEN / "lora.safetensors"


def convert(source, target, form, *more):
    main([f"--src_path={source}", f"--dst_path={target}", f"--dst={form}", *more])


def test_metadata_stay_and_hashes_are_of_the_new_file(tmp_path):
    convert(GOLDEN_LORA, tmp_path / "new.safetensors", "diffusers")
    old, new = metadata_of(GOLDEN_LORA), metadata_of(tmp_path / "new.safetensors")
    hashes = {name: new.pop(name) for name in ("sshs_model_hash", "sshs_legacy_hash")}
    assert new == {name: text for name, text in old.items() if not name.startswith("sshs_")}
    assert hashes == content_hashes(load_file(tmp_path / "new.safetensors"), old)
    assert hashes["sshs_model_hash"] != old["sshs_model_hash"]


def test_an_alpha_from_metadata_goes_into_the_file_and_leaves_the_metadata(tmp_path):
    name = "transformer.layers.0.feed_forward.linear_1"
    tensors = {f"{name}.lora_A.weight": torch.ones(4, 8), f"{name}.lora_B.weight": torch.ones(6, 4)}
    settings = json.dumps({"transformer.lora_alpha": 8})
    save_file(tensors, tmp_path / "old.safetensors", {"lora_adapter_metadata": settings, "format": "pt"})
    convert(tmp_path / "old.safetensors", tmp_path / "new.safetensors", "comfyui")
    assert float(load_file(tmp_path / "new.safetensors")["diffusion_model.layers.0.feed_forward.w1.alpha"]) == 8
    assert set(metadata_of(tmp_path / "new.safetensors")) == {"sshs_model_hash", "sshs_legacy_hash"}


def test_a_pickled_file_is_converted_too(tmp_path):
    torch.save(load_file(GOLDEN_LORA), tmp_path / "old.pt")
    convert(tmp_path / "old.pt", tmp_path / "new.safetensors", "sd-scripts", "--save_precision=bf16")
    found = load_file(tmp_path / "new.safetensors")
    assert {tensor.dtype for key, tensor in found.items() if "alpha" not in key} == {torch.bfloat16}


def test_a_file_that_is_overwritten_is_named(tmp_path, caplog):
    target = tmp_path / "new.safetensors"
    for _ in range(2):
        with caplog.at_level("INFO"):
            convert(GOLDEN_LORA, target, "comfyui")
    assert caplog.text.count("is overwritten") == 1
    assert f"{target} of 20" in caplog.text


def test_what_is_left_out_is_said(tmp_path, caplog):
    create_network(1.0, 4, 1.0, None, [gemma2()], small_next_dit()).save_weights(tmp_path / "both.safetensors")
    convert(tmp_path / "both.safetensors", tmp_path / "new.safetensors", "diffusers")
    assert "14 modules of Gemma2 are left out" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--src_path is missing"),
        (["--src_path=a.safetensors"], "--dst is missing"),
        (["--src_path=a.safetensors", "--dst=comfyui"], "--dst_path: it is missing"),
        (["--src_path=a.safetensors", "--dst=comfyui", "--dst_path=."], r"--dst_path: \."),
        (["--src_path=a.safetensors", "--dst=comfyui", "--dst_path=b.pt"], r"must end in \.safetensors"),
        (["--dst=a1111"], "a1111.* none of sd-scripts, comfyui, diffusers"),
        ([f"--src_path={GOLDEN_LORA}", "--dst=comfyui", f"--dst_path={GOLDEN_LORA}"], "is the file that is read"),
    ],
)
def test_wrong_flags_are_named(flags, message):
    with pytest.raises(SettingsError, match=message):
        main(flags)


def test_a_header_whose_metadata_are_null_has_none(tmp_path):
    data = GOLDEN_LORA.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]) | {"__metadata__": None}).encode()
    (tmp_path / "old.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    convert(tmp_path / "old.safetensors", tmp_path / "new.safetensors", "comfyui")
    assert set(metadata_of(tmp_path / "new.safetensors")) == {"sshs_model_hash", "sshs_legacy_hash"}


def test_a_folder_that_cannot_be_written_to_is_named_with_its_flag(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match=r"--dst_path: .*file cannot be written to .*give another folder"):
        convert(GOLDEN_LORA, tmp_path / "file" / "new.safetensors", "comfyui")


def test_a_missing_file_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(NetworkError, match=r"old\.safetensors does not exist"):
        convert(tmp_path / "old.safetensors", tmp_path / "new.safetensors", "comfyui")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("start", [[str(SCRIPT)], ["-m", "networks.convert_lumina_lora"]], ids=["script", "module"])
def test_it_starts_from_any_folder_and_as_a_module(start, tmp_path):
    flags = [f"--src_path={GOLDEN_LORA}", f"--dst_path={tmp_path / 'new.safetensors'}", "--dst=diffusers"]
    folder = tmp_path if start[0] != "-m" else ROOT
    done = subprocess.run([sys.executable, *start, *flags], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "names of diffusers" in done.stdout + done.stderr
    done = subprocess.run([sys.executable, *start, "--dst=x"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
