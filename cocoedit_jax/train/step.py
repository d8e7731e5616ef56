"""The optimizer step: one jitted call that scans micro-batches x timesteps and reduces gradients once.

Over the axes that split samples and tokens, data, fsdp and context, it is a manual ``shard_map``: every device sums the
gradients of its own samples and tokens over all micro-batches and timesteps, and one all-reduce follows. Layers fetch
the shards of their weights from the fsdp axis as they run (``models/parallel.py``). The tensor axis stays automatic
inside.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec

from cocoedit_jax.models import lora
from cocoedit_jax.models.editor import Conditioning, Editor, Grid
from cocoedit_jax.nft.objective import ObjectiveInputs, get_objective, reduce_global, reduce_micro
from cocoedit_jax.nft.policy import blend
from cocoedit_jax.nft.presets import NFTConfig
from cocoedit_jax.sharding.mesh import SAMPLE_AXES, replicated, sample_shards
from cocoedit_jax.sharding.rules import adapter_shardings, manual_specs

Array = jax.Array
Tree = Any

_REFERENCE = 2**32 - 1  # a random stream beside those of the sample indices


@flax.struct.dataclass
class TrainState:
    """All that changes. ``ema`` is None when the preset keeps no average."""

    theta: Tree  # adapter being trained
    old: Tree  # adapter that samples
    ema: Tree | None
    opt_state: Any
    step: Array  # optimizer steps taken


@flax.struct.dataclass
class StepBatch:
    """The samples of one optimizer step, ``[M, micro, ...]``; ``micro`` is split over the axes of samples.

    Rows past the last sample have ``valid`` 0; micro-batches past ``StepScalars.num_micro`` are not computed.
    """

    x0: Array  # sampled packed latents [.., n, c]
    conditioning: Conditioning
    preserve_latent: Array  # [.., h, w], 1 = keep
    r: Array  # optimality [..] or [.., n]
    token_weight: Array  # [.., n]
    tau_pos: Array
    tau_neg: Array
    valid: Array  # 1 or 0
    sample: Array  # global sample index, int32


@flax.struct.dataclass
class StepScalars:
    """Numbers of one step that must not trigger a recompilation."""

    num_micro: Array  # micro-batches to compute
    count: Array  # valid samples over all of them
    old_decay: Array
    ema_decay: Array
    key: Array  # random key of this step


def sample_timesteps(key: Array, sigmas: Array, num: int, choice: str) -> Array:
    """``num`` of the sampler's sigmas for one sample: a random subset, or one from each of ``num`` equal slices."""
    if choice == "permutation":
        return jax.random.permutation(key, sigmas)[:num]
    edges = np.linspace(0, len(sigmas), num + 1)
    offset = jax.random.uniform(key, (num,))
    low, width = jnp.asarray(edges[:-1], jnp.float32), jnp.asarray(np.diff(edges), jnp.float32)
    return sigmas[jnp.floor(low + offset * width).astype(jnp.int32).clip(0, len(sigmas) - 1)]


def reference_pairs(key: Array, num_micro: Array, shape: tuple[int, int], fraction: float) -> Array:
    """Which (micro-batch, timestep) pairs get a reference forward: bool ``shape``, of the first ``num_micro`` rows.

    Systematic sampling over the pairs in random order: each is chosen with probability ``fraction``, so what is summed
    over the chosen ones and divided by ``fraction`` is unbiased (Horvitz and Thompson 1952); and the number chosen is
    ``fraction`` times that of the pairs, rounded up or down.
    """
    order_key, start_key = jax.random.split(key)
    order = jax.random.uniform(order_key, shape)
    order = jnp.where(jnp.arange(shape[0])[:, None] < num_micro, order, 2.0).ravel()
    rank = jnp.argsort(jnp.argsort(order)).astype(jnp.float32)
    start = jax.random.uniform(start_key)
    chosen = jnp.floor((rank + 1) * fraction + start) > jnp.floor(rank * fraction + start)
    return chosen.reshape(shape)


def make_optimizer(learning_rate: float, weight_decay: float, max_grad_norm: float) -> optax.GradientTransformation:
    """AdamW after clipping by global norm, constant learning rate, as the released code."""
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=weight_decay),
    )


def init_state(
    key: Array, transformer: Tree, cfg: NFTConfig, lora_cfg: lora.LoraConfig, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step; ``transformer`` are the base's parameters, or their shapes."""
    theta = lora.init_adapter(key, transformer, lora_cfg)
    copy = lambda: jax.tree.map(jnp.copy, theta)  # noqa: E731 - donated buffers must not be shared
    ema = copy() if cfg.ema_decay > 0 else None
    return TrainState(theta, copy(), ema, optimizer.init(theta), jnp.zeros((), jnp.int32))


def make_train_step(
    editor: Editor,
    grid: Grid,
    sigmas: np.ndarray,
    cfg: NFTConfig,
    lora_cfg: lora.LoraConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    sharded_adapters: bool = False,
) -> Callable[[TrainState, Tree, StepBatch, StepScalars], tuple[TrainState, dict[str, Array], Tree]]:
    """The jitted step ``(state, params, batch, scalars) -> (state, metrics, finite)``.

    ``finite`` is a tree of flags, one for each gradient; if any is False, or the loss or a norm is not finite, the
    returned state is the given one, unchanged. ``state`` is donated.

    Args:
        sharded_adapters: adapters and optimizer state are placed by ``adapter_shardings(.., sharded=True)``; they are
            whole only while gradients are made. Otherwise every device holds them.
    """
    editor.check_sigmas(sigmas)
    objective = get_objective(cfg.objective)
    trained = sigmas[:-1] if cfg.train_at_pure_noise or len(sigmas) == 2 else sigmas[sigmas < 1][:-1]
    levels = jnp.asarray(trained, jnp.float32)
    num_timesteps = cfg.num_timesteps(len(sigmas) - 1)
    micro_reduction = cfg.valid_reduction == "micro"
    num_shards = sample_shards(mesh)
    some_pairs = cfg.kl_weight > 0 and cfg.kl_fraction < 1

    def velocity(params: Tree, adapter: Tree | None, x_t: Array, t: Array, conditioning: Conditioning) -> Array:
        folded = None if adapter is None else lora.fold_scale(adapter, lora_cfg)
        return editor.velocity(params, folded, x_t, t, conditioning, grid)

    def micro_loss(
        theta: Tree, old: Tree, params: Tree, rows: StepBatch, t: Array, noise: Array, with_ref: Array,
        scalars: StepScalars,
    ) -> tuple[Array, dict[str, Array]]:  # fmt: skip
        x_t = (1 - t[:, None, None]) * rows.x0 + t[:, None, None] * noise
        v_theta = velocity(params, theta, x_t, t, rows.conditioning)
        if cfg.old_decay_type == 0:  # the old policy is the trained one, bit for bit: no second forward
            v_old = jax.lax.stop_gradient(v_theta)
        else:
            v_old = jax.lax.stop_gradient(velocity(params, old, x_t, t, rows.conditioning))
        v_ref = ref_weight = None
        if cfg.kl_weight > 0:
            reference = functools.partial(velocity, params, None, x_t, t, rows.conditioning)
            if some_pairs:  # all devices choose the same pairs, so they meet in the collectives of this forward
                v_ref = jax.lax.cond(with_ref, reference, lambda: jnp.zeros_like(v_theta))
                ref_weight = jnp.broadcast_to(with_ref.astype(jnp.float32) / cfg.kl_fraction, t.shape)
            else:
                v_ref = reference()
            v_ref = jax.lax.stop_gradient(v_ref)
        output = objective(
            ObjectiveInputs(
                x0=rows.x0,
                x_t=x_t,
                source=rows.conditioning.source,
                t=t,
                v_old=v_old,
                v_theta=v_theta,
                v_ref=v_ref,
                ref_weight=ref_weight,
                preserve_latent=rows.preserve_latent,
                r=rows.r,
                token_weight=rows.token_weight if cfg.r_granularity == "token" else None,
                tau_pos=rows.tau_pos,
                tau_neg=rows.tau_neg,
                patch=grid.patch,
            ),
            cfg,
        )

        def reduce(values: Array) -> Array:
            # Either way, summed over micro-batches, timesteps and devices this is a mean.
            if micro_reduction:
                micro_batches = scalars.num_micro.astype(jnp.float32) * (num_shards * num_timesteps)
                return reduce_micro(values, rows.valid) / micro_batches
            return reduce_global(values, rows.valid, scalars.count) / num_timesteps

        return reduce(output.loss), {"loss": reduce(output.loss)} | {k: reduce(v) for k, v in output.terms.items()}

    def accumulate(theta: Tree, old: Tree, params: Tree, batch: StepBatch, scalars: StepScalars) -> tuple[Tree, dict]:
        """Gradients and metrics of all micro-batches; runs on one share of the samples."""

        def one_timestep(carry: tuple, inputs: tuple, rows: StepBatch) -> tuple[tuple, None]:
            grads, metrics = jax.grad(micro_loss, has_aux=True)(theta, old, params, rows, *inputs, scalars)
            return jax.tree.map(jnp.add, carry, (grads, metrics)), None

        def one_micro_batch(index: Array, carry: tuple) -> tuple:
            rows = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), batch)

            def draw(sample: Array) -> tuple[Array, Array]:
                key = jax.random.fold_in(scalars.key, sample)
                time_key, noise_key = jax.random.split(key)
                noise = jax.random.normal(noise_key, (num_timesteps, *rows.x0.shape[1:]))
                return sample_timesteps(time_key, levels, num_timesteps, cfg.timestep_choice), noise

            t, noise = jax.vmap(draw, out_axes=1)(rows.sample)  # [T, micro], [T, micro, n, c]
            return jax.lax.scan(lambda c, xs: one_timestep(c, xs, rows), carry, (t, noise, with_ref[index]))[0]

        pairs = len(batch.valid), num_timesteps
        with_ref = jnp.ones(pairs, bool)
        if some_pairs:
            ref_key = jax.random.fold_in(scalars.key, _REFERENCE)
            with_ref = reference_pairs(ref_key, scalars.num_micro, pairs, cfg.kl_fraction)
        rows = jax.tree.map(lambda x: x[0], batch)
        example = rows, rows.valid.astype(jnp.float32), jnp.zeros(rows.x0.shape), with_ref[0, 0]
        shapes = jax.eval_shape(lambda: jax.grad(micro_loss, has_aux=True)(theta, old, params, *example, scalars))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        totals = jax.lax.fori_loop(0, scalars.num_micro, one_micro_batch, zeros)
        return jax.tree.map(lambda x: x[None], totals)

    def accumulate_everywhere(*inputs: Any) -> tuple[Tree, dict]:
        """``accumulate`` on all devices: gradients and metrics of each share, in front."""
        axes = (*SAMPLE_AXES, *editor.token_axes(inputs[3].conditioning, grid, mesh))
        everywhere, samples = PartitionSpec(), PartitionSpec(None, SAMPLE_AXES)
        weights = manual_specs(editor.network(editor.abstract()), mesh)
        return jax.shard_map(
            accumulate,
            mesh=mesh,
            in_specs=(everywhere, everywhere, weights, samples, everywhere),
            out_specs=(PartitionSpec(axes), PartitionSpec(SAMPLE_AXES)),  # metrics are the same along the others
            axis_names=frozenset(axes),
            check_vma=False,  # gradients of the replicated adapters stay local
        )(*inputs)

    def train_step(
        state: TrainState, params: Tree, batch: StepBatch, scalars: StepScalars
    ) -> tuple[TrainState, dict[str, Array], Tree]:
        shards = accumulate_everywhere(state.theta, state.old, editor.network(params), batch, scalars)
        # The one reduction over samples and tokens. It is written as a sum of shards outside the manual region because
        # a psum inside it does not compile when another mesh axis is automatic.
        grads, metrics = jax.tree.map(lambda x: x.sum(axis=0), shards)
        if sharded_adapters:
            grads = jax.lax.with_sharding_constraint(grads, adapter_shardings(grads, mesh, sharded=True))
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, opt_state = optimizer.update(grads, state.opt_state, state.theta)
        theta = optax.apply_updates(state.theta, updates)
        new = TrainState(
            theta=theta,
            old=blend(state.old, theta, scalars.old_decay),
            ema=None if state.ema is None else blend(state.ema, theta, scalars.ema_decay),
            opt_state=opt_state,
            step=state.step + 1,
        )
        metrics |= {
            "gradient_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "theta_norm": optax.tree.norm(theta),
        }
        finite = jax.tree.map(lambda g: jnp.all(jnp.isfinite(g)), grads)
        good = jnp.all(jnp.stack(jax.tree.leaves(finite)))
        for name in ("loss", "gradient_norm", "update_norm", "theta_norm"):
            good &= jnp.isfinite(metrics[name])
        new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
        return new, metrics, finite

    # Stated, so that the state comes back as it went in: another sharding would compile everything a second time.
    transformer = nn.unbox(editor.abstract())["transformer"]
    state = jax.eval_shape(lambda key: init_state(key, transformer, cfg, lora_cfg, optimizer), jax.random.key(0))
    placed = adapter_shardings(state, mesh, sharded=sharded_adapters), replicated(mesh), replicated(mesh)
    return jax.jit(train_step, donate_argnums=0, out_shardings=placed)
