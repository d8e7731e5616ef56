"""From rewards to the batch of one optimizer step: advantages, validity, bans, dropping, micro-batches."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cocoedit_jax.data.groups import SamplePlan
from cocoedit_jax.flow.packing import downsample_mask_nearest, token_share
from cocoedit_jax.models.editor import Conditioning, Editor, Grid
from cocoedit_jax.nft import advantage as adv
from cocoedit_jax.nft.presets import NFTConfig
from cocoedit_jax.rewards.blend import blend
from cocoedit_jax.train.rollout import Rollout
from cocoedit_jax.train.step import StepBatch


@dataclass
class Judged:
    """What the rewards say of the ``N`` samples of a step."""

    reward: np.ndarray  # weighted total [N], NaN where unknown
    r: np.ndarray  # optimality [N] or [N, n]
    token_weight: np.ndarray  # [N, n]
    valid: np.ndarray  # takes part in the loss [N]
    banned: list[str]  # record ids (or prompts) to leave out from now on
    metrics: dict[str, float]


@dataclass
class Drawn:
    """The samples of one step and what is known of them."""

    grid: Grid
    plan: SamplePlan
    batch: dict[str, Any]  # the step's distinct records, as loaded
    conditioning: Conditioning  # of those records
    rollout: Rollout
    judged: Judged


def group_keys(plan: SamplePlan, batch: dict[str, Any], cfg: NFTConfig) -> np.ndarray:
    """The key of every sample's group ``[N]``: its record id, or (released code) its instruction text."""
    return np.asarray([batch["id" if cfg.group_key == "record" else "prompt"][g] for g in plan.group])


def judge_rollout(rollout: Rollout, plan: SamplePlan, batch: dict[str, Any], source: np.ndarray, grid: Grid,
                  factor: int, cfg: NFTConfig) -> Judged:  # fmt: skip
    """Rewards -> advantages -> optimality; ``source`` are the packed source latents of the step's records."""
    keys = group_keys(plan, batch, cfg)
    reward, scored = blend(rollout.rewards, cfg.reward_weights, rollout.reward_valid)
    drawn = len(np.unique(keys))
    _, index, counts = np.unique(keys[scored], return_inverse=True, return_counts=True)
    scored[np.flatnonzero(scored)[counts[index] < cfg.min_group]] = False
    statistics = adv.group_statistics(reward, keys, valid=scored)
    informative = scored & adv.validity(statistics, ban=cfg.ban, ban_std=cfg.ban_std, ban_mean=cfg.ban_mean)
    if cfg.reward_normalise == "per_reward":
        advantage = adv.combined_advantages(
            rollout.rewards, cfg.reward_weights, keys, std=cfg.advantage_std, valid=scored
        )
    else:
        advantage = adv.advantages(reward, keys, std=cfg.advantage_std, valid=scored)

    share = np.asarray(token_share(_latent_mask(batch["edit_mask"], factor), grid.patch))[plan.group]
    if cfg.r_granularity == "token":
        r, token_weight = adv.token_optimality(
            rollout.x0,
            source[plan.group],
            keys,
            advantage,
            share,
            clip=cfg.adv_clip,
            inside_weight=cfg.routed_inside_weight,
            eps=cfg.routed_rms_eps,
            mode=cfg.adv_mode,
            valid=scored,
        )
    else:
        r = adv.optimality(advantage, cfg.adv_clip, cfg.adv_mode).astype(np.float32)
        token_weight = np.ones_like(share, np.float32)

    finished: list[str] = []
    if cfg.ban and scored.any():
        known = adv.GroupStatistics(statistics.mean[scored], statistics.std[scored])
        finished = [str(k) for k in adv.banned(keys[scored], known, ban_std=cfg.ban_std, ban_mean=cfg.ban_mean)]
    metrics = {f"reward/{name}": float(np.nanmean(v)) for name, v in rollout.rewards.items() if np.isfinite(v).any()}
    if scored.any():
        metrics |= {
            "reward/total": float(reward[scored].mean()),
            "reward/std": float(reward[scored].std()),
            "reward/group_std": float(statistics.std[scored].mean()),
            "advantage/abs_mean": float(np.abs(advantage[scored]).mean()),
            "optimality/mean": float(r[scored].mean()),
            "optimality/std": float(r[scored].std()),
        }
    metrics |= {
        "samples/drawn": float(len(reward)),
        "samples/unscored": float((~np.isfinite(reward)).sum()),
        "samples/used": float(informative.sum()),
        "groups/dropped": float(drawn - (counts >= cfg.min_group).sum()),
        "groups/banned_now": float(len(finished)),
    }
    return Judged(reward, r, token_weight, informative, finished, metrics)


def _latent_mask(edit_mask: np.ndarray, factor: int) -> jax.Array:
    return downsample_mask_nearest(jnp.asarray(edit_mask, jnp.float32), factor)


def pack_step(
    editor: Editor,
    rollout: Rollout,
    judged: Judged,
    plan: SamplePlan,
    batch: dict[str, Any],
    conditioning: Conditioning,
    cfg: NFTConfig,
    micro_batch: int,
    rng: np.random.Generator,
) -> tuple[StepBatch, int, int]:
    """The step's samples, shuffled, as ``[M, micro_batch, ...]`` host arrays.

    With ``invalid="drop"`` invalid samples are left out and the rest moved up, so that they cost nothing; ``M`` stays
    the same, so nothing recompiles.

    Returns:
        the batch, the number of micro-batches that hold samples, and the number of valid samples.
    """
    order = rng.permutation(len(plan))
    if cfg.invalid == "drop":
        order = order[judged.valid[order]]
    capacity = -(-len(plan) // micro_batch) * micro_batch
    rows = np.zeros(capacity, np.int64)
    rows[: len(order)] = order
    valid = np.zeros(capacity, np.float32)
    valid[: len(order)] = judged.valid[order]

    group = plan.group[rows]
    types = [batch["edit_type"][g] for g in group]
    tau_pos, tau_neg = cfg.taus(types)
    preserve = np.asarray(_latent_mask(1 - batch["edit_mask"], editor.autoencoder.factor))
    # NumPy where the class says JAX: they become JAX arrays when they are put on the devices.
    arrays: dict[str, Any] = dict(
        x0=rollout.x0[rows],
        conditioning=jax.tree.map(lambda x: np.asarray(x)[group], conditioning),
        preserve_latent=preserve[group],
        r=judged.r[rows],
        token_weight=judged.token_weight[rows],
        tau_pos=tau_pos,
        tau_neg=tau_neg,
        valid=valid,
        sample=plan.sample[rows].astype(np.int32),
    )
    host = jax.tree.map(lambda x: x.reshape(-1, micro_batch, *x.shape[1:]), StepBatch(**arrays))
    return host, -(-len(order) // micro_batch), int(valid.sum())
