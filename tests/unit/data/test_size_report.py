"""Pictures that are made smaller than asked, or enlarged: told once a dataset, with the worst and the remedy."""

from pathlib import Path
from typing import Any

import pytest

from library.data.buckets import BucketChooser, Size
from library.data.config import DatasetConfig, SubsetConfig
from library.data.items import Item
from library.data.size_report import warn_of_sizes

SUBSET = SubsetConfig(image_dir=Path("pictures"))
SHRUNK, ENLARGED = "smaller than the resolution asks", "enlarged more than"


def _said(caplog: pytest.LogCaptureFixture, sizes: list[Size], **changes: Any) -> list[str]:
    caplog.clear()
    config = DatasetConfig(**{"resolution": (1024, 1024), "enable_bucket": True, **changes})
    items = []
    for index, size in enumerate(sizes):
        placement = BucketChooser(config).place(*size)
        assert placement is not None
        items.append(Item(index, f"{index}.png", size, placement, "", SUBSET, 0))
    warn_of_sizes([config], items)
    return caplog.messages


def test_a_limit_that_makes_pictures_smaller(caplog: pytest.LogCaptureFixture) -> None:
    sizes = [(1024, 1024), (832, 1216), (1216, 832), (3000, 1500)]
    assert _said(caplog, sizes) == [
        "Dataset 1: 3 of 4 pictures are made smaller than the resolution asks, because max_bucket_reso is 1024: 3.png"
        " (3000x1500) becomes 1024x512 instead of 1408x704, 0.53 of the area; max_bucket_reso 1408 is enough for all of them"
    ]
    assert _said(caplog, sizes[:3])[0].endswith(
        "1.png (832x1216) becomes 704x1024 instead of 832x1216, 0.71 of the area; max_bucket_reso 1216 is enough for all of"
        " them"
    )
    assert _said(caplog, sizes, max_bucket_reso=1408) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"bucket_no_upscale": True},
        {"enable_bucket": False},
        {"max_bucket_reso": 2048},
        {"resolution": (512, 512)},
    ],
)
def test_where_the_limit_takes_nothing(changes: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    assert _said(caplog, [(1024, 1024), (832, 1216), (1216, 832), (1500, 1200)], **changes) == []


def test_what_is_enlarged_all_the_same_is_not_made_smaller(caplog: pytest.LogCaptureFixture) -> None:
    assert _said(caplog, [(500, 800)]) == []
    assert [ENLARGED in each for each in _said(caplog, [(250, 400)])] == [True]


def test_a_picture_that_is_hardly_larger_than_its_bucket_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert _said(caplog, [(1050, 600)]) == []  # becomes 1024x576; without the limit it would be enlarged to 1280x768
    assert [SHRUNK in each for each in _said(caplog, [(1200, 700)])] == [True]


def test_pictures_that_are_enlarged_much(caplog: pytest.LogCaptureFixture) -> None:
    sizes = [(1024, 1024), (683, 683), (682, 682), (256, 256)]
    expected = (
        "Dataset 1: 2 of 4 pictures are enlarged more than 1.5 times and so trained blurred: 3.png (256x256) becomes"
        " 1024x1024, 4.0 times; take larger pictures, a lower resolution, or"
    )
    assert _said(caplog, sizes) == [f"{expected} bucket_no_upscale"]
    assert _said(caplog, sizes, enable_bucket=False) == [f"{expected} enable_bucket with bucket_no_upscale"]
    assert _said(caplog, sizes, bucket_no_upscale=True) == []


def test_each_dataset_has_its_own_lines(caplog: pytest.LogCaptureFixture) -> None:
    configs = [DatasetConfig((side, side), enable_bucket=True) for side in (512, 1024)]
    items = []
    for number, config in enumerate(configs):
        placement = BucketChooser(config).place(600, 600)
        assert placement is not None
        items.append(Item(number, "a.png", (600, 600), placement, "", SUBSET, number))
    warn_of_sizes(configs, items)
    assert [message.split(" are ")[0] for message in caplog.messages] == ["Dataset 2: 1 of 1 pictures"]
