"""Pictures as latents and captions as text features, encoded once, in memory or on disk.

Nothing here knows a model: encoders come in as callables with a fingerprint, a text that differs whenever the encoder
would give other numbers. Work is split over processes; ``gather`` exchanges a list with all of them and is also what
they wait for each other with. Every process asks for the same things in the same order.

The encoder is never waited for and waits for nothing but pictures: threads read ahead of it, and another one fetches what
it gave from the device, one transfer a batch, tests and writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from library.data import images
from library.data.cache_places import CachePlaces
from library.data.config import SubsetConfig
from library.data.content import hash_contents
from library.data.items import Item
from library.data.prefetch import prefetch
from library.data.sharing import Sharing
from library.data.stores import Digest, DiskStore, MemoryStore, Store, digest_of
from library.data.write_behind import WriteBehind
from library.errors import DatasetError

# Part of every digest: raise it when entries are made differently by more than rounding.
_VERSION = 1

# Entries that each process sends at a time: a whole cache at once would need its size twice.
_EXCHANGED_AT_ONCE = 64

# Pixels that are encoded at a time where the user does not say how many pictures: those of one picture of usual size, so
# that a batch never needs more memory than such a picture. More do not make a GPU faster.
_PIXELS_AT_ONCE = 1024 * 1024

EncodePixels = Callable[[torch.Tensor], torch.Tensor]
EncodeCaptions = Callable[[list[str]], Sequence[torch.Tensor]]
LengthOf = Callable[[str], int]
Fingerprint = str | Callable[[tuple[int, int]], str]
"""Of an encoder of pictures: one text, or for each size (width, height) of picture the text of how it encodes that."""
Job = tuple[int, tuple[bool, ...]]
Unreadable = dict[int, str]


class LatentCache:
    """Latents of pictures, bfloat16 (C, h, w), upright and, with flip_aug, mirrored.

    Args:
        places: where entries and content hashes are kept on disk; ``None`` keeps latents in memory.
        image_dirs: the picture folders.
        num_workers: threads that read pictures ahead of the encoder.
    """

    def __init__(self, places: CachePlaces | None, image_dirs: Iterable[Path], num_workers: int) -> None:
        self._places = places
        self._num_workers = num_workers
        self._fingerprint: Fingerprint = ""
        self._disk = DiskStore("latents", [places.folder(folder) for folder in image_dirs]) if places else None
        self._store: Store = self._disk or MemoryStore()

    def missing(
        self, items: Sequence[Item], fingerprint: Fingerprint, sharing: Sharing
    ) -> tuple[list[Job], Unreadable]:
        """Returns what is to be encoded, as (item index, flips), and the pictures that cannot be read, with the reason.

        Content is hashed where a picture is new or has changed. No encoder is needed.
        """
        self._fingerprint = fingerprint
        self._store.refresh()
        unreadable = hash_contents(items, self._places, sharing, self._num_workers) if self._places else {}
        jobs = []
        for item in items:
            if item.index not in unreadable:
                flips = tuple(flip for flip in _flips(item.subset) if self._digest(item, flip) not in self._store)
                if flips:
                    jobs.append((item.index, flips))
        return sharing.union(jobs), unreadable

    def fill(
        self,
        items: Sequence[Item],
        encode: EncodePixels,
        fingerprint: Fingerprint,
        batch_size: int | None,
        sharing: Sharing,
    ) -> Unreadable:
        """Encodes what is missing and returns the pictures that could not be read, with the reason.

        Args:
            items: all pictures, the same on every process.
            encode: pixels (B, 3, H, W) float32 in [-1, 1] on the CPU -> latents (B, C, h, w) on any device.
            fingerprint: of the encoder.
            batch_size: pictures of one bucket that are encoded at a time; ``None``: as many as together have the
                pixels of one of 1024 x 1024.
            sharing: who shares the work.

        Raises:
            DatasetError: the cache folder cannot be written to, or a latent is not finite.
        """
        jobs, unreadable = self.missing(items, fingerprint, sharing)
        by_index = {item.index: item for item in items}
        if self._disk and self._places and jobs:
            for image_dir in {by_index[index].subset.image_dir for index, _ in jobs}:
                self._disk.check_writable(self._places.folder(image_dir))
        chunks = _chunks_of_one_bucket(jobs, by_index, batch_size, _even_share(jobs, sharing))
        mine = sharing.share(chunks)
        made: list[Digest] = []
        failed: Unreadable = {}
        with sharing.bar(len(jobs), "Caching latents", "picture") as bar, WriteBehind() as writer:
            for chunk in prefetch(mine, lambda chunk: _decode(chunk, by_index), self._num_workers):
                failed |= {index: result for index, _, result in chunk if isinstance(result, str)}
                pixels = [
                    (by_index[index], flip, result.flip(-1) if flip else result)
                    for index, flips, result in chunk
                    if not isinstance(result, str)
                    for flip in flips
                ]
                for start in range(0, len(pixels), len(chunk)):
                    batch = pixels[start : start + len(chunk)]
                    with torch.no_grad():
                        latents = encode(torch.stack([tensor for _, _, tensor in batch]))
                    writer.submit(self._keep, [(item, flip) for item, flip, _ in batch], latents, made)
                bar.update(len(chunk))
        exchange(self._store, made, sharing)
        unreadable |= dict(sharing.union(failed.items()))
        for index, flips in jobs:
            if index not in unreadable and any(
                self._digest(by_index[index], flip) not in self._store for flip in flips
            ):
                raise not_shared()
        return unreadable

    def get(self, item: Item, flip: bool) -> torch.Tensor:
        """Returns the latent (C, h, w) bfloat16 of a picture; ``fill`` or ``missing`` came before."""
        return self._store.get(self._digest(item, flip))

    def _keep(self, batch: list[tuple[Item, bool]], latents: torch.Tensor, made: list[Digest]) -> None:
        """Keeps the latents (B, C, h, w) of a batch and adds their names to ``made``."""
        latents = latents.detach().cpu()
        finite = torch.isfinite(latents).flatten(1).all(dim=1).tolist()
        for (item, flip), latent, good in zip(batch, latents, finite, strict=True):
            if not good:
                raise DatasetError(
                    f"Encoding {item.path} gave numbers that are not finite; run the autoencoder in float32 "
                    "(--no_half_vae), or leave the picture out."
                )
            digest = self._digest(item, flip)
            self._store.put(digest, latent, self._places.folder(item.subset.image_dir) if self._places else None)
            made.append(digest)

    def _digest(self, item: Item, flip: bool) -> Digest:
        made_by = self._fingerprint if isinstance(self._fingerprint, str) else self._fingerprint(item.bucket_px)
        if self._places is None:
            return digest_of("latents in memory", item.index, flip, made_by)
        content = self._places.index(item.subset.image_dir).hash_of(item.name)
        method = images.resize_method(item.subset.resize_interpolation, item.size_px, item.resized_px)
        pixels = (
            images.PIXELS_VERSION,
            content.hex() if content else "",
            item.resized_px,
            item.bucket_px,
            method,
            flip,
        )
        return digest_of("latents", _VERSION, pixels, made_by)


class TextCache:
    """Text features of final captions, bfloat16 (L, D), of real tokens only.

    Args:
        folders: cache folders on disk; ``None`` keeps features in memory.
    """

    def __init__(self, folders: Sequence[Path] | None) -> None:
        self._fingerprint = ""
        self._disk = DiskStore("text", folders) if folders else None
        self._store: Store = self._disk or MemoryStore()

    def look_again(self, fingerprint: str) -> None:
        """Looks which entries there are; from now on they are those of this encoder."""
        self._fingerprint = fingerprint
        self._store.refresh()

    def without_known(self, captions: Iterable[tuple[str, Path]]) -> dict[str, Path]:
        """Returns the captions that are not encoded yet, each with the first folder it came with."""
        missing: dict[str, Path] = {}
        for caption, folder in captions:
            if caption not in missing and self._digest(caption) not in self._store:
                missing[caption] = folder
        return missing

    def missing(self, captions: Iterable[str], fingerprint: str, sharing: Sharing) -> list[str]:
        """Returns the captions that are not encoded yet, sorted; no encoder is needed."""
        self.look_again(fingerprint)
        return sharing.union(caption for caption in set(captions) if self._digest(caption) not in self._store)

    def fill(
        self,
        captions: Mapping[str, Path | None],
        encode: EncodeCaptions,
        fingerprint: str,
        batch_size: int,
        sharing: Sharing,
        what: str = "text features",
        length_of: LengthOf = len,
    ) -> None:
        """Encodes the captions that are missing.

        Args:
            captions: each with the cache folder that it goes to (``None``: the first), the same on every process.
            encode: texts -> one (L_i, D) tensor each, on any device.
            fingerprint: of the encoder, with everything that it adds to a caption.
            batch_size: captions that are encoded at a time.
            sharing: who shares the work.
            what: is encoded, for the progress bar.
            length_of: grows with what a caption takes; those of like length are encoded together.

        Raises:
            DatasetError: the cache folder cannot be written to, or a feature is not finite.
        """
        missing = self.missing(captions, fingerprint, sharing)
        if self._disk and missing:
            for folder in {captions.get(caption) for caption in missing}:
                self._disk.check_writable(folder)
        # Of like length, so that little is padded; the longest first, so that too little memory shows at once.
        ordered = sorted(missing, key=lambda caption: (-length_of(caption), caption))
        size = min(batch_size, _even_share(ordered, sharing))
        mine = sharing.share([ordered[start : start + size] for start in range(0, len(ordered), size)])
        made: list[Digest] = []
        with sharing.bar(len(missing), f"Caching {what}", "caption") as bar, WriteBehind() as writer:
            for chunk in mine:
                with torch.no_grad():
                    features = encode(chunk)
                writer.submit(self._keep, [(caption, captions.get(caption)) for caption in chunk], features, made)
                bar.update(len(chunk))
        exchange(self._store, made, sharing)
        if any(self._digest(caption) not in self._store for caption in missing):
            raise not_shared()

    def _keep(self, batch: list[tuple[str, Path | None]], features: Sequence[torch.Tensor], made: list[Digest]) -> None:
        """Keeps the features (L_i, D) of captions in their folders and adds their names to ``made``."""
        lengths = [len(feature) for feature in features]
        joined = torch.cat([feature.detach() for feature in features]).cpu()
        finite = torch.isfinite(joined).all(dim=1)
        parts = zip(batch, joined.split(lengths), finite.split(lengths), strict=True)
        for (caption, folder), feature, good in parts:
            if not bool(good.all()):
                raise DatasetError(f"Encoding the caption {caption!r} gave numbers that are not finite.")
            digest = self._digest(caption)
            self._store.put(digest, feature, folder)
            made.append(digest)

    def get(self, caption: str) -> torch.Tensor:
        """Returns the features (L, D) bfloat16 of a caption; ``fill`` or ``missing`` came before."""
        return self._store.get(self._digest(caption))

    def _digest(self, caption: str) -> Digest:
        return digest_of("text", _VERSION, caption, self._fingerprint)


def _even_share(work: Sequence, sharing: Sharing) -> int:
    """Returns the largest batch that leaves no process without work; 1 at least."""
    return max(1, -(-len(work) // sharing.count))


def _flips(subset: SubsetConfig) -> tuple[bool, ...]:
    return (False, True) if subset.flip_aug else (False,)


def _chunks_of_one_bucket(
    jobs: list[Job], by_index: Mapping[int, Item], size: int | None, limit: int
) -> list[list[Job]]:
    """Returns the jobs in lists of pictures of one bucket, up to ``size`` and ``limit``; large ones first: memory shows at
    once."""

    def order(job: Job) -> tuple[int, tuple[int, int], int]:
        width, height = by_index[job[0]].bucket_px
        return -width * height, (width, height), job[0]

    chunks: list[list[Job]] = []
    for job in sorted(jobs, key=order):
        width, height = by_index[job[0]].bucket_px
        most = min(limit, size or max(1, _PIXELS_AT_ONCE // (width * height)))
        fits = chunks and len(chunks[-1]) < most
        if fits and by_index[chunks[-1][0][0]].bucket_px == (width, height):
            chunks[-1].append(job)
        else:
            chunks.append([job])
    return chunks


def _decode(chunk: list[Job], by_index: Mapping[int, Item]) -> list[tuple[int, tuple[bool, ...], torch.Tensor | str]]:
    """Returns each job with its pixels (3, H, W), or with what is wrong with the file."""
    decoded: list[tuple[int, tuple[bool, ...], torch.Tensor | str]] = []
    for index, flips in chunk:
        item = by_index[index]
        try:
            pixels = images.load_pixels(item.path, item.placement, item.subset.resize_interpolation)
            decoded.append((index, flips, pixels))
        except images.BROKEN_PICTURE as error:
            decoded.append((index, flips, images.reason(error)))
    return decoded


def exchange(store: Store, made: list[Digest], sharing: Sharing) -> None:
    """Gives every process the entries of all others, some at a time; on disk this only waits until all are written."""
    longest = max(part[0] for part in sharing.gather([len(made)]))
    for start in range(0, max(longest, 1), _EXCHANGED_AT_ONCE):
        parts = sharing.gather(store.export(made[start : start + _EXCHANGED_AT_ONCE]))
        for rank, part in enumerate(parts):
            if rank != sharing.rank:
                for digest, tensor in part:
                    store.put(digest, tensor, None)
    store.refresh()


def not_shared() -> DatasetError:
    return DatasetError(
        "What one process cached on disk is not seen by another; all processes need the same folder: give one that "
        "they share with --cache_dir, or cache in memory."
    )
