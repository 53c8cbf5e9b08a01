"""What a file says about itself, against an example recorded from sd-scripts."""

import hashlib
import json
from pathlib import Path

import pytest

from library.errors import SettingsError
from library.training.arguments import parse_arguments
from library.training.metadata import FileHashes, RunFacts, RunMetadata, thumbnail_url

GOLDEN = Path(__file__).parents[2] / "golden"
EXAMPLE = json.loads((GOLDEN / "lora_metadata_example.json").read_text(encoding="utf-8"))
# These two are added by the network when it writes the file, because they are hashes over its tensors.
BY_NETWORK = {"sshs_legacy_hash", "sshs_model_hash"}
ARGV = [
    "--pretrained_model_name_or_path=tiny_dit.safetensors",
    "--train_data_dir=small",
    "--resolution=256",
    "--output_dir=out",
    "--output_name=example",
    "--network_module=networks.lora_lumina",
    "--network_dim=8",
    "--network_alpha=8",
    "--learning_rate=1e-4",
    "--max_train_epochs=2",
    "--timestep_sampling=nextdit_shift",
    "--cache_latents",
    "--seed=42",
]
DATASET = {name: json.loads(EXAMPLE[f"ss_{name}"]) for name in ("datasets", "tag_frequency", "dataset_dirs")} | {
    "num_train_images": 20,
    "num_reg_images": 0,
    "num_validation_images": 0,
}


def metadata(*more: str, hashes: FileHashes | None = None) -> RunMetadata:
    config = parse_arguments([*ARGV, *more])
    assert config is not None
    facts = RunFacts(
        seed=42,
        network_dim=8,
        network_alpha=8.0,
        num_steps=20,
        num_epochs=2,
        num_batches_per_epoch=10,
        optimizer="torch.optim.adamw.AdamW",
        dataset=DATASET,
        resolution_px=(256, 256),
        of_model={
            "sd_model_name": "tiny_dit.safetensors",
            "gemma2_name": "g",
            "ae_name": "a",
            "system_prompt": None,
        },
    )
    return RunMetadata(config, facts, hashes)


@pytest.fixture
def base_model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny_dit.safetensors"
    path.write_bytes(bytes(range(256)) * 8192)  # 2 MiB, so that the short hash's range is inside
    return path


def test_entries_are_sd_scripts(base_model: Path) -> None:
    found = metadata(hashes=FileHashes({"sd_model": base_model, "gemma2": base_model, "ae": base_model})).at(
        step=20, epoch=2
    )
    # defect 60
    known_differences = {"modelspec.prediction_type"}  # "epsilon" is wrong for a flow model
    assert set(EXAMPLE) - set(found) == BY_NETWORK | known_differences
    ours = {"ss_system_prompt", "ss_gemma2_max_token_length", "ss_gemma2_name", "ss_ae_name"}
    ours |= {"ss_gemma2_hash", "ss_ae_hash", "ss_fp8_fast", "ss_nf4_base"}
    assert set(found) - set(EXAMPLE) == ours
    vary = {"session_id", "training_started_at", "training_finished_at", "sd_model_hash", "new_sd_model_hash"}
    vary |= {"sd_scripts_commit_hash"}
    for name in set(EXAMPLE) & set(found):
        if name.startswith("ss_") and name.removeprefix("ss_") not in vary:
            assert found[name] == EXAMPLE[name], name
    assert found["modelspec.resolution"] == "256x256"
    assert all(isinstance(value, str) for value in found.values())


def test_hashes_of_the_base_model(base_model: Path) -> None:
    found = metadata(hashes=FileHashes({"sd_model": base_model, "gemma2": base_model, "ae": base_model})).at(1, 0)
    data = base_model.read_bytes()
    assert found["ss_new_sd_model_hash"] == hashlib.sha256(data).hexdigest()
    assert found["ss_sd_model_hash"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]


def test_hashes_of_the_other_models(base_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "gemma2").write_bytes(b"small")
    files = {"sd_model": base_model, "gemma2": tmp_path / "gemma2", "ae": tmp_path / "gone"}
    found = metadata(hashes=FileHashes(files)).at(1, 0)
    assert found["ss_gemma2_hash"] == hashlib.sha256(b"small").hexdigest()
    assert "ss_ae_hash" not in found  # the others are there all the same
    assert found["ss_new_sd_model_hash"] == hashlib.sha256(base_model.read_bytes()).hexdigest()
    assert "gone" in caplog.text


def test_validation_is_recorded() -> None:
    flags = ["--validation_split=0.25", "--validation_seed=3", "--max_validation_steps=7", "--validate_every_n_steps=5"]
    found = metadata(*flags).at(1, 0)
    assert found["ss_validation_split"] == "0.25"
    assert found["ss_validation_seed"] == "3"
    assert found["ss_max_validation_steps"] == "7"
    assert found["ss_validate_every_n_steps"] == "5"
    assert found["ss_validate_every_n_epochs"] == "None"


def test_network_arguments_and_modelspec() -> None:
    flags = ["--network_dropout=0.1", "--min_timestep=100", "--metadata_author=me", "--network_args", "attn_dim=4"]
    found = metadata(*flags).at(1, 0)
    assert json.loads(found["ss_network_args"]) == {"attn_dim": "4", "dropout": "0.1"}
    assert found["modelspec.timestep_range"] == "100,1000"
    assert found["modelspec.author"] == "me"
    assert found["modelspec.title"] == "example"
    assert found["ss_epoch"] == "0"
    assert found["ss_steps"] == "1"


def test_no_metadata_keeps_what_loaders_need() -> None:
    found = metadata("--no_metadata", "--network_args", "attn_dim=4").at(1, 0)
    kept = {name for name in found if not name.startswith("modelspec.")}
    assert kept == {
        "ss_v2",
        "ss_base_model_version",
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_args",
    }


def test_thumbnail(tmp_path: Path) -> None:
    (tmp_path / "t.png").write_bytes(b"abc")
    assert thumbnail_url(str(tmp_path / "t.png")) == "data:image/png;base64,YWJj"
    assert thumbnail_url("data:x") == "data:x"
    with pytest.raises(SettingsError, match="--metadata_thumbnail"):
        metadata(f"--metadata_thumbnail={tmp_path / 'missing.png'}")
