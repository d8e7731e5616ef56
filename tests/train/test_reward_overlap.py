"""Edits are judged while the next ones are sampled: told by who waits for whom, not by time."""

import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cocoedit_jax.data.groups import plan_samples
from cocoedit_jax.nft.presets import preset
from cocoedit_jax.rewards.judge import JudgeScore
from cocoedit_jax.sharding.mesh import make_mesh
from cocoedit_jax.sharding.shares import divide
from cocoedit_jax.train.rollout import RewardQueue, collect

GROUPS, K, SIZE = 2, 4, 8
JOIN_S = 30  # on whatever machine; nothing waits that long where sampling and judging overlap


@pytest.mark.parametrize("waits", ["the sampler for the judge", "the judge for the sampler"])
def test_a_group_is_judged_while_the_next_one_is_sampled(waits):
    """Both ways round: the next group is not sampled before the judge was asked about the last one, and the judge does
    not answer before the next group is being sampled. If either came strictly after the other, both would wait.
    """
    events, asked, sampled = [], [threading.Event() for _ in range(GROUPS)], [threading.Event() for _ in range(GROUPS)]
    numbers = iter(range(GROUPS))

    def sampler(params, adapter, conditioning, keys):
        number = next(numbers)
        if number and waits == "the sampler for the judge":
            assert asked[number - 1].wait(JOIN_S), "the judge was not asked before the next group was sampled"
        events.append(("sampled", number))
        sampled[number].set()
        return jnp.full((K, 1, 1), float(number)), jnp.full((K, SIZE, SIZE, 3), number / 10)

    def judge(requests):
        number = round(float(requests[0].edited.mean()) * 10)
        asked[number].set()
        if number + 1 < GROUPS and waits == "the judge for the sampler":
            assert sampled[number + 1].wait(JOIN_S), "the next group was not sampled before the judge had answered"
        events.append(("judged", number))
        return [JudgeScore(number / 10) for _ in requests]

    batch = {
        "image": np.zeros((GROUPS, SIZE, SIZE, 3), np.float32),
        "edit_mask": np.ones((GROUPS, SIZE, SIZE), np.float32),
        "prompt": ["a", "b"],
        "id": ["a", "b"],
        "extra": [{}, {}],
    }
    plan = plan_samples(np.arange(GROUPS), K)
    mesh = make_mesh({"data": -1}, jax.devices()[:1])
    conditioning = SimpleNamespace(take=lambda rows: rows)
    queue = RewardQueue(judge, preset("edit-r1"))
    try:
        found = collect(
            sampler, None, None, conditioning, plan, batch, jax.random.key(0), queue, divide(plan.group, K, mesh)
        )
    finally:
        queue.close()
    np.testing.assert_allclose(found.rewards["judge"], [0.0] * K + [0.1] * K)
    if waits == "the judge for the sampler":
        assert events.index(("sampled", 1)) < events.index(("judged", 0))
