from collections import Counter
from itertools import pairwise

import pytest

from library.data.epoch_plan import EpochPlan, Group, count_batches, make_plan
from library.data.items import Draw

GROUPS = [
    Group(0, (64, 64), 2, [(0, 1), (1, 3), (2, 1)]),
    Group(0, (128, 64), 2, [(3, 2), (4, 1)]),
    Group(1, (64, 64), 3, [(5, 4), (6, 4)]),
]
GROUP_OF = {item: group for group in GROUPS for item, _ in group.members}
EVERY_DRAW = Counter((item, repeat) for group in GROUPS for item, count in group.members for repeat in range(count))


def _draw(item: int, epoch: int, repeat: int) -> Draw:
    return Draw(item, epoch, repeat, "", False, 0)  # type: ignore[arg-type]


def _plan(seed: int = 1, epoch: int = 1, num_processes: int = 1, groups: list[Group] = GROUPS) -> EpochPlan:
    return make_plan(groups, seed, epoch, num_processes, _draw)


def _slots(plan: EpochPlan) -> list[tuple[tuple[int, int], ...]]:
    return [batch.slots for batch in plan.batches]


@pytest.mark.parametrize("num_processes", [1, 2, 3, 8])
@pytest.mark.parametrize("epoch", [1, 2])
def test_each_draw_once_in_batches_of_one_bucket(epoch: int, num_processes: int) -> None:
    plan = _plan(epoch=epoch, num_processes=num_processes)
    assert Counter(slot for slots in _slots(plan) for slot in slots) == EVERY_DRAW
    assert plan.num_draws == EVERY_DRAW.total()
    short = Counter()
    for slots in _slots(plan):
        groups = {id(GROUP_OF[item]) for item, _ in slots}
        assert len(groups) == 1
        group = GROUP_OF[slots[0][0]]
        assert 0 < len(slots) <= group.batch_size * num_processes
        short[groups.pop()] += len(slots) < group.batch_size * num_processes
    assert max(short.values()) <= 1
    assert len(plan) == len(plan.batches) == count_batches(GROUPS, num_processes)


def test_same_seed_same_plan_other_seed_or_epoch_other_plan() -> None:
    assert _slots(_plan()) == _slots(_plan())
    assert _slots(_plan()) == _slots(_plan(groups=GROUPS[::-1]))
    assert _slots(_plan()) != _slots(_plan(epoch=2))
    assert _slots(_plan()) != _slots(_plan(seed=2))


def test_batches_of_all_datasets_are_mixed() -> None:
    many = [Group(index, (64, 64), 1, [(index * 50 + item, 1) for item in range(50)]) for index in range(2)]
    datasets = [slots[0][0] // 50 for slots in _slots(_plan(groups=many))]
    assert 20 < sum(a != b for a, b in pairwise(datasets)) < 80  # 49.5 +- 5 by chance; six of them


def test_two_processes_with_batch_one_see_what_one_process_with_batch_two_sees() -> None:
    def groups(batch_size: int) -> list[Group]:
        return [Group(group.dataset_index, group.bucket_px, batch_size, group.members) for group in GROUPS]

    one = _plan(groups=groups(2), num_processes=1)
    two = _plan(groups=groups(1), num_processes=2)
    assert _slots(one) == _slots(two)
    for whole, shared in zip(one.batches, two.batches, strict=True):
        assert whole.split(0, 1) == shared.split(0, 2) + shared.split(1, 2) == whole.draws


@pytest.mark.parametrize("num_processes", [1, 2, 3, 5])
def test_parts_are_consecutive_and_near_equal(num_processes: int) -> None:
    plan = _plan(num_processes=num_processes)
    for batch in plan.batches:
        parts = [batch.split(rank, num_processes) for rank in range(num_processes)]
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)
        assert sum(parts, ()) == batch.draws


def test_batches_can_be_indexed_and_sliced() -> None:
    plan = _plan()
    assert [batch.slots for batch in plan.batches[1:3]] == _slots(plan)[1:3]
    assert plan.batches[-1].slots == _slots(plan)[-1]
    with pytest.raises(IndexError):
        plan.batches[len(plan)]


def test_draws_carry_item_epoch_and_repeat() -> None:
    batch = _plan(epoch=3).batches[0]
    assert [(draw.item, draw.epoch, draw.repeat) for draw in batch.draws] == [(item, 3, n) for item, n in batch.slots]


def test_a_plan_of_many_draws_is_small() -> None:
    plan = _plan(groups=[Group(0, (64, 64), 4, [(item, 1) for item in range(1000)])])
    # Two 8-byte numbers a draw and one a batch; a list of Draw objects would take 200 bytes a draw.
    num_bytes = sum(len(numbers) * numbers.itemsize for numbers in (plan._items, plan._repeats, plan._starts))
    assert num_bytes < 20 * 1000
