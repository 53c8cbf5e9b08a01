"""docs/sd_scripts_compatibility.md has a row for everything that sd-scripts reads, and is up to date."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from library.data import schema
from library.training.arguments import all_specs
from library.training.legacy_flags import IGNORED, REFUSED

ROOT = Path(__file__).resolve().parents[2]
RECORDED = json.loads((ROOT / "tests" / "golden" / "sd_scripts_flags.json").read_text(encoding="utf-8"))
# Every key that sd-scripts' dataset file may hold.
KEYS = [
    "resolution",
    "batch_size",
    "enable_bucket",
    "min_bucket_reso",
    "max_bucket_reso",
    "bucket_reso_steps",
    "bucket_no_upscale",
    "validation_split",
    "validation_seed",
    "network_multiplier",
    "resize_interpolation",
    "image_dir",
    "is_reg",
    "alpha_mask",
    "class_tokens",
    "caption_extension",
    "cache_info",
    "metadata_file",
    "conditioning_data_dir",
    "num_repeats",
    "shuffle_caption",
    "enable_wildcard",
    "color_aug",
    "flip_aug",
    "random_crop",
    "caption_separator",
    "keep_tokens",
    "keep_tokens_separator",
    "secondary_separator",
    "caption_prefix",
    "caption_suffix",
    "caption_dropout_rate",
    "caption_tag_dropout_rate",
    "caption_dropout_every_n_epochs",
    "token_warmup_min",
    "token_warmup_step",
    "face_crop_aug_range",
    "custom_attributes",
]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    # By path: a package called docs may be installed.
    spec = importlib.util.spec_from_file_location("make_compatibility", ROOT / "docs" / "make_compatibility.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(script: ModuleType) -> None:
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run: python docs/make_compatibility.py"


def test_every_flag_and_key_has_one_row(script: ModuleType) -> None:
    flags = [name for name, *_ in script.flag_rows()]
    assert flags == [flag["dest"] for flag in RECORDED]
    assert len(flags) == len(set(flags)) == 213
    assert sorted(name for name, *_ in script.key_rows()) == sorted(KEYS)
    assert {key.name for key in schema.KEYS.values()} == {*KEYS, "join_caption_lines"}
    assert script.new_keys() == {"join_caption_lines"}


def test_what_is_not_acted_on_says_why(script: ModuleType) -> None:
    rows = {name: (status, text) for name, status, text in script.flag_rows()}
    for specs, status in ((IGNORED, script.NO_EFFECT), (REFUSED, script.REFUSES)):
        for spec in specs:
            assert rows[spec.name] == (status, spec.help)
    assert all(text for status, text in rows.values() if status != script.WORKS)
    assert not any(text for status, text in rows.values() if status == script.WORKS)


def test_no_text_speaks_of_what_does_not_work(script: ModuleType) -> None:
    assert script.unused_texts() == set()


def test_new_flags_are_those_that_the_recorded_list_lacks(script: ModuleType) -> None:
    recorded = {flag["dest"] for flag in RECORDED}
    assert {spec.name for spec in script.new_flags()} == all_specs().keys() - recorded
