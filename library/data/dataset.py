"""Pictures, captions and caches -> batches: what the trainer holds of the data."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from library import keyed_random
from library.data import captions as caption_rules
from library.data import regularisation
from library.data.building import build_items, undecodable
from library.data.cache import EncodeCaptions, EncodePixels, Fingerprint, LatentCache, LengthOf, TextCache
from library.data.cache_places import CachePlaces
from library.data.caption_plan import CaptionPlan, Clock, draw_key
from library.data.config import DatasetConfig, load_dataset_config
from library.data.content import content_of, hash_contents
from library.data.epoch_plan import EpochPlan, Group, Members, count_batches, make_plan
from library.data.findings import warn_unreadable
from library.data.items import Batch, Draw, Item
from library.data.prefetch import prefetch
from library.data.settings import DataSettings
from library.data.sharing import ALONE, Sharing
from library.data.showings import Showings
from library.data.validation_split import Split, asks_for_split, split_by_content
from library.errors import DatasetError

logger = logging.getLogger(__name__)

# Decoded pictures that may wait for the trainer; without the limit large batches would fill the memory.
_WAITING_PIXELS_BYTES = 512 * 2**20

# Captions that are encoded at a time where the user does not say it and batches are small: they need little memory.
_LEAST_CAPTIONS_AT_ONCE = 8


class TrainingData:
    """All datasets of a run.

    Attributes:
        datasets: their settings.
        items: the pictures that are trained on; pictures that turn out to be unreadable while caching disappear.
        validation_items: the pictures that are held out to measure the validation loss on; none of them is in ``items``.
        latents: the latent cache, or ``None`` where pictures are read anew for each batch.
        showings: what a showing of a picture looks like, and what of it counts.
        text: the text cache, or ``None`` where captions are encoded for each batch.
    """

    def __init__(
        self,
        settings: DataSettings,
        seed: int,
        datasets: Sequence[DatasetConfig],
        items: Sequence[Item],
        places: CachePlaces,
        split: Split | None = None,
    ) -> None:
        self.datasets = tuple(datasets)
        self._settings = settings
        self._seed = seed
        self._places = places
        split = split or Split(tuple(items))
        self._all = list(items)
        self._validation_keys = split.keys
        self.items, self.validation_items = split.training, split.validation
        for item in self.validation_items:
            self._all[item.index] = item
        self._dropped: set[int] = set()
        self.caption_plan = CaptionPlan(seed, settings.caption_variants)
        self._set_items()
        image_dirs = [subset.image_dir for config in datasets for subset in config.subsets]
        self.latents: LatentCache | None = None
        self.text: TextCache | None = None
        workers = settings.max_data_loader_n_workers
        if settings.cache_latents:
            self.latents = LatentCache(places if settings.cache_latents_to_disk else None, image_dirs, workers)
        self.showings = Showings(self._all, datasets, settings, places)
        if settings.cache_text_encoder_outputs:
            self.text = self._new_text_cache()

    @classmethod
    def build(
        cls,
        settings: DataSettings,
        seed: int,
        datasets: Sequence[DatasetConfig] | None = None,
        show_progress: bool = True,
        sharing: Sharing | None = None,
    ) -> TrainingData:
        """Returns the datasets that the settings describe; pictures are measured, captions read, validation held out.

        Without cached latents every picture is also decoded once, so that a broken one shows now.

        Args:
            settings: which folders, and how.
            seed: of every random draw.
            datasets: from :func:`load_dataset_config`, where they were read already.
            show_progress: with progress bars; ``sharing`` has its own say.
            sharing: who shares the work, where there are several processes; all of them call this.

        Raises:
            DatasetError: a file or folder is missing or broken, or no picture is left.
        """
        sharing = sharing or Sharing(show_progress=show_progress)
        datasets = load_dataset_config(settings) if datasets is None else datasets
        places = CachePlaces(settings.cache_dir)
        workers = settings.max_data_loader_n_workers
        on_disk = settings.cache_latents_to_disk or settings.cache_text_encoder_outputs_to_disk
        for subset in (subset for config in datasets for subset in config.subsets):
            if on_disk or subset.cache_info:
                places.keep_index(subset.image_dir)
        items = build_items(datasets, places, workers, sharing)
        broken = {} if settings.cache_latents else undecodable(items, workers, sharing)
        split = Split(_left(items, broken))
        if asks_for_split(split.training):
            unhashed = hash_contents(split.training, places, sharing, workers)
            broken |= unhashed
            split = split_by_content(_left(items, broken), lambda item: content_of(item, places), seed)
        data = cls(settings, seed, datasets, items, places, split)
        data._report(broken)
        data.showings.check(data.items, sharing)
        if sharing.rank == 0:
            places.save_indexes()
        return data

    @property
    def num_workers(self) -> int:
        """Threads that read pictures and cached files."""
        return self._settings.max_data_loader_n_workers

    # Which pictures, in which order, with which captions

    def num_batches(self, num_processes: int) -> int:
        """Returns the number of steps of an epoch, that is of global batches."""
        return count_batches(self._groups, num_processes)

    def largest_batch(self) -> tuple[Item, int]:
        """Returns a picture of the bucket whose batches have the most pixels, and how many pictures such a batch has."""

        def size(group: Group) -> int:
            return min(group.batch_size, sum(num_repeats for _, num_repeats in group.members))

        largest = max(self._groups, key=lambda group: (size(group) * math.prod(group.bucket_px), size(group)))
        index, _ = largest.members[0]
        return self._all[index], size(largest)

    def set_clock(self, steps_per_epoch: int, accumulation: int, num_steps: int, num_processes: int = 1) -> None:
        """Tells how global batches become optimizer steps, for captions whose number of tags grows with them."""
        self.caption_plan.clock = Clock(steps_per_epoch, accumulation, num_steps, num_processes)

    def plan_epoch(self, epoch: int, num_processes: int) -> EpochPlan:
        """Returns the global batches of an epoch (counted from 1); a pure function of the seed and the epoch."""
        clock = self.caption_plan.clock
        step_of = functools.partial(clock.step_of, epoch) if clock else None
        return make_plan(self._groups, self._seed, epoch, num_processes, self.draw, step_of)

    def draw(self, index: int, epoch: int, repeat: int, step: int | None = None) -> Draw:
        """Returns one showing of the picture with this index.

        Args:
            index: the picture's.
            epoch: counted from 1.
            repeat: from 0.
            step: optimizer steps done before it; ``None``: after captions have grown to their full length.
        """
        item = self._all[index]
        key = draw_key(self._seed, epoch, index, repeat)
        flip = item.subset.flip_aug and bool(keyed_random.key("flip", key) & 1)
        caption = self.caption_plan.caption(item, epoch, repeat, step)
        return Draw(item, epoch, repeat, caption, flip, key)

    def captions(self, epochs: Iterable[int]) -> Iterator[tuple[str, Path]]:
        """Yields every final caption that these epochs (counted from 1) and validation use, with its cache folder.

        ``""`` is one where captions can be dropped. A caption is yielded again for other pictures and showings.
        """
        for item, caption in self.caption_plan.listed(self.items, epochs, self.plan_epoch):
            yield caption, self._places.folder(item.subset.image_dir)
        for item in self.validation_items:
            yield self.validation_draw(item.index).caption, self._places.folder(item.subset.image_dir)

    def _set_items(self) -> None:
        kept = [item for item in self.items if item.index not in self._dropped]
        self.items = tuple(regularisation.balanced(kept, self._seed))
        for item in self.items:
            self._all[item.index] = item
        self.validation_items = tuple(item for item in self.validation_items if item.index not in self._dropped)
        self._groups = self._groups_of(self.items)

    def _groups_of(self, items: Iterable[Item]) -> list[Group]:
        members: dict[tuple[int, tuple[int, int]], Members] = {}
        for item in items:
            members.setdefault((item.dataset_index, item.bucket_px), Members()).add(item.index, item.num_repeats)
        return [
            Group(dataset, bucket, self.datasets[dataset].batch_size, slots)
            for (dataset, bucket), slots in members.items()
        ]

    def _report(self, broken: dict[int, str]) -> None:
        """Says what was found, once at the start."""
        warn_unreadable([(self._all[index].path, why) for index, why in sorted(broken.items())])
        regularisation.report(self._all, self.items)
        self._check_left(broken)

    def _drop(self, unreadable: dict[int, str]) -> None:
        """Leaves pictures out of the run and says so once."""
        new = {index: why for index, why in sorted(unreadable.items()) if index not in self._dropped}
        if not new:
            return
        warn_unreadable([(self._all[index].path, why) for index, why in new.items()])
        self._dropped.update(new)
        self._set_items()
        self._check_left(new)

    def _check_left(self, broken: dict[int, str]) -> None:
        """Raises ``DatasetError`` where nothing is left to train on."""
        if any(not item.subset.is_reg for item in self.items):
            return
        example = f", for example {self._all[min(broken)].path} ({broken[min(broken)]})" if broken else ""
        others = " (regularisation pictures do not count)" if self.items else ""
        raise DatasetError(f"No picture is left to train on: none can be read{example}{others}.")

    # Validation

    def validation_draw(self, index: int) -> Draw:
        """Returns the one showing of a held-out picture; it depends on the validation seed and the picture alone."""
        item, key = self._all[index], self._validation_keys[index]
        return Draw(item, 0, 0, caption_rules.final_caption(item.subset, item.caption, 1, key), False, key)

    def validation_batches(
        self, rank: int = 0, num_processes: int = 1, max_batches: int | None = None
    ) -> Generator[Batch]:
        """Yields this process's part of each global batch of held-out pictures, always the same in the same order.

        Args:
            rank: this process; its part of a short batch may be empty.
            num_processes: over how many processes each global batch is split.
            max_batches: at most this many global batches.
        """
        # By content, so that other names or another order of the files change nothing.
        items = sorted(self.validation_items, key=lambda item: (item.dataset_index, self._validation_keys[item.index]))
        seed = self._seed if self._settings.validation_seed is None else self._settings.validation_seed
        plan = make_plan(self._groups_of(items), seed, 0, num_processes, lambda index, *_: self.validation_draw(index))
        return self.batches(plan, rank, num_processes, stop=max_batches)

    # Caches

    def fill_latents(self, encode: EncodePixels, fingerprint: Fingerprint, sharing: Sharing = ALONE) -> None:
        """Encodes the pictures that are missing; ones that cannot be read are left out. All processes call it.

        Args:
            encode: pixels (B, 3, H, W) float32 in [-1, 1] on the CPU -> latents (B, C, h, w).
            fingerprint: of the autoencoder.
            sharing: with whom the work is shared.

        Raises:
            DatasetError: nothing can be written, a latent is not finite, or no picture is left.
        """
        if self.latents is not None:
            items = (*self.items, *self.validation_items)
            self._drop(self.latents.fill(items, encode, fingerprint, self._settings.vae_batch_size, sharing))
            self.showings.fill_masks(self.items, sharing)

    def fill_captions(
        self,
        epochs: Iterable[int],
        encode: EncodeCaptions,
        fingerprint: str,
        sharing: Sharing = ALONE,
        length_of: LengthOf = len,
    ) -> None:
        """Encodes every caption that these epochs use and that has no entry yet. All processes call it.

        Captions that have one are not collected: a large dataset with a filled cache needs no memory for its texts.

        Args:
            epochs: counted from 1.
            encode: texts -> one (L_i, D) tensor each.
            fingerprint: of the text encoder with its system prompt and token limit.
            sharing: with whom the work is shared.
            length_of: grows with a caption's number of tokens; those of like length are encoded together.

        Raises:
            DatasetError: nothing can be written, or a feature is not finite.
        """
        if self.text is not None:
            self.text.look_again(fingerprint)
            missing = self.text.without_known(self.captions(epochs))
            self.text.fill(missing, encode, fingerprint, self._text_batch_size, sharing, length_of=length_of)

    def extra_text(
        self,
        texts: Sequence[str],
        encode: EncodeCaptions,
        fingerprint: str,
        sharing: Sharing = ALONE,
        what: str = "texts",
    ) -> list[torch.Tensor]:
        """Returns the features (L_i, D) of texts that belong to no picture, such as sample prompts.

        They are kept where captions' features are, under their own fingerprint. All processes call it.

        Args:
            texts: what to encode.
            encode: texts -> one (L_i, D) tensor each.
            fingerprint: of the text encoder with what it adds to these texts.
            sharing: with whom the work is shared.
            what: they are, for the progress bar.
        """
        cache = self._new_text_cache()
        cache.fill(dict.fromkeys(texts), encode, fingerprint, self._text_batch_size, sharing, what)
        return [cache.get(text) for text in texts]

    @property
    def _text_batch_size(self) -> int:
        given = self._settings.text_encoder_batch_size
        return given or max(_LEAST_CAPTIONS_AT_ONCE, *(config.batch_size for config in self.datasets))

    def _new_text_cache(self) -> TextCache:
        if not self._settings.cache_text_encoder_outputs_to_disk:
            return TextCache(None)
        subsets = (subset for config in self.datasets for subset in config.subsets)
        return TextCache([self._places.folder(subset.image_dir) for subset in subsets])

    # Batches

    def load(self, draws: Sequence[Draw], num_global: int | None = None) -> Batch:
        """Returns the batch of these showings, all of one bucket; may be called from any thread.

        Args:
            draws: may be empty.
            num_global: samples of the step over all processes (default: those given here).

        Raises:
            DatasetError: a picture or a cache file cannot be read.
        """
        latents = pixels = text = None
        if draws and self.latents is not None:
            latents = torch.stack([self.latents.get(draw.item, draw.flip) for draw in draws])
        elif draws:
            pixels = torch.stack([self.showings.pixels(draw) for draw in draws])
        if self.text is not None:
            text = tuple(self.text.get(draw.caption) for draw in draws)
        prior = self._settings.prior_loss_weight
        weights = torch.tensor([prior if draw.item.subset.is_reg else 1.0 for draw in draws], dtype=torch.float32)
        num_global = len(draws) if num_global is None else num_global
        # Validation measures whole pictures.
        masks = self.showings.masks([draw for draw in draws if draw.epoch > 0])
        return Batch(tuple(draws), latents, pixels, text, weights, num_global, masks)

    def batches(
        self,
        plan: EpochPlan,
        rank: int = 0,
        num_processes: int = 1,
        start: int = 0,
        num_workers: int | None = None,
        stop: int | None = None,
    ) -> Generator[Batch]:
        """Yields this process's part of each global batch of a plan, read ahead by threads.

        The threads end when the generator is exhausted, closed or dropped; what goes wrong in them is raised here.

        Args:
            plan: the epoch.
            rank: this process.
            num_processes: over how many processes each global batch is split.
            start: first global batch, for a run that is resumed inside an epoch.
            num_workers: threads (default: ``--max_data_loader_n_workers``; 0 reads without threads).
            stop: global batch before which to end (default: the plan's end).
        """

        def read(number: int) -> Batch:
            batch = plan.batch(number)
            return self.load(batch.split(rank, num_processes), len(batch))

        workers = self._settings.max_data_loader_n_workers if num_workers is None else num_workers
        depth = max(1, min(2 * workers, self._max_waiting()))
        end = len(plan) if stop is None else min(stop, len(plan))
        return prefetch(range(start, end), read, min(workers, depth), depth)

    def _max_waiting(self) -> int:
        """Returns how many batches may wait so that decoded pictures stay within their share of the memory."""
        if self.latents is not None:
            return 64
        groups = [*self._groups, *self._groups_of(self.validation_items)]
        largest = max(group.batch_size * 12 * group.bucket_px[0] * group.bucket_px[1] for group in groups)
        return max(2, _WAITING_PIXELS_BYTES // largest)


def _left(items: Sequence[Item], broken: dict[int, str]) -> tuple[Item, ...]:
    return tuple(item for item in items if item.index not in broken)
