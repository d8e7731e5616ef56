"""Sampling groups of edits with the old policy, and scoring them while the next batch is being sampled."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from cocoedit_jax.data.groups import SamplePlan
from cocoedit_jax.errors import UserError
from cocoedit_jax.flow.solvers import sample
from cocoedit_jax.models import parallel
from cocoedit_jax.models.editor import Conditioning, Editor, Grid
from cocoedit_jax.nft.presets import NFTConfig
from cocoedit_jax.rewards.judge import Judge
from cocoedit_jax.rewards.registry import EditBatch, weighted_rewards
from cocoedit_jax.sharding.mesh import AXES, SAMPLE_AXES, batch_sharding, replicated
from cocoedit_jax.sharding.rules import manual_specs

Array = jax.Array
Encoder = Callable[[Any, np.ndarray, Any], Conditioning]
Sampler = Callable[[Any, Any, Conditioning, Array], tuple[Array, Array]]


@dataclass
class Rollout:
    """Everything known of the ``N`` samples of one step; arrays on the host unless said."""

    x0: np.ndarray  # sampled packed latents [N, n, c]
    images: np.ndarray  # [N, H, W, 3] in [0, 1]
    rewards: dict[str, np.ndarray]  # name -> [N], NaN where unknown
    reward_valid: dict[str, np.ndarray]  # name -> [N]
    seconds_waiting: float = 0.0  # for rewards, after the last sample was drawn


def make_encoder(editor: Editor, mesh: Mesh) -> Encoder:
    """``(params, images [B, H, W, 3], text inputs) -> conditioning [B]``, whole on every device.

    Every device encodes its share of the images; ``B`` is filled up to a multiple of the devices.
    """
    shares = PartitionSpec(AXES)
    split = jax.shard_map(
        editor.encode,
        mesh=mesh,
        in_specs=(PartitionSpec(), shares, shares),
        out_specs=shares,
        axis_names=frozenset(AXES),
        check_vma=False,
    )
    encode = jax.jit(split, out_shardings=replicated(mesh))

    def run(params: Any, images: np.ndarray, text_inputs: Any) -> Conditioning:
        count = len(images)
        rows = np.minimum(np.arange(-(-count // mesh.size) * mesh.size), count - 1)
        filled = jax.tree.map(lambda x: np.asarray(x)[rows], (images, text_inputs))
        encoders = {name: params[name] for name in ("autoencoder", "text")}
        return jax.tree.map(lambda x: x[:count], encode(encoders, *filled))

    return run


def make_sampler(editor: Editor, grid: Grid, sigmas: np.ndarray, solver: str, mesh: Mesh) -> Sampler:
    """A jitted ``(params, folded adapter, conditioning [B], keys [B]) -> (x0 [B, n, c], images [B, H, W, 3])``.

    Every sample has its own key, so the noise does not depend on how samples are batched or spread over devices.
    Samples are split over the axes of samples, as in the optimizer step; their pictures over all devices, where ``B``
    divides.
    """
    editor.check_sigmas(sigmas)

    def draw(network: Any, adapter: Any, conditioning: Conditioning, keys: Array) -> Array:
        shape = (grid.tokens, editor.token_channels)
        # Latents are whole wherever a sample is: they are small, and how pictures are split must not spread to them.
        whole = lambda x: parallel.constrain(x, (parallel.BATCH, None, None))  # noqa: E731
        noise = whole(jax.vmap(lambda key: jax.random.normal(key, shape))(keys))

        def velocity(z: Array, sigma: Array) -> Array:
            return editor.velocity(network, adapter, z, jnp.full((z.shape[0],), sigma), conditioning, grid)

        return whole(sample(velocity, noise, sigmas, solver))

    everywhere, samples = PartitionSpec(), PartitionSpec(SAMPLE_AXES)
    weights = manual_specs(editor.network(editor.abstract()), mesh)

    def draw_and_decode(params: Any, adapter: Any, conditioning: Conditioning, keys: Array) -> tuple[Array, Array]:
        draw_shares = jax.shard_map(
            draw,
            mesh=mesh,
            in_specs=(weights, everywhere, samples, samples),
            out_specs=samples,
            axis_names=frozenset((*SAMPLE_AXES, *editor.token_axes(conditioning, grid, mesh))),
            check_vma=False,
        )
        x0 = draw_shares(editor.network(params), adapter, conditioning, keys)
        pictures = samples if len(x0) % mesh.size else PartitionSpec(AXES)
        decode = jax.shard_map(
            lambda autoencoder, x0: editor.decode({"autoencoder": autoencoder}, x0, grid),
            mesh=mesh,
            in_specs=(everywhere, pictures),
            out_specs=pictures,
            axis_names=frozenset(AXES),
            check_vma=False,
        )
        return x0, decode(params["autoencoder"], x0)

    return jax.jit(draw_and_decode, out_shardings=(batch_sharding(mesh), None))


def sample_keys(key: Array, index: np.ndarray) -> Array:
    """One random key per global sample index."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(index, jnp.int32))


class RewardQueue:
    """Scores batches of edits in the background, while the next batch is being sampled.

    ``batches``: most that are submitted before the first is done; none of them waits for another, because a judge's
    deadline starts with its call.
    """

    def __init__(self, judge: Judge, cfg: NFTConfig, batches: int = 4):
        self._judge, self._cfg = judge, cfg
        self._rewards = weighted_rewards(cfg)
        self._pool = ThreadPoolExecutor(max(4, batches * len(self._rewards)), thread_name_prefix="reward")

    def submit(self, batch: EditBatch) -> dict[str, Future]:
        """Starts scoring; for each reward a future of ``(scores, valid)``."""
        return {
            name: self._pool.submit(reward, batch, self._cfg, self._judge) for name, reward in self._rewards.items()
        }

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def collect(
    sampler: Sampler,
    params: Any,
    adapter: Any,
    conditioning: Conditioning,
    plan: SamplePlan,
    batch: dict[str, Any],
    key: Array,
    queue: RewardQueue,
    batch_size: int,
    progress: Callable[[int], object] = lambda n: None,
) -> Rollout:
    """Samples every row of ``plan`` in batches of ``batch_size``; judging overlaps with sampling.

    Args:
        conditioning: of the distinct records of the step, in the order of ``plan.group``; encoded once each.
        batch: those records as loaded (``image`` ``[G, H, W, 3]``, ``edit_mask``, ``prompt``, ``id``, ``extra``).
        adapter: the old policy with its scale folded in.
        progress: called with the number of samples after each batch.
    """
    if len(plan) % batch_size:
        raise UserError(f"rollout.batch_size={batch_size} does not divide the {len(plan)} samples of a step")
    keys = sample_keys(key, plan.sample)
    latents, edited, pending = [], [], []
    for start in range(0, len(plan), batch_size):
        rows = slice(start, start + batch_size)
        group = plan.group[rows]
        x0, images = sampler(params, adapter, conditioning.take(jnp.asarray(group)), keys[rows])
        records = [{name: batch[name][g] for name in ("prompt", "id", "extra")} for g in group]
        pending.append(queue.submit(EditBatch(images, batch["image"][group], 1 - batch["edit_mask"][group], records)))
        latents.append(x0)
        edited.append(images)
        progress(batch_size)
    x0, images = (np.concatenate([np.asarray(x) for x in parts]) for parts in (latents, edited))
    start_waiting = time.perf_counter()
    scores = {name: [futures[name].result() for futures in pending] for name in pending[0]}
    return Rollout(
        x0=x0,
        images=images,
        rewards={name: np.concatenate([score for score, _ in parts]) for name, parts in scores.items()},
        reward_valid={name: np.concatenate([valid for _, valid in parts]) for name, parts in scores.items()},
        seconds_waiting=time.perf_counter() - start_waiting,
    )
