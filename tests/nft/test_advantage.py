import numpy as np
import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.nft.advantage import (
    advantages,
    banned,
    combined_advantages,
    group_statistics,
    optimality,
    token_optimality,
    validity,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("std", ["global", "group"])
def test_groups_of_any_size_and_order(std):
    group = RNG.permutation(np.repeat([7, 3, 11], [4, 2, 5]))
    reward = RNG.random(11)
    ours = advantages(reward, group, std=std)
    for g in (3, 7, 11):
        members = reward[group == g]
        deviation = reward.std() if std == "global" else members.std()
        np.testing.assert_allclose(ours[group == g], (members - members.mean()) / (deviation + 1e-4), rtol=1e-12)


def test_unknown_rewards_enter_no_statistic():
    group = np.array(["a", "a", "a", "b", "b"])
    reward = np.array([0.1, 0.5, np.nan, 0.3, 0.2])
    valid = np.array([1, 1, 0, 1, 1], bool)
    ours = advantages(reward, group, valid=valid)
    np.testing.assert_allclose(ours[valid], advantages(reward[valid], group[valid]), rtol=1e-12)
    assert ours[2] == 0
    alone = group_statistics(reward, np.array([0, 0, 1, 2, 2]), valid=valid)
    assert np.isnan(alone.mean[2]) and np.isnan(alone.std[2])
    assert not validity(alone, ban=True, ban_std=0.02, ban_mean=0.9)[2]
    with pytest.raises(UserError, match="not finite"):
        advantages(reward, group)


def test_optimality_map():
    np.testing.assert_allclose(optimality([0, 5, -5, 1, 40], 5), [0.5, 1, 0, 0.6, 1], rtol=1e-12)
    a = np.array([-7.0, -1.0, 0.0, 2.0])
    np.testing.assert_allclose(optimality(a, 5, "positive_only"), [0.5, 0.5, 0.5, 0.7])
    np.testing.assert_allclose(optimality(a, 5, "negative_only"), [0, 0.4, 0.5, 0.5])
    np.testing.assert_allclose(optimality(a, 5, "one_only"), [0.5, 0.5, 0.5, 0.6])
    np.testing.assert_allclose(optimality(a, 5, "binary"), [0.4, 0.4, 0.5, 0.6])
    with pytest.raises(UserError, match="adv_mode is 'both'"):
        optimality(a, 5, "both")


def test_validity_and_bans():
    group = np.repeat([0, 1, 2], 4)
    reward = np.concatenate([np.full(4, 0.99), np.full(4, 0.1), [0.2, 0.4, 0.6, 0.8]])
    statistics = group_statistics(reward, group)
    ok = validity(statistics, ban=True, ban_std=0.02, ban_mean=0.9)
    np.testing.assert_array_equal(ok, group == 2)
    assert validity(statistics, ban=False, ban_std=0.02, ban_mean=0.9).all()
    # Uniformly bad is no reason to give a record up for good.
    np.testing.assert_array_equal(banned(group, statistics, ban_std=0.02, ban_mean=0.9), [0])


def test_rewards_normalised_one_by_one():
    group = np.repeat([0, 1], 6)
    rewards = {"judge": RNG.random(12), "pixel": 1e-3 * RNG.random(12)}
    ours = combined_advantages(rewards, {"judge": 3.0, "pixel": 1.0, "unused": 0.0}, group, eps=1e-9)
    parts = {k: advantages(v, group, eps=1e-9) for k, v in rewards.items()}
    np.testing.assert_allclose(ours, 0.75 * parts["judge"] + 0.25 * parts["pixel"], rtol=1e-12)
    with pytest.raises(UserError, match="aesthetic"):
        combined_advantages(rewards, {"aesthetic": 1.0}, group)


def routed_loop(x0, source, group, judged, share, clip, eps):
    e = -((x0 - source) ** 2).mean(-1)
    centred = np.empty_like(e)
    for i in range(len(e)):
        centred[i] = e[i] - e[group == group[i]].mean(0)
    rms = np.sqrt(np.average(centred**2, weights=1 - share))
    mixed = share * judged[:, None] + (1 - share) * centred / (rms + eps)
    return np.clip(mixed, -clip, clip) / (2 * clip) + 0.5


def test_routed_optimality_equals_the_loop():
    group = np.array([4, 4, 9, 4, 9, 9, 9])
    n = len(group)
    x0, source = (RNG.normal(size=(n, 6, 8)).astype(np.float32) for _ in range(2))
    share = {g: RNG.choice([0, 0.25, 1], 6) for g in (4, 9)}
    share = np.stack([share[g] for g in group]).astype(np.float32)
    judged = RNG.normal(size=n)
    r, weight = token_optimality(x0, source, group, judged, share, clip=2.0, inside_weight=4.0, eps=1e-3)
    assert r.dtype == weight.dtype == np.float32
    np.testing.assert_allclose(r, routed_loop(x0, source, group, judged, share, 2.0, 1e-3), atol=1e-5)
    np.testing.assert_allclose(weight, 1 + 3 * share)
    inside = share == 1
    np.testing.assert_allclose(r[inside], np.broadcast_to(optimality(judged, 2)[:, None], r.shape)[inside], atol=1e-6)


def test_routed_optimality_prefers_the_token_nearer_to_the_source():
    source = np.zeros((2, 3, 4), np.float32)
    x0 = source.copy()
    x0[1, 2] = 0.5
    r, _ = token_optimality(x0, source, [0, 0], [0.0, 0.0], np.zeros((2, 3)), clip=2.0)
    np.testing.assert_allclose(r[:, :2], 0.5)
    assert r[0, 2] > 0.5 > r[1, 2]


def test_routed_optimality_without_outside_or_with_unknown_samples():
    x0, source = (RNG.normal(size=(4, 3, 2)).astype(np.float32) for _ in range(2))
    judged = np.array([1.0, -1.0, 0.5, 9.0])
    everything = token_optimality(x0, source, [0] * 4, judged, np.ones((4, 3)), clip=2.0)[0]
    np.testing.assert_allclose(everything, np.broadcast_to(optimality(judged, 2)[:, None], (4, 3)), atol=1e-6)
    valid = np.array([1, 1, 1, 0])
    share = np.full((4, 3), 0.5)
    partial = token_optimality(x0, source, [0] * 4, judged, share, clip=2.0, valid=valid)[0]
    without = token_optimality(x0[:3], source[:3], [0] * 3, judged[:3], share[:3], clip=2.0)[0]
    np.testing.assert_allclose(partial[:3], without, atol=1e-6)
    np.testing.assert_allclose(partial[3], 0.5)


def test_bad_shapes_are_named():
    with pytest.raises(UserError, match="group has shape"):
        advantages([1.0, 2.0], [0])
    with pytest.raises(UserError, match="valid has shape"):
        advantages([1.0, 2.0], [0, 0], valid=[1])
    with pytest.raises(UserError, match="reward has shape"):
        group_statistics(np.ones((2, 2)), [0, 0])
    with pytest.raises(UserError, match="advantage_std is 'local'"):
        advantages([1.0, 2.0], [0, 0], std="local")
    with pytest.raises(UserError, match="inside_share"):
        token_optimality(np.zeros((2, 3, 4)), np.zeros((2, 3, 4)), [0, 0], [0, 0], np.zeros((2, 4)), clip=2.0)
    with pytest.raises(UserError, match="x0 and source"):
        token_optimality(np.zeros((2, 3, 4)), np.zeros((2, 3, 5)), [0, 0], [0, 0], np.zeros((2, 3)), clip=2.0)
