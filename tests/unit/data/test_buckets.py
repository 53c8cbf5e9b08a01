import json
from pathlib import Path

import pytest

from library.data.buckets import BucketChooser, bucket_sizes
from library.data.config import DatasetConfig

CASES = json.loads((Path(__file__).parents[2] / "golden" / "buckets.json").read_text(encoding="utf-8"))


def _config(case: dict) -> DatasetConfig:
    return DatasetConfig(
        resolution=tuple(case["resolution"]),
        enable_bucket=True,
        min_bucket_reso=case["min_bucket_reso"] or 256,
        max_bucket_reso=case["max_bucket_reso"] or 1024,
        bucket_reso_steps=case["step"],
        bucket_no_upscale=case["no_upscale"],
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['resolution']}-{case['step']}-{case['no_upscale']}")
def test_every_recorded_choice(case: dict) -> None:
    chooser = BucketChooser(_config(case))
    if case["predefined"] is not None:
        assert chooser.sizes == [tuple(size) for size in case["predefined"]]
    assert case["rows"]
    for width, height, *expected in case["rows"]:
        placement = chooser.place(width, height)
        assert placement is not None
        assert [*placement.bucket_px, *placement.resized_px] == expected, (width, height)


def test_the_resized_picture_covers_its_bucket_in_every_mode() -> None:
    configs = [_config(case) for case in CASES]
    configs.append(DatasetConfig(resolution=(512, 256)))
    for config in configs:
        chooser = BucketChooser(config)
        for width in range(70, 3000, 173):
            for height in range(70, 3000, 191):
                placement = chooser.place(width, height)
                if placement is None:
                    assert config.bucket_no_upscale
                    continue
                assert placement.resized_px[0] >= placement.bucket_px[0]
                assert placement.resized_px[1] >= placement.bucket_px[1]
                assert all(side % config.bucket_reso_steps == 0 for side in placement.bucket_px)


def test_steps_of_16_give_sides_that_are_multiples_of_16() -> None:
    # defect 7
    sizes = bucket_sizes((256, 256), 128, 512, 16)
    assert (256, 256) in sizes
    assert any(width % 64 for width, _ in sizes)
    assert all(width % 16 == 0 and height % 16 == 0 and width * height <= 256 * 256 for width, height in sizes)


def test_without_buckets_every_picture_covers_the_one_size() -> None:
    chooser = BucketChooser(DatasetConfig(resolution=(128, 64)))
    wide = chooser.place(400, 100)
    tall = chooser.place(100, 400)
    assert wide is not None
    assert tall is not None
    assert (wide.resized_px, wide.bucket_px) == ((256, 64), (128, 64))
    assert (tall.resized_px, tall.bucket_px) == ((128, 512), (128, 64))


@pytest.mark.parametrize("size", [(40, 300), (300, 40), (6000, 50), (63, 64)])
def test_no_upscale_says_none_where_a_side_is_below_the_step(size: tuple[int, int]) -> None:
    # defect 43
    config = DatasetConfig(resolution=(256, 256), enable_bucket=True, bucket_no_upscale=True, bucket_reso_steps=64)
    assert BucketChooser(config).place(*size) is None


def test_a_tie_goes_to_the_first_bucket_in_sorted_order() -> None:
    config = DatasetConfig((64, 64), enable_bucket=True, min_bucket_reso=16, max_bucket_reso=256, bucket_reso_steps=16)
    chooser = BucketChooser(config)
    for width in range(20, 400, 7):
        for height in range(20, 400, 11):
            if (width, height) in chooser.sizes:
                continue
            # The reference's rule, written the slow way.
            expected = min(chooser.sizes, key=lambda size: abs(size[0] / size[1] - width / height))
            placement = chooser.place(width, height)
            assert placement is not None
            assert placement.bucket_px == expected
