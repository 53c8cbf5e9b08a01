import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from library.data.settings import DataSettings
from library.errors import SettingsError
from library.settings import specs_of

ROOT = Path(__file__).parents[3]
RECORDED = {
    entry["dest"]: entry
    for entry in json.loads((ROOT / "tests/golden/sd_scripts_flags.json").read_text(encoding="utf-8"))
}
OURS = {"cache_dir", "caption_variants", "join_caption_lines", "normalize_masked_loss"}
PARSED = {"resolution", "face_crop_aug_range", "token_warmup_step"}  # texts there, checked values here
# There 1. Here pictures of one bucket are encoded together as long as they need no more memory than one of 1024 px does.
AUTOMATIC = {"vae_batch_size"}


def test_defaults_and_types_are_the_recorded_ones() -> None:
    kinds = {"int": int, "float": float, "str": str, "Path": Path, None: bool}
    specs = {spec.name: spec for spec in specs_of(DataSettings)}
    assert specs.keys() - RECORDED.keys() == OURS
    for name in specs.keys() - OURS - PARSED:
        recorded, spec = RECORDED[name], specs[name]
        assert spec.default == (None if name in AUTOMATIC else recorded["default"]), name
        assert spec.kind is kinds[recorded["type"]], name
        assert list(spec.choices or ()) == (recorded["choices"] or []), name
    assert specs["caption_extension"].aliases == ("caption_extention",)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("512", (512, 512)),
        ("768,512", (768, 512)),
        (512, (512, 512)),
        ([768, 512], (768, 512)),
        ("768, 512", (768, 512)),
    ],
)
def test_resolution_forms(given: Any, expected: tuple[int, int]) -> None:
    spec = next(spec for spec in specs_of(DataSettings) if spec.name == "resolution")
    assert spec.convert(given, "--resolution") == expected
    assert DataSettings(resolution=given).resolution == expected


@pytest.mark.parametrize("given", ["", "a", "512,", "1,2,3", "0", "-64", "51.5", True, [True, 64], {}])
def test_wrong_resolutions(given: Any) -> None:
    spec = next(spec for spec in specs_of(DataSettings) if spec.name == "resolution")
    with pytest.raises(SettingsError, match="expected a number, or width and height as in 768,512"):
        spec.convert(given, "--resolution")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": (500, 500)}, "--resolution: 500,500 cannot be trained on without buckets"),
        ({"bucket_reso_steps": 24}, "--bucket_reso_steps: 24 is not valid: expected .* multiple of 16"),
        ({"bucket_reso_steps": 0}, "--bucket_reso_steps: 0 is not valid"),
        ({"caption_dropout_rate": 1.5}, "--caption_dropout_rate: 1.5 is not valid: expected a number from 0 to 1"),
        ({"caption_tag_dropout_rate": -0.1}, "--caption_tag_dropout_rate"),
        ({"caption_dropout_every_n_epochs": -1}, "--caption_dropout_every_n_epochs"),
        ({"train_batch_size": 0}, "--train_batch_size: 0 is not valid: expected a whole number, at least 1"),
        ({"dataset_repeats": 0}, "--dataset_repeats"),
        ({"keep_tokens": -1}, "--keep_tokens"),
        ({"vae_batch_size": 0}, "--vae_batch_size"),
        ({"text_encoder_batch_size": 0}, "--text_encoder_batch_size"),
        ({"max_data_loader_n_workers": -1}, "--max_data_loader_n_workers"),
        ({"caption_separator": ""}, "--caption_separator"),
        ({"resize_interpolation": "sharp"}, "--resize_interpolation: 'sharp' is not valid: expected one of lanczos"),
    ],
)
def test_values_out_of_range_name_the_flag(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        DataSettings(**changes)


def test_what_follows_from_other_values() -> None:
    settings = DataSettings(
        caption_extension="txt", cache_latents_to_disk=True, cache_text_encoder_outputs_to_disk=True
    )
    assert settings.caption_extension == ".txt"
    assert settings.cache_latents
    assert settings.cache_text_encoder_outputs
    assert DataSettings(resolution=(500, 500), enable_bucket=True).resolution == (500, 500)
    assert DataSettings(resolution=(500, 500), dataset_config=Path("a.toml")).resolution == (500, 500)


def test_settings_and_dataset_files_need_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    code = (
        "import sys; from pathlib import Path; from library.data.config import load_dataset_config\n"
        "from library.data.settings import DataSettings\n"
        f"load_dataset_config(DataSettings(train_data_dir={str(tmp_path)!r}, resolution=(64, 64)))\n"
        "print([name for name in ('torch', 'PIL', 'numpy', 'tqdm') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
