"""From rewards to a step's batch: unknown scores, dropped groups, bans, packing."""

import numpy as np
import pytest

from cocoedit_jax.data.groups import plan_samples
from cocoedit_jax.models.editor import Conditioning
from cocoedit_jax.models.quickstart import build_editor
from cocoedit_jax.models.text import TextStates
from cocoedit_jax.nft.presets import preset
from cocoedit_jax.train.optimality import judge_rollout, pack_step
from cocoedit_jax.train.rollout import Rollout
from tests.train.tiny import SIZE, tiny_quickstart

EDITOR = build_editor(tiny_quickstart())
GRID = EDITOR.grid(SIZE, SIZE)
GROUPS, K = 3, 4


def step_inputs(judge: np.ndarray, prompts=("a", "b", "c"), seed: int = 0):
    rng = np.random.default_rng(seed)
    plan = plan_samples(np.arange(GROUPS), K)
    mask = np.zeros((GROUPS, SIZE, SIZE), np.float32)
    mask[:, :8, :8] = 1
    batch = {"id": ["r0", "r1", "r2"], "prompt": list(prompts), "edit_mask": mask, "edit_type": ["add", None, "move"]}
    n = len(plan)
    rollout = Rollout(
        x0=rng.standard_normal((n, GRID.tokens, 48)).astype(np.float32),
        own=np.arange(n),
        images=np.zeros((n, SIZE, SIZE, 3), np.float32),
        judge_counters={},
        rewards={"judge": judge, "pixel": np.full(n, 0.5)},
        reward_valid={"judge": np.isfinite(judge), "pixel": np.ones(n, bool)},
    )
    source = rng.standard_normal((GROUPS, GRID.tokens, 48)).astype(np.float32)
    return rollout, plan, batch, source


def judged(judge: np.ndarray, name: str = "cocoedit", prompts=("a", "b", "c"), **changes):
    rollout, plan, batch, source = step_inputs(judge, prompts)
    cfg = preset(name).replace(**changes)
    return judge_rollout(rollout, plan, batch, source, GRID, 1, cfg), (rollout, plan, batch, source, cfg)


def spread(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random(GROUPS * K)


def test_unknown_scores_leave_their_group_and_are_never_replaced():
    scores = spread()
    scores[1] = np.nan
    out, _ = judged(scores, ban=False)
    assert not out.valid[1] and out.valid.sum() == GROUPS * K - 1
    rest = [0, 2, 3]
    total = 0.8 * scores + 0.2 * 0.5
    # The group's mean is over its three known members.
    advantage = (total[rest] - total[rest].mean()) / (np.nanstd(total) + 1e-4)
    np.testing.assert_allclose(out.r[rest], np.clip(advantage, -5, 5) / 10 + 0.5, rtol=1e-5)
    assert out.metrics["samples/unscored"] == 1


def test_a_group_with_one_known_score_is_dropped():
    scores = spread()
    scores[[0, 1, 2]] = np.nan
    out, _ = judged(scores, ban=False)
    assert not out.valid[:K].any() and out.valid[K:].all()


def test_the_least_number_of_known_scores_can_be_chosen():
    scores = spread()
    scores[[0, 4, 5]] = np.nan
    out, _ = judged(scores, ban=False, min_group=3)
    assert out.valid.tolist() == [False, True, True, True] + [False] * K + [True] * K
    assert out.metrics["groups/dropped"] == 1 and out.metrics["samples/unscored"] == 3
    assert judged(scores, ban=False)[0].metrics["groups/dropped"] == 0


def test_groups_without_spread_are_left_out_and_solved_ones_banned():
    scores = spread()
    scores[:K] = 1.0  # solved: reward .9 + .1 = no spread, high mean
    scores[K : 2 * K] = 0.3  # no spread, but not solved
    out, _ = judged(scores, ban=True, ban_mean=0.85)
    assert not out.valid[: 2 * K].any() and out.valid[2 * K :].all()
    assert out.banned == ["r0"]


def test_groups_are_keyed_by_record_and_in_the_released_variant_by_text():
    scores = spread()
    by_record, _ = judged(scores, ban=False, prompts=("same", "same", "c"))
    by_text, _ = judged(scores, ban=False, prompts=("same", "same", "c"), group_key="prompt")
    separate, _ = judged(scores, ban=False, prompts=("a", "b", "c"), group_key="prompt")
    np.testing.assert_allclose(by_record.r, separate.r)
    assert np.abs(by_text.r - by_record.r)[: 2 * K].max() > 1e-3


def test_routed_r_is_a_map():
    out, (rollout, plan, batch, source, cfg) = judged(spread(), "cocoedit-routed", ban=False)
    assert out.r.shape == (GROUPS * K, GRID.tokens)
    # Inside the mask every token of a sample has the judge's verdict; outside they differ.
    inside = np.zeros((4, 4), bool)
    inside[:2, :2] = True
    inside = inside.ravel()
    assert np.ptp(out.r[0][inside]) < 1e-6 < np.ptp(out.r[0][~inside])
    np.testing.assert_allclose(out.token_weight[0][inside], cfg.routed_inside_weight)


@pytest.mark.parametrize("invalid", ["drop", "zero_weight"])
def test_packing(invalid):
    scores = spread()
    scores[[2, 7]] = np.nan
    out, (rollout, plan, batch, source, cfg) = judged(scores, ban=False, invalid=invalid)
    n = len(source[0])
    conditioning = Conditioning(
        source, TextStates(np.zeros((GROUPS, 2, 8)), np.arange(GROUPS)[:, None]), np.ones(GROUPS)
    )
    step, num_micro, count = pack_step(
        EDITOR, rollout, out, plan, batch, conditioning, cfg, 4, np.random.default_rng(0)
    )
    assert step.x0.shape == (3, 4, n, 48) and count == GROUPS * K - 2
    assert num_micro == 3
    rows = step.sample.reshape(-1)
    valid = step.valid.reshape(-1) > 0
    assert set(rows[valid].tolist()) == set(range(GROUPS * K)) - {2, 7}
    # Every row carries its own sample, record and threshold.
    np.testing.assert_array_equal(step.x0.reshape(-1, n, 48)[valid], rollout.x0[rows[valid]])
    assert step.conditioning.text.pooled is not None
    np.testing.assert_array_equal(step.conditioning.text.pooled.reshape(-1)[valid], plan.group[rows[valid]])
    # The loss holds to the source where the mask is 0: 1 means keep.
    np.testing.assert_array_equal(
        step.preserve_latent.reshape(-1, SIZE, SIZE)[valid], 1 - batch["edit_mask"][plan.group[rows[valid]]]
    )
    if invalid == "drop":
        assert not valid[count:].any()


def test_dropping_saves_whole_micro_batches():
    scores = spread()
    scores[:K] = np.nan
    out, (rollout, plan, batch, source, cfg) = judged(scores, ban=False)
    conditioning = Conditioning(source, TextStates(np.zeros((GROUPS, 2, 8)), np.zeros((GROUPS, 1))), np.ones(GROUPS))
    _, num_micro, count = pack_step(EDITOR, rollout, out, plan, batch, conditioning, cfg, 4, np.random.default_rng(0))
    assert (num_micro, count) == (2, 8)


def test_thresholds_by_edit_type():
    out, (rollout, plan, batch, source, _) = judged(spread(), ban=False)
    cfg = preset("cocoedit").replace(tau_by_edit_type={"add": (0.5, 0.25)})
    conditioning = Conditioning(source, TextStates(np.zeros((GROUPS, 2, 8)), np.zeros((GROUPS, 1))), np.ones(GROUPS))
    step, _, _ = pack_step(EDITOR, rollout, out, plan, batch, conditioning, cfg, 4, np.random.default_rng(0))
    first = plan.group[step.sample.reshape(-1)] == 0
    np.testing.assert_allclose(step.tau_pos.reshape(-1), np.where(first, 0.5, cfg.tau_pos))
    np.testing.assert_allclose(step.tau_neg.reshape(-1), np.where(first, 0.25, cfg.tau_neg))
