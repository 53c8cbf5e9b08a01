"""JSON whose keys are unique."""

import json

import pytest

from library.data.strict_json import load_json
from library.errors import DatasetError


def test_plain_json() -> None:
    assert load_json('{"a": [{"b": 1}, {"b": null}]}', "x") == {"a": [{"b": 1}, {"b": None}]}
    with pytest.raises(json.JSONDecodeError):
        load_json("{", "x")


@pytest.mark.parametrize("text", ['{"b": 1, "b": 1}', '{"a": [{"b": 1, "c": 2, "b": 3}]}'])
def test_a_key_that_stands_twice(text: str) -> None:
    with pytest.raises(DatasetError, match=r"--dataset_config: d\.json: the key 'b' stands twice"):
        load_json(text, "--dataset_config: d.json")


def test_nesting_without_end() -> None:
    with pytest.raises(DatasetError, match=r"d\.json is nested too deeply"):
        load_json("[" * 100_000, "--dataset_config: d.json")
