"""What a run's log and a LoRA's metadata say of the data, as plain dicts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from library.data.config import DatasetConfig, SubsetConfig
from library.data.dataset import TrainingData
from library.data.items import Item


def dataset_summaries(data: TrainingData, with_tags: bool = True) -> list[dict[str, Any]]:
    """Returns one dict per dataset with the entries of sd-scripts' ``ss_datasets``, ``tag_frequency`` where it is asked for.

    ``num_train_images``, ``num_reg_images`` and bucket counts include repeats; ``img_count`` does not. Held-out pictures are
    in none of them.
    """
    of_dataset: list[list[Item]] = [[] for _ in data.datasets]
    for item in data.items:
        of_dataset[item.dataset_index].append(item)
    return [_dataset_summary(config, items, with_tags) for config, items in zip(data.datasets, of_dataset, strict=True)]


def source_name(subset: SubsetConfig) -> str:
    """Returns what sd-scripts calls a subset in metadata: the name of its metadata file, else of its folder."""
    return (subset.metadata_file or subset.image_dir).name


def tag_frequency(items: Iterable[Item]) -> dict[str, dict[str, int]]:
    """Returns per folder or metadata file (its name) how many captions hold each tag.

    Tags are split on commas, stripped, and in lower case. A folder that several datasets use is counted once.
    """
    counts: dict[str, dict[str, int]] = {}
    first_use: dict[str, int] = {}
    names: dict[int, str] = {}
    for item in items:
        name = names.get(id(item.subset)) or names.setdefault(id(item.subset), source_name(item.subset))
        if first_use.setdefault(name, item.dataset_index) != item.dataset_index:
            continue
        tags = counts.setdefault(name, {})
        for part in item.caption.split(","):
            tag = part.strip().lower()
            if tag:
                tags[tag] = tags.get(tag, 0) + 1
    return counts


def dataset_dirs(data: TrainingData, is_reg: bool = False) -> dict[str, dict[str, int]]:
    """Returns ``{folder name: {"n_repeats", "img_count"}}``; a name that occurs again gets `` (2)`` and so on.

    Args:
        data: what is trained on.
        is_reg: of the regularisation folders instead of the others.
    """
    counts = _pictures_per_subset(data.items)
    dirs: dict[str, dict[str, int]] = {}
    for index, config in enumerate(data.datasets):
        for subset in config.subsets:
            if bool(subset.is_reg) != is_reg:
                continue
            name, number = source_name(subset), 2
            while name in dirs:
                name, number = f"{source_name(subset)} ({number})", number + 1
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
    for number, (config, summary) in enumerate(
        zip(data.datasets, dataset_summaries(data, with_tags=False), strict=True)
    ):
        info = summary["bucket_info"]
        sizes = ", ".join(
            f"{width}x{height}: {bucket['count']}"
            for bucket in info["buckets"].values()
            for width, height in [bucket["resolution"]]
        )
        regularising = f" and {summary['num_reg_images']} for regularisation" if summary["num_reg_images"] else ""
        lines.append(
            f"Dataset {number + 1}: {sum(subset['img_count'] for subset in summary['subsets'])} pictures, "
            f"{summary['num_train_images']} with repeats{regularising}, batch size {summary['batch_size_per_device']}; "
            f"{'buckets' if summary['enable_bucket'] else 'size'} {sizes}"
        )
        if summary["enable_bucket"]:
            lines[-1] += f" (mean aspect error {info['mean_img_ar_error']:.3f})"
        lines += [_subset_line(subset, found) for subset, found in zip(config.subsets, summary["subsets"], strict=True)]
    if data.validation_items:
        lines.append(f"Validation: {len(data.validation_items)} pictures")
    return lines


def _subset_line(subset: SubsetConfig, summary: dict[str, Any]) -> str:
    if subset.is_reg:
        return f"  {source_name(subset)}: {summary['img_count']} pictures for regularisation"
    attributes = "".join(
        f", {what}"
        for what, given in (
            ("difference output preservation", subset.preserves_output),
            ("masks of its own", subset.conditioning_data_dir),
            ("alpha masks", subset.alpha_mask),
        )
        if given
    )
    return f"  {source_name(subset)}: {summary['img_count']} pictures x {subset.num_repeats}{attributes}"


def _pictures_per_subset(items: Iterable[Item]) -> dict[tuple[int, int], int]:
    counts: dict[tuple[int, int], int] = {}
    for item in items:
        # Two subsets may be equal in value, so they are told apart by identity.
        key = (item.dataset_index, id(item.subset))
        counts[key] = counts.get(key, 0) + 1
    return counts


def _dataset_summary(config: DatasetConfig, items: list[Item], with_tags: bool) -> dict[str, Any]:
    counts: dict[int, int] = {}
    for item in items:
        counts[id(item.subset)] = counts.get(id(item.subset), 0) + 1
    return {
        "is_dreambooth": not any(subset.metadata_file for subset in config.subsets),
        "batch_size_per_device": config.batch_size,
        "num_train_images": sum(item.num_repeats for item in items if not item.subset.is_reg),
        "num_reg_images": sum(item.num_repeats for item in items if item.subset.is_reg),
        "resolution": list(config.resolution),
        "enable_bucket": config.enable_bucket,
        "bucket_no_upscale": config.bucket_no_upscale,
        "min_bucket_reso": config.min_bucket_reso,
        "max_bucket_reso": config.max_bucket_reso,
        **({"tag_frequency": tag_frequency(items)} if with_tags else {}),
        "bucket_info": bucket_info(items),
        "subsets": [_subset_summary(subset, counts.get(id(subset), 0)) for subset in config.subsets],
    }


def _subset_summary(subset: SubsetConfig, img_count: int) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "img_count": img_count,
        "num_repeats": subset.num_repeats,
        **{name: getattr(subset, name) for name in _AS_GIVEN},
        "image_dir": subset.image_dir.name,
        "class_tokens": subset.class_tokens,
        "is_reg": bool(subset.is_reg),
        "alpha_mask": subset.alpha_mask,
    }
    if subset.metadata_file is not None:
        summary["metadata_file"] = subset.metadata_file.name
    if subset.conditioning_data_dir is not None:
        summary["conditioning_data_dir"] = subset.conditioning_data_dir.name
    if subset.join_caption_lines:
        summary["join_caption_lines"] = True
    if subset.face_crop_aug_range is not None:
        summary["face_crop_aug_range"] = list(subset.face_crop_aug_range)
    if subset.custom_attributes:
        summary["custom_attributes"] = dict(subset.custom_attributes)
    if subset.validation_split and not subset.is_reg:
        summary["validation_split"] = subset.validation_split
    return summary


_AS_GIVEN = (
    "color_aug",
    "flip_aug",
    "random_crop",
    "shuffle_caption",
    "keep_tokens",
    "keep_tokens_separator",
    "secondary_separator",
    "enable_wildcard",
    "caption_prefix",
    "caption_suffix",
    "resize_interpolation",
)
