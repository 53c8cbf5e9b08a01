"""Which ways of varying a picture go together with what; nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Iterable

UNCACHED = ("color_aug", "random_crop", "face_crop_aug_range")
"""Keys that give a picture other pixels at each showing, so that it cannot be encoded once for all of them."""


def contradiction(given: Iterable[str], cache_latents: bool, enable_bucket: bool, mark: str = "") -> str | None:
    """Returns why the given keys of :data:`UNCACHED` cannot work, and what to do; ``None`` where they can.

    Args:
        given: those that are set.
        cache_latents: whether pictures are encoded once.
        enable_bucket: whether there are several sizes.
        mark: what stands before a name, as the dashes of a flag.
    """
    names = [mark + name for name in UNCACHED if name in set(given)]
    if names and cache_latents:
        give, them = ("gives", "it") if len(names) == 1 else ("give", "them")
        return (
            f"{' and '.join(names)} {give} a picture other pixels at each showing, but cached latents are encoded once;"
            f" train without --cache_latents and --cache_latents_to_disk, or leave {them} out"
        )
    if mark + "face_crop_aug_range" in names and enable_bucket:
        return (
            f"{mark}face_crop_aug_range cuts every picture to one size, but {mark}enable_bucket asks for several; leave"
            " one of them out"
        )
    return None
