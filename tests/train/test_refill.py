"""Dropped groups are replaced within their step: by whom, how often, what is counted; nothing is compiled for it."""

import itertools
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from cocoedit_jax.data.groups import plan_samples
from cocoedit_jax.reporting.telemetry import PhaseTimer
from cocoedit_jax.rewards import judge as judges
from cocoedit_jax.rewards.judge import JudgeScore
from cocoedit_jax.train import trainer as trainer_module
from cocoedit_jax.train.optimality import Drawn, Judged
from cocoedit_jax.train.refill import refill
from cocoedit_jax.train.setup import build
from cocoedit_jax.train.trainer import Trainer
from tests.train.tiny import tiny_config

K = 2


def drawn(records, bad, unscored=(), before=None, rows=None) -> Drawn:
    """A step of ``records``; the groups of those in ``bad`` are dropped, those in ``unscored`` for want of scores."""
    plan = records if before is not None else plan_samples(np.asarray(records), K)
    reward = np.where(np.isin(plan.record, list(unscored)), np.nan, plan.record.astype(float))
    valid = ~np.isin(plan.record, [*bad, *unscored])
    drawn_rows = len(plan)  # a merged step's own count, which the totals replace
    metrics = {"samples/drawn": float(drawn_rows), "samples/unscored": float(np.isnan(reward).sum()),
               "samples/used": float(valid.sum()), "reward/total": float(plan.record.sum())}  # fmt: skip
    solved = [f"r{record}" for record in sorted(set(plan.record.tolist()) & set(bad)) if record % 2]
    judged = Judged(reward, reward, reward, valid, solved, metrics)
    batch = {"id": [f"r{r}" for r in plan.record[::K]], "image": plan.record[::K].astype(float)[:, None]}
    return Drawn(None, plan, batch, None, SimpleNamespace(), judged)  # pyright: ignore[reportArgumentType]


def refilled(bad, unscored=(), rounds=2, more=(10, 11, 12, 13, 14), max_unscored=1.0):
    """A step of the records 1 to 4, refilled with ``more``; and what was asked for in each round."""
    asked, supply = [], list(more)

    def further(number, count, taken, banned):
        asked.append((number, count, taken.tolist(), list(banned)))
        chosen = supply[:count]
        del supply[:count]
        return np.asarray(chosen, np.int64)

    def sample(plan, rows, before):
        np.testing.assert_array_equal(plan.records, plan.record[::K])
        np.testing.assert_array_equal(plan.sample[rows], 8 * asked[-1][0] + rows)
        return drawn(plan, bad, unscored, before, rows)

    return refill(drawn([1, 2, 3, 4], bad, unscored), rounds, further, sample, max_unscored), asked


def test_new_groups_take_the_places_of_the_dropped():
    step, asked = refilled(bad=(2, 3, 11))
    assert step.plan.record[::K].tolist() == [1, 10, 12, 4]
    assert step.plan.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert step.plan.sample.tolist() == [0, 1, 10, 11, 20, 21, 6, 7]
    # A record that was dropped is never asked for again, and what it banned holds at once.
    assert asked == [(1, 2, [1, 2, 3, 4], ["r3"]), (2, 1, [1, 2, 3, 4, 10, 11], ["r3", "r11"])]
    assert step.judged.banned == ["r3", "r11"] and step.judged.valid.all()
    metrics = step.judged.metrics
    assert (metrics["samples/drawn"], metrics["samples/used"]) == (8 + 2 * K + K, 8)
    assert (metrics["groups/refilled"], metrics["groups/banned_now"]) == (3, 2)
    assert metrics["reward/total"] == K * (1 + 2 + 3 + 4)  # of the records first drawn


def test_rounds_and_records_are_bounded():
    everything = range(100)
    step, asked = refilled(bad=everything, rounds=2, more=range(10, 50))
    assert [number for number, *_ in asked] == [1, 2] and step.judged.metrics["groups/refilled"] == 8
    step, asked = refilled(bad=everything, rounds=9, more=(10, 11, 12, 13, 14))
    assert [count for _, count, *_ in asked] == [4, 4, 4]  # five records, then none
    assert step.plan.record[::K].tolist() == [14, 11, 12, 13] and step.judged.metrics["groups/refilled"] == 5
    assert not refilled(bad=())[1]


def test_a_judge_that_fails_gets_no_more_work():
    step, asked = refilled(bad=(), unscored=(1, 2), max_unscored=0.4)
    assert not asked and step.judged.metrics["samples/unscored"] == 4
    step, asked = refilled(bad=(), unscored=(1, 2, 10, 11), max_unscored=0.6, rounds=5)
    assert len(asked) == 1 and step.judged.metrics["samples/unscored"] == 8 == step.judged.metrics["samples/drawn"] - 4


STEPS = range(1, 7)


class Judge:
    """Scores the edits of some records only."""

    def __init__(self):
        self.asked: Counter[str] = Counter()
        self.lost: set[str] = set()

    def __call__(self, requests):
        self.asked.update(r.record_id for r in requests)
        lost, score = JudgeScore(None, "lost"), lambda r: JudgeScore(float(1000 * r.edited.mean() % 1))
        return [lost if r.record_id in self.lost else score(r) for r in requests]


@dataclass
class Step:
    """What happened in one step."""

    metrics: dict[str, float]
    drawn: Drawn
    rounds: list[list[str]]  # ids of the records of each round
    asked: Counter
    lost: set[str]
    state: list[np.ndarray]  # after it
    compiled: list[str]


@pytest.fixture(scope="module")
def history(tiny_base, tiny_data, tmp_path_factory):
    """Six steps of a run, in which all records are scored at first and half of them later, and a run that resumes
    after the first step."""
    settings = {
        "rollout.refill": 2, "algorithm.ban": False, "train.steps": len(STEPS), "max_unscored": 1.0,
        "algorithm.kl_weight": 0.1, "algorithm.kl_fraction": 0.5, "judge.name": "partial",
    }  # fmt: skip
    folder, collect = tmp_path_factory.mktemp("refill"), trainer_module.collect
    rounds: list[list[str]] = []
    compiled: list[str] = []

    def spy(sampler, params, adapter, conditioning, plan, batch, *rest):
        rounds.append([batch["id"][g] for g in plan.group[::4]])
        return collect(sampler, params, adapter, conditioning, plan, batch, *rest)

    def listen(event: str, duration: float, **about) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(about))

    def take(trainer: Trainer, number: int) -> Step:
        ids, judge = [record.id for record in trainer.setup.train_records], trainer.setup.judge
        assert isinstance(judge, Judge)
        judge.lost = set(ids[number % 2 :: 2]) if number > 1 else set()
        for record in (judge.asked, rounds, compiled):
            record.clear()
        metrics, drawn = trainer.train_step(number, PhaseTimer())
        state = [np.array(x) for x in jax.tree.leaves(trainer.state)]
        return Step(metrics, drawn, list(rounds), Counter(judge.asked), judge.lost, state, list(compiled))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(judges.JUDGES, "partial", Judge)
        patch.setattr(trainer_module, "collect", spy)
        jax.monitoring.register_event_duration_secs_listener(listen)
        trainers = [Trainer(build(tiny_config(tiny_base, tiny_data, **settings)), folder)]
        steps = {1: take(trainers[0], 1)}
        trainers[0].save({})
        trainers[0].checkpoints.wait()
        steps |= {number: take(trainers[0], number) for number in STEPS[1:]}
        trainers.append(Trainer(build(tiny_config(tiny_base, tiny_data, **settings)), folder))
        assert trainers[1].resume() == 1
        yield trainers, steps, take
        jax.monitoring.unregister_event_duration_listener(listen)
        for trainer in trainers:
            trainer.close()


def test_every_round_replaces_what_was_lost_in_the_one_before(history):
    (run, _), steps, _ = history
    assert steps[2].drawn.conditioning.source.shape[0] == 4  # records, not samples: each is encoded once
    assert len(steps[1].rounds) == 1 and len(steps[1].rounds[0]) == 4 and steps[1].metrics["groups/refilled"] == 0
    for step in steps.values():
        for before, after in itertools.pairwise(step.rounds):
            assert len(after) == sum(name in step.lost for name in before)
        assert len(step.rounds) == 3 or not step.lost.intersection(step.rounds[-1])
        in_all = [name for part in step.rounds for name in part]
        assert len(set(in_all)) == len(in_all)
        # Rows belong together: a sample of a record is conditioned on that record.
        ids = [record.id for record in run.setup.train_records]
        assert [step.drawn.batch["id"][g] for g in step.drawn.plan.group] == [ids[r] for r in step.drawn.plan.record]


def test_every_sample_is_accounted_for(history):
    """Those asked for are scored or not, over all rounds; fillings of a short batch are not asked for."""
    _, steps, _ = history
    for step in steps.values():
        in_all = sum(map(len, step.rounds))
        assert step.metrics["groups/refilled"] == in_all - 4
        assert step.metrics["samples/drawn"] == sum(step.asked.values()) == 4 * in_all
        assert set(step.asked.values()) == {4}
        assert step.metrics["samples/unscored"] == sum(step.asked[name] for name in step.lost)
        assert step.metrics["samples/used"] == 16 - 4 * sum(name in step.lost for name in step.drawn.batch["id"])
    assert len({step.metrics["samples/used"] for step in steps.values()}) > 1


def test_nothing_is_compiled_for_it(history):
    """Neither for refilling, nor for another number of samples to learn from."""
    (run, _), steps, _ = history
    assert steps[1].compiled and steps[2].metrics["groups/refilled"] > 0
    assert {number: step.compiled for number, step in steps.items() if number > 1} == dict.fromkeys(STEPS[1:], [])
    programs = run.programs(0)
    assert programs.sampler._cache_size() == programs.train_step._cache_size() == 1


def test_a_resumed_step_draws_the_same_and_is_that_of_the_records_it_ends_with(history):
    """All their samples at once, with the same numbers, give the same edits, scores and optimality."""
    (_, again), steps, take = history
    expected = steps[2]
    key = jax.random.split(jax.random.fold_in(jax.random.key(0), 2))[0]
    at_once = again._sample(2, again.programs(0), key, PhaseTimer(), expected.drawn.plan)
    np.testing.assert_allclose(expected.drawn.rollout.x0, at_once.rollout.x0, atol=1e-5)
    np.testing.assert_allclose(expected.drawn.rollout.rewards["pixel"], at_once.rollout.rewards["pixel"], atol=1e-5)
    np.testing.assert_array_equal(expected.drawn.conditioning.source, at_once.conditioning.source)
    assert np.ptp(expected.drawn.rollout.x0, axis=0).mean() > 0.1

    step = take(again, 2)
    np.testing.assert_array_equal(step.drawn.plan.record, expected.drawn.plan.record)
    np.testing.assert_array_equal(step.drawn.rollout.x0, expected.drawn.rollout.x0)
    timeless = lambda metrics: {k: v for k, v in metrics.items() if "seconds" not in k}  # noqa: E731
    assert timeless(step.metrics) == timeless(expected.metrics)
    for a, b in zip(step.state, expected.state, strict=True):
        np.testing.assert_array_equal(a, b)
