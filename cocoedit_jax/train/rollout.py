"""Sampling groups of edits with the old policy, and scoring them while the next batch is being sampled."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from cocoedit_jax.data.groups import SamplePlan
from cocoedit_jax.flow.solvers import sample
from cocoedit_jax.models import parallel
from cocoedit_jax.models.editor import Conditioning, Editor, Grid
from cocoedit_jax.nft.presets import NFTConfig
from cocoedit_jax.rewards.judge import Judge, judge_hook
from cocoedit_jax.rewards.registry import EditBatch, weighted_rewards
from cocoedit_jax.sharding import processes
from cocoedit_jax.sharding.mesh import AXES, SAMPLE_AXES, batch_sharding, replicated
from cocoedit_jax.sharding.rules import manual_specs
from cocoedit_jax.sharding.shares import Shares, fetch, local_rows

Array = jax.Array
Encoder = Callable[[Any, Shares, np.ndarray, Any], Conditioning]
Sampler = Callable[[Any, Any, Conditioning, Array], tuple[Array, Array]]


@dataclass
class Rollout:
    """Everything known of the ``N`` samples of one step; arrays on the host unless said."""

    x0: np.ndarray  # sampled packed latents [N, n, c]
    own: np.ndarray  # the samples that this process judged, ascending [n]
    images: np.ndarray  # of those, [n, H, W, 3] in [0, 1]
    rewards: dict[str, np.ndarray]  # name -> [N], NaN where unknown
    reward_valid: dict[str, np.ndarray]  # name -> [N]
    judge_counters: dict[str, float]  # of the judges of all processes
    seconds_waiting: float = 0.0  # for rewards, after the last sample was drawn

    def with_rows(
        self, rows: np.ndarray, other: "Rollout", merge: Callable[[list[dict[str, float]]], dict[str, float]]
    ) -> "Rollout":
        """A copy whose samples ``rows`` are those of ``other``; with both waits, and both counters ``merge``d."""
        images = dict(zip(self.own.tolist(), self.images, strict=True))
        images = {i: images[i] for i in np.setdiff1d(self.own, rows)}
        images |= dict(zip(rows[other.own].tolist(), other.images, strict=True))
        own = np.asarray(sorted(images), np.int64)

        def put(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
            out = mine.copy()
            out[rows] = theirs
            return out

        return Rollout(
            put(self.x0, other.x0),
            own,
            np.stack([images[i] for i in own]) if len(own) else self.images[:0],
            {name: put(value, other.rewards[name]) for name, value in self.rewards.items()},
            {name: put(value, other.reward_valid[name]) for name, value in self.reward_valid.items()},
            merge([self.judge_counters, other.judge_counters]),
            self.seconds_waiting + other.seconds_waiting,
        )


def make_encoder(editor: Editor, mesh: Mesh) -> Encoder:
    """``(params, shares, images [n, H, W, 3], text inputs [n]) -> conditioning [G]``, whole on every device.

    Images and texts are those of the records that this process loads, ``shares.groups``.
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

    def run(params: Any, shares: Shares, images: np.ndarray, text_inputs: Any) -> Conditioning:
        encoders = {name: params[name] for name in ("autoencoder", "text")}
        encoded = encode(encoders, *shares.place((images, text_inputs)))
        return encoded.take(jnp.asarray(shares.position))

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

    def pop_counters(self) -> dict[str, float]:
        """What the judge counted since the last call."""
        return judge_hook(self._judge, "pop_counters")() or {}

    def merged_counters(self, counters: Sequence[dict[str, float]]) -> dict[str, float]:
        """One run's from each process's: sums; of those that the judge calls ``averaged``, means by ``scored``."""
        averaged = getattr(self._judge, "averaged", ())
        total: dict[str, float] = {}
        for name in sorted({name for own in counters for name in own}):
            having = [own for own in counters if name in own]
            if name in averaged:
                weights = [max(own.get("scored", 0.0), 1e-9) for own in having]
                total[name] = float(np.average([own[name] for own in having], weights=weights))
            else:
                total[name] = float(sum(own[name] for own in having))
        return total

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
    shares: Shares,
    progress: Callable[[int], object] = lambda n: None,
) -> Rollout:
    """Samples every row of ``plan`` in the batches of ``shares``; judging overlaps with sampling.

    Every process judges its own samples. Rewards are gathered once, after the last of them.

    A short last batch repeats its last row, so that every batch has one shape; the copies are not scored.

    Args:
        conditioning: of the distinct records of the step, in the order of ``plan.group``; encoded once each.
        batch: those records (``image`` ``[G]`` of ``[H, W, 3]``, where this process loads them; ``edit_mask``
            ``[G, H, W]``; ``prompt``, ``id``, ``extra``).
        adapter: the old policy with its scale folded in.
        progress: called with the number of samples after each batch.
    """
    latents, edited, pending = [], [], []
    for batch_number, samples in enumerate(np.minimum(shares.batches, len(plan) - 1)):
        keys = sample_keys(key, plan.sample[samples])
        x0, images = sampler(params, adapter, conditioning.take(jnp.asarray(plan.group[samples])), keys)
        images, judged = local_rows(images, shares.rows), shares.judged(batch_number)
        whole = None
        if len(judged) < len(shares.rows):  # cut on the host, where another number of rows is no other program
            whole, images = images, np.asarray(images)[: len(judged)]
        group = plan.group[samples[judged]]
        if len(group):
            records = [{name: batch[name][g] for name in ("prompt", "id", "extra")} for g in group]
            sources = np.stack([batch["image"][g] for g in group])
            pending.append(queue.submit(EditBatch(images, sources, 1 - batch["edit_mask"][group], records, whole)))
        latents.append(x0)
        edited.append(images)
        progress(len(judged))
    x0 = np.concatenate([fetch(x) for x in latents])[shares.order]
    own = shares.own
    images = np.concatenate([np.asarray(x) for x in edited])[np.argsort(own)]
    start_waiting = time.perf_counter()

    def results() -> dict[str, Any]:
        scores = {name: [futures[name].result() for futures in pending] for name in (pending[0] if pending else ())}
        return {
            "samples": own.tolist(),
            "rewards": {name: np.concatenate([s for s, _ in parts]).tolist() for name, parts in scores.items()},
            "valid": {name: np.concatenate([v for _, v in parts]).tolist() for name, parts in scores.items()},
            "counters": queue.pop_counters(),
        }

    parts = processes.gather("rewards", results)
    found = [part for part in parts if part["samples"]]
    order = np.argsort(np.concatenate([part["samples"] for part in found]))

    def all_of(kind: str, dtype: Any) -> dict[str, np.ndarray]:
        names = found[0][kind]
        return {name: np.concatenate([np.asarray(part[kind][name], dtype) for part in found])[order] for name in names}

    return Rollout(
        x0=x0,
        own=np.sort(own),
        images=images,
        rewards=all_of("rewards", np.float64),
        reward_valid=all_of("valid", bool),
        judge_counters=queue.merged_counters([part["counters"] for part in parts]),
        seconds_waiting=time.perf_counter() - start_waiting,
    )
