"""Which caption every showing of a run has, and the list of all of them, known before the first step.

Pictures with captions that stay the same have one. Shuffled and chosen captions are drawn anew for each showing, or are
few for each picture (``--caption_variants``). While the number of tags grows (``token_warmup_step``), a caption depends
on the optimizer step of its showing, and so on the plan of the epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from library import keyed_random
from library.data import captions as rules
from library.data.config import SubsetConfig
from library.data.epoch_plan import EpochPlan
from library.data.items import Item


@dataclass(frozen=True)
class Clock:
    """How epochs and global batches become optimizer steps.

    Attributes:
        steps_per_epoch: optimizer steps.
        accumulation: global batches an optimizer step takes.
        num_steps: of the whole run.
        num_processes: that share each global batch, on which the plan of an epoch depends.
    """

    steps_per_epoch: int
    accumulation: int
    num_steps: int
    num_processes: int = 1

    def step_of(self, epoch: int, number: int) -> int:
        """Returns the optimizer steps done before a global batch; epochs count from 1, their batches from 0."""
        return (epoch - 1) * self.steps_per_epoch + number // self.accumulation


def draw_key(seed: int, epoch: int, index: int, repeat: int) -> int:
    """Returns the identity of one showing of a picture."""
    return keyed_random.key("draw", seed, epoch, index, repeat)


class CaptionPlan:
    """The captions of a run.

    Args:
        seed: of the run.
        num_variants: different captions a picture may have; ``None``: one for each showing.
    """

    def __init__(self, seed: int, num_variants: int | None) -> None:
        self.clock: Clock | None = None
        self.num_variants = num_variants
        self._seed = seed

    def caption(self, item: Item, epoch: int, repeat: int, step: int | None) -> str:
        """Returns the final caption of one showing.

        Args:
            item: the picture.
            epoch: counted from 1.
            repeat: which showing of the picture in the epoch, from 0.
            step: optimizer steps done before it; ``None``: as after the warm-up of tags.
        """
        subset = item.subset
        num_steps = self.clock.num_steps if self.clock else 0
        warm_up = rules.warm_up_at(subset, step, num_steps) if self.clock else None
        key = draw_key(self._seed, epoch, item.index, repeat)
        return rules.final_caption(subset, item.caption, epoch, key, warm_up, self._variant(item, epoch, repeat))

    def _variant(self, item: Item, epoch: int, repeat: int) -> int | None:
        """Returns which of its variants a showing has: each in turn, so that all are shown equally often."""
        if self.num_variants is None or not rules.text_varies(item.subset, item.caption):
            return None
        first = keyed_random.key("first caption variant", self._seed, item.index)
        return (first + (epoch - 1) * item.num_repeats + repeat) % self.num_variants

    def listed(
        self, items: Sequence[Item], epochs: Iterable[int], plan_epoch: Callable[[int, int], EpochPlan]
    ) -> Iterator[tuple[Item, str]]:
        """Yields every caption that these epochs use with a picture that uses it, and ``""`` where it can be dropped.

        Captions are yielded again for other pictures and showings; nothing is kept, so that a large dataset needs no
        memory. Only epochs in which the number of tags still grows need their plan.

        Args:
            items: the pictures.
            epochs: counted from 1.
            plan_epoch: (epoch, number of processes) -> plan.
        """
        epochs = sorted(set(epochs))
        by_index = {item.index: item for item in items} if self._grows(items, 1) else {}
        for epoch in epochs:
            if self.clock is None or not self._grows(by_index.values(), epoch):
                break
            plan = plan_epoch(epoch, self.clock.num_processes)
            for number, batch in enumerate(plan.batches):
                step = self.clock.step_of(epoch, number)
                for index, repeat in batch.slots:
                    item = by_index[index]
                    if self._starts_growing(item.subset, epoch):
                        yield item, self.caption(item, epoch, repeat, step)
        full: dict[int, list[int]] = {}  # by subset
        for item in items:
            if id(item.subset) not in full:
                full[id(item.subset)] = [each for each in epochs if not self._starts_growing(item.subset, each)]
                if rules.may_be_empty(item.subset):
                    yield item, ""
            for caption in self._grown(item, full[id(item.subset)]):
                yield item, caption

    def _grown(self, item: Item, epochs: Sequence[int]) -> Iterator[str]:
        """Yields a picture's captions of epochs in which they have all their tags, where chance does not drop them."""
        subset, raw = item.subset, item.caption
        epochs = [epoch for epoch in epochs if not rules.is_dropped_epoch(subset, epoch)]
        if not epochs:
            return
        if not rules.text_varies(subset, raw):
            yield rules.undropped_caption(subset, raw, epochs[0]) or ""
        elif self.num_variants is not None and self.num_variants < len(epochs) * item.num_repeats:
            # There are showings enough for each variant, so which of them shows which does not matter.
            yield from (rules.variant_caption(subset, raw, variant) for variant in range(self.num_variants))
        else:
            for epoch in epochs:
                yield from (self.caption(item, epoch, repeat, None) for repeat in range(item.num_repeats))

    def _grows(self, items: Iterable[Item], epoch: int) -> bool:
        subsets = {id(item.subset): item.subset for item in items}
        return any(self._starts_growing(subset, epoch) for subset in subsets.values())

    def _starts_growing(self, subset: SubsetConfig, epoch: int) -> bool:
        """Tells whether captions still grow when an epoch begins."""
        if self.clock is None:
            return False
        return rules.warm_up_at(subset, self.clock.step_of(epoch, 0), self.clock.num_steps) is not None

    def most(self, items: Iterable[Item], num_epochs: int, num_variants: int | None = None) -> int:
        """Returns how many different captions there can be at most; equal ones of different pictures count twice.

        Args:
            items: the pictures.
            num_epochs: of the run.
            num_variants: instead of the run's own.
        """
        limit = num_variants or self.num_variants
        total = 0
        for item in items:
            growing = 0
            if item.subset.token_warmup_step > 0 and self.clock is not None:
                steps = rules.warm_up_steps(item.subset, self.clock.num_steps)
                growing = min(num_epochs, -(-steps // self.clock.steps_per_epoch))
            showings = (num_epochs - growing) * item.num_repeats
            if rules.text_varies(item.subset, item.caption):
                total += min(limit or showings, showings) + growing * item.num_repeats
            else:
                total += min(1, showings) + growing * item.num_repeats
        return total
