"""Groups that teach nothing, replaced within their step by groups of further records.

A new group takes the rows of the one that it replaces, so no array changes its shape and nothing is compiled again.
Which records come is a function of (seed, step, round) and of what the step has drawn: a resumed run draws the same.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from cocoedit_jax.data.groups import SamplePlan
from cocoedit_jax.train.optimality import Drawn

# (round from 1, groups wanted, record indices drawn so far, what is banned by the step) -> further record indices
Further = Callable[[int, int, np.ndarray, list[str]], np.ndarray]
# (plan, rows to sample, what the step has) -> what the step has then
Sample = Callable[[SamplePlan, np.ndarray, Drawn], Drawn]


def refill(
    drawn: Drawn,
    rounds: int,
    further: Further,
    sample: Sample,
    max_unscored: float,
) -> Drawn:
    """``drawn`` with its dropped groups replaced, in at most ``rounds`` rounds.

    It ends early when no group is dropped, no record is left, or more than ``max_unscored`` of the samples have no
    reward: the judge fails then, and more samples would be lost on it.

    In the metrics ``reward/*`` are those of the records first drawn, so that they mean the same with and without
    refilling; ``samples/drawn``, ``samples/unscored`` and ``groups/banned_now`` count all rounds, ``groups/refilled``
    the new groups; the others describe what is learned from.
    """
    taken, banned = drawn.plan.record, list(drawn.judged.banned)
    first = {name: value for name, value in drawn.judged.metrics.items() if name.startswith("reward/")}
    total = {name: drawn.judged.metrics[name] for name in ("samples/drawn", "samples/unscored")}
    refilled = 0
    for number in range(1, rounds + 1):
        dropped = dropped_groups(drawn)
        if not len(dropped) or total["samples/unscored"] > max_unscored * total["samples/drawn"]:
            break
        records = further(number, len(dropped), np.unique(taken), banned)
        if not len(records):
            break
        plan, rows = replaced(drawn.plan, dropped[: len(records)], records, number)
        drawn = sample(plan, rows, drawn)
        taken = np.concatenate([taken, records])
        banned += [name for name in drawn.judged.banned if name not in banned]
        total["samples/drawn"] += len(rows)
        total["samples/unscored"] += float((~np.isfinite(drawn.judged.reward[rows])).sum())
        refilled += len(records)
    metrics = drawn.judged.metrics | first | total
    metrics |= {"groups/banned_now": float(len(banned)), "groups/refilled": float(refilled)}
    return dataclasses.replace(drawn, judged=dataclasses.replace(drawn.judged, banned=banned, metrics=metrics))


def dropped_groups(drawn: Drawn) -> np.ndarray:
    """Numbers of the groups none of whose samples takes part in the loss, ascending."""
    return np.setdiff1d(drawn.plan.group, drawn.plan.group[drawn.judged.valid])


def replaced(plan: SamplePlan, groups: np.ndarray, records: np.ndarray, number: int) -> tuple[SamplePlan, np.ndarray]:
    """``plan`` with ``records`` in the places of ``groups``, and the rows of those. Their samples are numbered anew, in
    round ``number`` from ``number * len(plan)`` on, so that their noise is their own."""
    rows = np.flatnonzero(np.isin(plan.group, groups))
    record, sample = plan.record.copy(), plan.sample.copy()
    record[rows] = records[np.searchsorted(groups, plan.group[rows])]
    sample[rows] = number * len(plan) + rows
    return SamplePlan(record, plan.group, sample), rows
