"""Group sampling: a pure function of integers; epochs without replacement; bans; buckets; hosts."""

from collections import Counter

import numpy as np
import pytest

from cocoedit_jax.data.groups import groups_for_step, plan_samples, refill_groups
from cocoedit_jax.errors import UserError


def test_an_epoch_visits_every_record_once():
    steps = [groups_for_step(7, step, 6, 24) for step in range(12)]
    for epoch in range(3):
        seen = np.concatenate(steps[4 * epoch : 4 * epoch + 4])
        assert sorted(seen.tolist()) == list(range(24))
    assert not np.array_equal(np.concatenate(steps[:4]), np.concatenate(steps[4:8]))


def test_records_of_a_step_differ_across_an_epoch_border():
    for step in range(60):
        assert len(set(groups_for_step(0, step, 5, 7).tolist())) == 5


def test_deterministic_and_seeded():
    np.testing.assert_array_equal(groups_for_step(1, 1000, 8, 40000), groups_for_step(1, 1000, 8, 40000))
    assert not np.array_equal(groups_for_step(1, 3, 8, 1000), groups_for_step(2, 3, 8, 1000))


def test_bans_replace_and_do_not_shift():
    banned = {3, 11, 12, 30}
    replaced = 0
    for step in range(40):
        free, under_ban = groups_for_step(5, step, 8, 40), groups_for_step(5, step, 8, 40, banned)
        assert len(set(under_ban.tolist())) == 8 and not banned & set(under_ban.tolist())
        kept = [record for record in free.tolist() if record not in banned]
        assert under_ban.tolist()[: len(kept)] == kept
        replaced += 8 - len(kept)
    assert replaced == 8 * 4  # 40 steps are 8 epochs


def test_few_records_left():
    assert set(groups_for_step(0, 4, 6, 5, {0, 1, 2}).tolist()) == {3, 4}
    assert groups_for_step(0, 0, 3, 1).tolist() == [0, 0, 0]
    with pytest.raises(UserError, match="all 5 records are banned"):
        groups_for_step(0, 4, 6, 5, range(5))


@pytest.mark.parametrize("numbers", [(-1, 1, 1), (0, 0, 1), (0, 1, 0)])
def test_impossible_numbers(numbers):
    with pytest.raises(UserError, match="expected step >= 0"):
        groups_for_step(0, *numbers)


def test_banned_index_out_of_range():
    with pytest.raises(UserError, match=r"banned: .*\[0, 4\)"):
        groups_for_step(0, 0, 2, 4, {9})


def test_one_bucket_per_step_in_proportion():
    buckets = [0] * 32 + [1] * 16 + [2] * 3
    used, seen = Counter(), Counter()
    for step in range(7 * 4):  # 4 + 2 + 1 steps per epoch
        records = groups_for_step(3, step, 8, 51, buckets=buckets)
        labels = {buckets[record] for record in records}
        assert len(labels) == 1
        used[labels.pop()] += 1
        seen.update(records.tolist())
    assert used == {0: 16, 1: 8, 2: 4}
    assert all(seen[record] == 4 for record in range(48))
    with pytest.raises(UserError, match="buckets: 2 given"):
        groups_for_step(3, 0, 8, 51, buckets=[0, 1])


def test_a_banned_bucket_is_skipped():
    buckets = [0] * 8 + [1] * 8
    for step in range(10):
        assert (groups_for_step(0, step, 4, 16, range(8), buckets) >= 8).all()


def test_plan():
    plan = plan_samples(np.array([9, 4, 7]), 4)
    assert plan.record.tolist() == [9] * 4 + [4] * 4 + [7] * 4
    assert plan.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert plan.sample.tolist() == list(range(12))
    with pytest.raises(UserError, match="group_size: 0"):
        plan_samples(np.array([1]), 0)


def test_a_group_is_keyed_by_its_record():
    assert plan_samples(np.array([5, 2, 5]), 2).group.tolist() == [0, 0, 1, 1, 0, 0]


def test_refilled_groups_are_new_to_the_step_and_leave_the_stream_alone():
    buckets, banned = [0, 1] * 20, {1, 3, 5}
    for step in range(12):
        taken = groups_for_step(2, step, 6, 40, banned, buckets)
        for number in (1, 2):
            more = refill_groups(2, step, number, 4, 40, taken, banned, buckets)
            assert len(set(more.tolist())) == 4 and not set(more.tolist()) & (set(taken.tolist()) | banned)
            assert {buckets[record] for record in more} == {buckets[taken[0]]}
            np.testing.assert_array_equal(more, refill_groups(2, step, number, 4, 40, taken, banned, buckets))
            taken = np.concatenate([taken, more])
    first = [refill_groups(2, *place, 4, 1000, np.arange(6)).tolist() for place in ((0, 1), (0, 2), (1, 1))]
    assert len({tuple(records) for records in first}) == 3


def test_refilling_ends_with_the_records():
    assert set(refill_groups(0, 0, 1, 4, 8, np.array([0, 2, 4]), {1, 3, 5}).tolist()) == {6, 7}
    assert len(refill_groups(0, 0, 1, 4, 4, np.arange(4))) == 0
