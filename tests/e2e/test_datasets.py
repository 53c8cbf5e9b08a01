"""All kinds of subsets in one run, through the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_helpers import Job
from PIL import Image
from safetensors import safe_open

from library.errors import DatasetError


def test_every_kind_of_subset_in_one_run(
    job: Job, tmp_path: Path, train: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "general").mkdir()
    Image.new("RGB", (100, 140), (9, 99, 199)).save(tmp_path / "general" / "g.png")
    entries = {f"p{number}": {"caption": "from the metadata", "tags": "x, y"} for number in range(6)}
    (tmp_path / "meta.json").write_text(json.dumps(entries), encoding="utf-8")
    config = tmp_path / "data.toml"
    config.write_text(
        f"[[datasets]]\ncaption_extension = '.txt'\n"
        f"[[datasets.subsets]]\nimage_dir = '{job.pictures.as_posix()}'\nnum_repeats = 2\nvalidation_split = 0.4\n"
        f"custom_attributes = {{ diff_output_preservation = false }}\n"
        f"[[datasets.subsets]]\nmetadata_file = '{(tmp_path / 'meta.json').as_posix()}'\n"
        f"image_dir = '{job.pictures.as_posix()}'\n"
        f"[[datasets.subsets]]\nimage_dir = 'general'\nis_reg = true\n",
        encoding="utf-8",
    )
    flags = ["--max_train_epochs=1", "--prior_loss_weight=0.5", "--cache_latents", "--cache_text_encoder_outputs"]
    train([*job.train_flags(tmp_path / "out", f"--dataset_config={config}"), *flags])
    with safe_open(tmp_path / "out" / "my.safetensors", "pt") as file:
        metadata = file.metadata()
    # Of five pictures two are held out, in both subsets that have them.
    assert metadata["ss_num_validation_images"] == "2"
    assert metadata["ss_num_train_images"] == metadata["ss_num_reg_images"] == "9"
    (dataset,) = json.loads(metadata["ss_datasets"])
    assert [subset["is_reg"] for subset in dataset["subsets"]] == [False, False, True]
    assert dataset["subsets"][1]["metadata_file"] == "meta.json"
    assert dataset["subsets"][0]["custom_attributes"] == {"diff_output_preservation": False}
    assert metadata["ss_prior_loss_weight"] == "0.5"
    assert "meta.json has 1 entries without a picture file, which are left out: p5" in capsys.readouterr().err


def test_empty_data_ends_with_an_error(job: Job, tmp_path: Path, train: Callable[..., None]) -> None:
    # defect 48: a run without a single picture ended with exit code 0 there
    (tmp_path / "meta.json").write_text('{"gone": {"caption": "x"}}', encoding="utf-8")
    flags = [flag for flag in job.train_flags(tmp_path / "out") if not flag.startswith("--train_data_dir")]
    with pytest.raises(DatasetError, match="No picture is left to train on"):
        train([*flags, f"--in_json={tmp_path / 'meta.json'}"])
