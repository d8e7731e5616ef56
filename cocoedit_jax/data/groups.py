"""Which records a training step uses, each of them k times, as a pure function of integers.

Nothing is carried from step to step, so a resumed run continues exactly: (seed, step, banned records) give the records.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import grain
import numpy as np

from cocoedit_jax.errors import UserError

_RESERVE, _ORDER, _REFILL = 1, 2, 3  # separate random streams


def groups_for_step(
    seed: int,
    step: int,
    num_groups: int,
    num_records: int,
    banned: Collection[int] = (),
    buckets: Sequence[int] | None = None,
) -> np.ndarray:
    """Record indices int64 [num_groups] of training step `step` (from 0).

    The records run through a stream of seeded permutations, one per epoch, and step s owns the positions from
    s * num_groups on. Records that are banned, or already in the step where it straddles two epochs, are replaced by
    random others of the allowed ones. So a ban never shifts the stream: every allowed record appears once per epoch
    (and sometimes again as a replacement). All records of a step differ unless fewer than `num_groups` are allowed.

    buckets: the bucket of each record; a step then uses one bucket only. The steps of an epoch are shared out among
    the buckets by their size (at least one each) and shuffled. Raises UserError on impossible numbers.
    """
    if step < 0 or num_groups < 1 or num_records < 1:
        raise UserError(
            f"step {step}, num_groups {num_groups}, num_records {num_records}: expected step >= 0 and the others >= 1"
        )
    blocked = np.zeros(num_records, bool)
    if len(banned):
        numbers = np.asarray(sorted(banned), np.int64)
        if numbers[0] < 0 or numbers[-1] >= num_records:
            raise UserError(f"banned: indices from {numbers[0]} to {numbers[-1]}, expected them in [0, {num_records})")
        blocked[numbers] = True
    if blocked.all():
        raise UserError(f"banned: all {num_records} records are banned, none is left to train on")
    if buckets is None:
        members, window = np.arange(num_records), step
    else:
        if len(buckets) != num_records:
            raise UserError(f"buckets: {len(buckets)} given, expected one for each of {num_records} records")
        members, window = _bucket_of_step(seed, step, num_groups, np.asarray(buckets, np.int64), blocked)
    stream = grain.MapDataset.range(len(members)).seed(seed).shuffle().repeat()
    positions = range(window * num_groups, (window + 1) * num_groups)
    wanted = [int(members[stream[position]]) for position in positions]
    chosen: list[int] = []
    for record in wanted:
        if not blocked[record] and record not in chosen:
            chosen.append(record)
    missing = num_groups - len(chosen)
    if missing:
        allowed = members[~blocked[members]]
        rng = np.random.default_rng([seed, step, _RESERVE])
        others = rng.permutation(allowed[~np.isin(allowed, chosen)])
        chosen += [int(record) for record in others[:missing]]
    while len(chosen) < num_groups:  # fewer allowed records than groups
        chosen += chosen[: num_groups - len(chosen)]
    return np.asarray(chosen, np.int64)


def refill_groups(
    seed: int,
    step: int,
    round_number: int,
    num_groups: int,
    num_records: int,
    taken: np.ndarray,
    banned: Collection[int] = (),
    buckets: Sequence[int] | None = None,
) -> np.ndarray:
    """Record indices int64 [at most num_groups] that stand in for groups of step `step` (from 0) that were dropped.

    Random ones that are neither banned nor in `taken`, the records that the step has had, and of their bucket; fewer
    where fewer are left. They come from outside the step's positions in the stream, which goes on as without them.
    """
    free = np.ones(num_records, bool)
    free[np.asarray(sorted(banned), np.int64)] = False
    if buckets is not None:
        free &= np.asarray(buckets) == buckets[int(taken[0])]
    free[taken] = False
    rng = np.random.default_rng([seed, step, _REFILL, round_number])
    return rng.permutation(np.flatnonzero(free))[:num_groups]


def _bucket_of_step(
    seed: int, step: int, num_groups: int, buckets: np.ndarray, blocked: np.ndarray
) -> tuple[np.ndarray, int]:
    """Records of the bucket that `step` uses, and how many steps that bucket has served before."""
    labels = [int(label) for label in np.unique(buckets[~blocked])]
    shares = [max(1, round(int((buckets == label).sum()) / num_groups)) for label in labels]
    epoch, slot = divmod(step, sum(shares))
    order = np.random.default_rng([seed, epoch, _ORDER]).permutation(np.repeat(np.arange(len(labels)), shares))
    choice = int(order[slot])
    window = epoch * shares[choice] + int((order[:slot] == choice).sum())
    return np.flatnonzero(buckets == labels[choice]), window


@dataclass(frozen=True)
class SamplePlan:
    """The samples of one step, in global order: `record` int64 [n] (dataset index), `group` int64 [n] (0-based within
    the step), `sample` int64 [n] (global sample index within the step, for random keys); n = groups * group size.
    """

    record: np.ndarray
    group: np.ndarray
    sample: np.ndarray

    def __len__(self) -> int:
        return len(self.record)

    @property
    def records(self) -> np.ndarray:
        """The record of every group [G]."""
        return self.record[np.unique(self.group, return_index=True)[1]]

    def take(self, rows: np.ndarray) -> SamplePlan:
        return SamplePlan(self.record[rows], self.group[rows], self.sample[rows])


def plan_samples(records: np.ndarray, group_size: int) -> SamplePlan:
    """Each of `records` [groups] `group_size` times, side by side. A group is keyed by its record: where `records`
    repeats one (fewer allowed records than groups), the repeats share a group number.
    """
    if group_size < 1:
        raise UserError(f"group_size: {group_size} given, expected at least 1")
    first = {int(record): number for number, record in reversed(list(enumerate(records)))}
    groups = np.asarray([first[int(record)] for record in records], np.int64)
    return SamplePlan(
        record=np.repeat(np.asarray(records, np.int64), group_size),
        group=np.repeat(groups, group_size),
        sample=np.arange(len(records) * group_size, dtype=np.int64),
    )
