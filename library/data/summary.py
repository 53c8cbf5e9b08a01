"""What a run's log and a LoRA's metadata say of the data, as plain dicts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from library.data.config import DatasetConfig, SubsetConfig
from library.data.dataset import TrainingData
from library.data.items import Item


def dataset_summaries(data: TrainingData) -> list[dict[str, Any]]:
    """Returns one dict per dataset with the entries of sd-scripts' ``ss_datasets``.

    ``num_train_images`` and bucket counts include repeats; ``img_count`` does not.
    """
    return [
        _dataset_summary(config, [item for item in data.items if item.dataset_index == index])
        for index, config in enumerate(data.datasets)
    ]


def tag_frequency(items: Iterable[Item]) -> dict[str, dict[str, int]]:
    """Returns per picture folder (its name) how many captions hold each tag: split on commas, stripped, lower case.

    A folder that several datasets use is counted once.
    """
    counts: dict[str, dict[str, int]] = {}
    first_use: dict[str, int] = {}
    for item in items:
        name = item.subset.image_dir.name
        if first_use.setdefault(name, item.dataset_index) != item.dataset_index:
            continue
        tags = counts.setdefault(name, {})
        for part in item.caption.split(","):
            tag = part.strip().lower()
            if tag:
                tags[tag] = tags.get(tag, 0) + 1
    return counts


def dataset_dirs(data: TrainingData) -> dict[str, dict[str, int]]:
    """Returns ``{folder name: {"n_repeats", "img_count"}}``; a name that occurs again gets `` (2)`` and so on."""
    counts = _pictures_per_subset(data.items)
    dirs: dict[str, dict[str, int]] = {}
    for index, config in enumerate(data.datasets):
        for subset in config.subsets:
            name, number = subset.image_dir.name, 2
            while name in dirs:
                name, number = f"{subset.image_dir.name} ({number})", number + 1
            dirs[name] = {"n_repeats": subset.num_repeats, "img_count": counts.get((index, id(subset)), 0)}
    return dirs


def bucket_info(items: Sequence[Item]) -> dict[str, Any]:
    """Returns the buckets that are used with the showings in each, and the mean aspect-ratio error of the pictures."""
    counts: dict[tuple[int, int], int] = {}
    for item in items:
        counts[item.bucket_px] = counts.get(item.bucket_px, 0) + item.num_repeats
    buckets = {
        str(number): {"resolution": list(bucket), "count": counts[bucket]}
        for number, bucket in enumerate(sorted(counts))
    }
    showings = sum(counts.values())
    error = sum(abs(item.placement.aspect_error) * item.num_repeats for item in items)
    return {"buckets": buckets, "mean_img_ar_error": error / showings if showings else 0.0}


def summary_lines(data: TrainingData) -> list[str]:
    """Returns what the log says before the first step, one line per dataset and folder."""
    lines = []
    for number, summary in enumerate(dataset_summaries(data)):
        info = summary["bucket_info"]
        sizes = ", ".join(
            f"{width}x{height}: {bucket['count']}"
            for bucket in info["buckets"].values()
            for width, height in [bucket["resolution"]]
        )
        lines.append(
            f"Dataset {number + 1}: {sum(subset['img_count'] for subset in summary['subsets'])} pictures, "
            f"{summary['num_train_images']} with repeats, batch size {summary['batch_size_per_device']}; "
            f"{'buckets' if summary['enable_bucket'] else 'size'} {sizes}"
        )
        if summary["enable_bucket"]:
            lines[-1] += f" (mean aspect error {info['mean_img_ar_error']:.3f})"
        lines += [
            f"  {subset['image_dir']}: {subset['img_count']} pictures x {subset['num_repeats']}"
            for subset in summary["subsets"]
        ]
    return lines


def _pictures_per_subset(items: Iterable[Item]) -> dict[tuple[int, int], int]:
    counts: dict[tuple[int, int], int] = {}
    for item in items:
        # Two subsets may be equal in value, so they are told apart by identity.
        key = (item.dataset_index, id(item.subset))
        counts[key] = counts.get(key, 0) + 1
    return counts


def _dataset_summary(config: DatasetConfig, items: list[Item]) -> dict[str, Any]:
    counts: dict[int, int] = {}
    for item in items:
        counts[id(item.subset)] = counts.get(id(item.subset), 0) + 1
    return {
        "is_dreambooth": True,
        "batch_size_per_device": config.batch_size,
        "num_train_images": sum(item.num_repeats for item in items),
        "num_reg_images": 0,
        "resolution": list(config.resolution),
        "enable_bucket": config.enable_bucket,
        "bucket_no_upscale": config.bucket_no_upscale,
        "min_bucket_reso": config.min_bucket_reso,
        "max_bucket_reso": config.max_bucket_reso,
        "tag_frequency": tag_frequency(items),
        "bucket_info": bucket_info(items),
        "subsets": [_subset_summary(subset, counts.get(id(subset), 0)) for subset in config.subsets],
    }


def _subset_summary(subset: SubsetConfig, img_count: int) -> dict[str, Any]:
    return {
        "img_count": img_count,
        "num_repeats": subset.num_repeats,
        "color_aug": subset.color_aug,
        "flip_aug": subset.flip_aug,
        "random_crop": subset.random_crop,
        "shuffle_caption": subset.shuffle_caption,
        "keep_tokens": subset.keep_tokens,
        "keep_tokens_separator": subset.keep_tokens_separator,
        "secondary_separator": subset.secondary_separator,
        "enable_wildcard": subset.enable_wildcard,
        "caption_prefix": subset.caption_prefix,
        "caption_suffix": subset.caption_suffix,
        "resize_interpolation": subset.resize_interpolation,
        "image_dir": subset.image_dir.name,
        "class_tokens": subset.class_tokens,
        "is_reg": False,
    }
