"""Rewards by name. A reward is one registered function from a batch of edits to a score and a validity flag each."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cocoedit_jax.errors import UserError
from cocoedit_jax.nft.presets import NFTConfig
from cocoedit_jax.rewards.judge import Judge, JudgeRequest, judge_scores
from cocoedit_jax.rewards.pixel import pixel_reward


@dataclass(frozen=True)
class EditBatch:
    """Edits to be scored, and what they were made from."""

    images: jax.Array | np.ndarray  # edited [B, H, W, 3] in [0, 1], on the accelerator unless `filled` is given
    sources: np.ndarray  # [B, H, W, 3] in [0, 1]
    preserve_masks: np.ndarray  # [B, H, W], 1 = keep
    records: Sequence[dict[str, Any]]  # prompt, id and extra of each
    # Of a short batch: [B', H, W, 3], of which images are the first rows; for rewards that are compiled for one B'.
    filled: jax.Array | None = None


# (edits, algorithm settings, judge) -> scores in [0, 1] and validity, [B] each. It runs in a thread of its own.
Reward = Callable[[EditBatch, NFTConfig, Judge], tuple[np.ndarray, np.ndarray]]
REWARDS: dict[str, Reward] = {}


def register_reward(name: str) -> Callable[[Reward], Reward]:
    """Decorator: make a reward a key of ``NFTConfig.reward_weights``. Raises UserError for a taken name."""

    def add(reward: Reward) -> Reward:
        if name in REWARDS:
            raise UserError(f"reward {name!r} is registered already; expected a new name")
        REWARDS[name] = reward
        return reward

    return add


def weighted_rewards(cfg: NFTConfig) -> dict[str, Reward]:
    """The rewards that ``cfg`` gives a weight. Raises UserError for a name that is not registered."""
    names = [name for name, weight in cfg.reward_weights.items() if weight > 0]
    unknown = sorted(set(names) - set(REWARDS))
    if unknown:
        raise UserError(f"reward_weights: {unknown[0]!r} is no reward; expected some of {sorted(REWARDS)}")
    return {name: REWARDS[name] for name in names}


@register_reward("judge")
def judge_reward(batch: EditBatch, cfg: NFTConfig, judge: Judge) -> tuple[np.ndarray, np.ndarray]:
    """The judge's score of every edit."""
    rows = zip(batch.sources, np.asarray(batch.images), batch.records, strict=True)
    requests = [JudgeRequest(source, image, r["prompt"], r["id"], r["extra"]) for source, image, r in rows]
    return judge_scores(judge, requests)


@register_reward("pixel")
def pixel_consistency_reward(batch: EditBatch, cfg: NFTConfig, judge: Judge) -> tuple[np.ndarray, np.ndarray]:
    """PSNR and SSIM to the source outside the edit mask (``rewards.pixel``), on the accelerator."""
    count, images = len(batch.records), batch.images if batch.filled is None else batch.filled
    rows = np.minimum(np.arange(len(images)), count - 1)
    sources, masks = jnp.asarray(batch.sources[rows]), jnp.asarray(batch.preserve_masks[rows])
    out = _jitted_pixel_reward()(jnp.asarray(images), sources, masks, cfg)
    return np.asarray(out.score, np.float64)[:count], np.asarray(out.valid)[:count]


@functools.cache
def _jitted_pixel_reward() -> Callable[..., Any]:
    return jax.jit(pixel_reward, static_argnums=3)
