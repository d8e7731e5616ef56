"""Sampling does not depend on batching or devices; rewards are gathered in order."""

import threading

import jax
import jax.numpy as jnp
import numpy as np

from cocoedit_jax.data.groups import plan_samples
from cocoedit_jax.models.quickstart import build_editor
from cocoedit_jax.models.text import Instruction
from cocoedit_jax.nft.presets import preset
from cocoedit_jax.rewards.judge import JudgeScore
from cocoedit_jax.rewards.pixel import pixel_reward
from cocoedit_jax.rewards.registry import EditBatch
from cocoedit_jax.sharding.mesh import make_mesh
from cocoedit_jax.sharding.shares import divide
from cocoedit_jax.train.rollout import RewardQueue, collect, make_sampler
from tests.train.tiny import SIZE, random_params, tiny_quickstart

EDITOR = build_editor(tiny_quickstart())
GRID = EDITOR.grid(SIZE, SIZE)
GROUPS, K = 2, 8


def random_batch():
    rng = np.random.default_rng(0)
    return {
        "image": rng.random((GROUPS, SIZE, SIZE, 3)).astype(np.float32),
        "edit_mask": (rng.random((GROUPS, SIZE, SIZE)) > 0.8).astype(np.float32),
        "prompt": ["remove the red circle", "add a blue star"],
        "id": ["a", "b"],
        "extra": [{"number": 0}, {"number": 1}],
    }


def roll(batch_size: int, devices: int):
    params = random_params(EDITOR)
    mesh = make_mesh({"data": -1}, jax.devices()[:devices])
    sampler = make_sampler(EDITOR, GRID, EDITOR.sigmas(2, GRID), "dpm2", mesh)
    batch = random_batch()

    def judge(requests):
        for request in requests:
            np.testing.assert_array_equal(request.source, batch["image"][request.extra["number"]])
        return [JudgeScore(float(r.edited.mean())) for r in requests]

    queue = RewardQueue(judge, preset("cocoedit"))
    conditioning = EDITOR.encode(
        params, jnp.asarray(batch["image"]), EDITOR.text_inputs([Instruction(prompt) for prompt in batch["prompt"]])
    )
    plan = plan_samples(np.arange(GROUPS), K)
    out = collect(
        sampler, params, None, conditioning, plan, batch, jax.random.key(3), queue, divide(plan.group, batch_size, mesh)
    )
    queue.close()
    return out


def test_no_batch_waits_for_another_to_be_judged():
    """A judge's deadline runs from its call, so all batches of a step must be under way at once."""
    together = threading.Barrier(6, timeout=20)

    def judge(requests):
        together.wait()
        return [JudgeScore(0.5) for _ in requests]

    queue = RewardQueue(judge, preset("edit-r1"), batches=6)
    image = np.zeros((1, SIZE, SIZE, 3), np.float32)
    batch = EditBatch(jnp.asarray(image), image, image[..., 0], [{"prompt": "", "id": "a", "extra": {}}])
    pending = [queue.submit(batch)["judge"] for _ in range(6)]
    assert all(future.result()[0].tolist() == [0.5] for future in pending)
    queue.close()


def test_the_same_samples_in_any_batching_on_any_number_of_devices():
    reference = roll(16, 1)
    assert reference.x0.shape == (16, GRID.tokens, 48)
    assert len(np.unique(reference.x0[:, 0, 0])) == 16  # every sample has its own noise
    for batch_size, devices in ((4, 1), (16, 8), (8, 4)):
        other = roll(batch_size, devices)
        np.testing.assert_allclose(other.x0, reference.x0, atol=1e-5)
        np.testing.assert_allclose(other.rewards["pixel"], reference.rewards["pixel"], atol=1e-5)
    # The pixel reward looks where the edit mask is 0.
    group = plan_samples(np.arange(GROUPS), K).group
    batch = random_batch()
    expected = pixel_reward(
        jnp.asarray(reference.images), batch["image"][group], 1 - batch["edit_mask"][group], preset("cocoedit")
    )
    np.testing.assert_allclose(reference.rewards["pixel"], expected.score, rtol=1e-5)
    # Scores stay with their images.
    np.testing.assert_allclose(reference.rewards["judge"], reference.images.mean((1, 2, 3)), rtol=1e-6)
    assert reference.reward_valid["judge"].all()


def test_counters_of_several_processes_become_those_of_one_run():
    class Judge:
        averaged = ("mass",)

        def __call__(self, requests):
            return []

    queue = RewardQueue(Judge(), preset("edit-r1"))
    found = queue.merged_counters([{"scored": 3.0, "mass": 1.0}, {"scored": 1.0, "mass": 0.6, "retry/busy": 2.0}, {}])
    queue.close()
    np.testing.assert_allclose([found.pop(name) for name in ("scored", "mass", "retry/busy")], [4.0, 0.9, 2.0])
    assert not found
