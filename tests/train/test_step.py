"""The optimizer step: what it computes; dropped samples cost nothing, NaN changes nothing. Layouts: test_layouts.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cocoedit_jax.models import lora
from cocoedit_jax.models.editor import Conditioning
from cocoedit_jax.models.quickstart import build_editor
from cocoedit_jax.models.text import TextStates
from cocoedit_jax.nft.objective import ObjectiveInputs, nft_objective
from cocoedit_jax.nft.policy import blend
from cocoedit_jax.nft.presets import PRESETS, NFTConfig, preset
from cocoedit_jax.sharding.mesh import batch_sharding, make_mesh, replicated
from cocoedit_jax.sharding.rules import parameter_shardings
from cocoedit_jax.train.step import (
    StepBatch,
    StepScalars,
    TrainState,
    make_optimizer,
    make_train_step,
    reference_pairs,
    sample_timesteps,
)
from tests.train.tiny import SIZE, random_params, tiny_quickstart

LORA = lora.LoraConfig(rank=2, alpha=4)
MICRO, NUM_MICRO = 8, 2
EDITOR = build_editor(tiny_quickstart())
GRID = EDITOR.grid(SIZE, SIZE)
SIGMAS = EDITOR.sigmas(3, GRID)
OPTIMIZER = make_optimizer(1e-3, 1e-4, 1.0)
ADAPTER = lora.init_adapter(jax.random.key(1), random_params(EDITOR)["transformer"], LORA)


def random_batch(token_r: bool, seed: int = 0) -> StepBatch:
    rng = np.random.default_rng(seed)
    shape = EDITOR.transformer.config

    def normal(*size: int) -> np.ndarray:
        return rng.standard_normal((NUM_MICRO, MICRO, *size)).astype(np.float32)

    def uniform(*size: int) -> np.ndarray:
        return rng.random((NUM_MICRO, MICRO, *size)).astype(np.float32)

    tokens = GRID.tokens
    return StepBatch(
        x0=normal(tokens, 48),
        conditioning=Conditioning(
            source=normal(tokens, 48),
            text=TextStates(
                normal(tiny_quickstart().max_words, shape.joint_attention_dim), normal(shape.pooled_projection_dim)
            ),
            guidance=np.ones((NUM_MICRO, MICRO), np.float32),
        ),
        preserve_latent=(uniform(SIZE, SIZE) > 0.3).astype(np.float32),
        r=uniform(tokens) if token_r else uniform(),
        token_weight=1 + uniform(tokens),
        tau_pos=np.full((NUM_MICRO, MICRO), 1e-3, np.float32),
        tau_neg=np.full((NUM_MICRO, MICRO), 2.0, np.float32),
        valid=np.ones((NUM_MICRO, MICRO), np.float32),
        sample=np.arange(NUM_MICRO * MICRO, dtype=np.int32).reshape(NUM_MICRO, MICRO),
    )


def scalars(count: int = NUM_MICRO * MICRO, num_micro: int = NUM_MICRO) -> StepScalars:
    return StepScalars(
        num_micro=jnp.asarray(num_micro, jnp.int32),
        count=jnp.asarray(count, jnp.float32),
        old_decay=jnp.asarray(0.25, jnp.float32),
        ema_decay=jnp.asarray(0.5, jnp.float32),
        key=jax.random.key(7),
    )


@functools.cache
def program(cfg: NFTConfig, sizes: tuple, devices: int):
    """Mesh and step function; compiled once for all tests that use them."""
    mesh = make_mesh(dict(sizes), jax.devices()[:devices])
    return mesh, make_train_step(EDITOR, GRID, SIGMAS, cfg, LORA, OPTIMIZER, mesh)


def setup(name: str, sizes: dict[str, int], devices: int = 8, **changes):
    """Step function, state and placed base parameters for a preset on a mesh."""
    cfg = preset(name).replace(**{"timestep_fraction": 0.7, **changes})
    unread = {"ban": True, "ban_std": 0.02}  # by the step, so that presets may share a program
    mesh, step = program(cfg.replace(**unread), tuple(sizes.items()), devices)
    params = random_params(EDITOR)
    params = jax.device_put(params, parameter_shardings(jax.eval_shape(EDITOR.init, jax.random.key(0)), mesh))
    theta = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.05), ADAPTER)
    old = jax.tree.map(lambda x: x * np.float32(0.9), theta)
    ema = jax.tree.map(np.copy, theta) if cfg.ema_decay else None
    state = TrainState(theta, old, ema, OPTIMIZER.init(theta), np.zeros((), np.int32))
    return cfg, mesh, step, jax.device_put(state, replicated(mesh)), params


def run(name: str, sizes: dict[str, int], devices: int = 8, batch: StepBatch | None = None, s=None, **changes):
    cfg, mesh, step, state, params = setup(name, sizes, devices, **changes)
    batch = random_batch(cfg.r_granularity == "token") if batch is None else batch
    placed = jax.device_put(batch, batch_sharding(mesh, axis=1))
    new, metrics, finite = step(state, params, placed, s or scalars())
    return jax.device_get((new, metrics, finite))


def assert_trees_close(a, b, rtol: float) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, atol=rtol * max(np.abs(y).max(), 1e-6), rtol=0)


SLOW_PRESETS = ("cocoedit-official", "diffusion-nft", "edit-r1")  # each has a program of its own


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_PRESETS else name for name in sorted(PRESETS)]
)
def test_every_preset_steps_and_the_old_policy_follows(name):
    cfg, _, _, state, _ = setup(name, {"data": 1}, devices=1)
    before = jax.device_get(state)
    new, metrics, finite = run(name, {"data": 1}, devices=1)
    assert all(np.isfinite(v) for v in metrics.values()) and all(jax.tree.leaves(finite))
    assert new.step == 1 and metrics["gradient_norm"] > 0
    assert_trees_close(new.old, blend(before.old, new.theta, 0.25), 1e-6)
    if cfg.ema_decay:
        assert_trees_close(new.ema, blend(before.ema, new.theta, 0.5), 1e-6)
    else:
        assert new.ema is None


TRAINED = {"kl_weight": 0.1, "train_at_pure_noise": True}


@functools.cache
def expected_step():
    """``(theta, old, params, batch, key, weight) -> (loss, gradient)`` without micro-batches or scans over timesteps of
    several policies: one (micro-batch, timestep) pair at a time, whose KL term has its own ``weight``."""
    cfg = preset("cocoedit").replace(timestep_fraction=0.7, **TRAINED)
    num, levels = cfg.num_timesteps(3), jnp.asarray(SIGMAS[:-1], jnp.float32)

    def loss(theta, old, params, batch, key, weight):
        def one_pair(total, pair):
            row, i = pair
            rows = jax.tree.map(lambda x: x[row], batch)
            keys = jax.vmap(lambda n: jax.random.split(jax.random.fold_in(key, n)))(rows.sample)
            t = jax.vmap(lambda k: sample_timesteps(k, levels, num, "permutation")[i])(keys[:, 0])
            noise = jax.vmap(lambda k: jax.random.normal(k, (num, *rows.x0.shape[1:]))[i])(keys[:, 1])
            x_t = (1 - t[:, None, None]) * rows.x0 + t[:, None, None] * noise

            def velocity(adapter):
                folded = None if adapter is None else lora.fold_scale(adapter, LORA)
                return EDITOR.velocity(params, folded, x_t, t, rows.conditioning, GRID)

            given = ObjectiveInputs(
                x0=rows.x0, x_t=x_t, source=rows.conditioning.source, t=t, v_old=velocity(old), v_theta=velocity(theta),
                v_ref=velocity(None), preserve_latent=rows.preserve_latent, r=rows.r, tau_pos=rows.tau_pos,
                tau_neg=rows.tau_neg, patch=GRID.patch,
            )  # fmt: skip
            whole, without = (nft_objective(given, c).loss.sum() for c in (cfg, cfg.replace(kl_weight=0.0)))
            return total + without + weight[row, i] * (whole - without), None

        pairs = jnp.asarray([(row, i) for row in range(NUM_MICRO) for i in range(num)]).T
        return jax.lax.scan(one_pair, jnp.float32(0), tuple(pairs))[0] / (num * NUM_MICRO * MICRO)

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("kl_fraction", [1.0, 0.25])
def test_the_step_is_the_sum_over_samples_and_timesteps(kl_fraction):
    """Against a plain loop: every sample's own timesteps and noise, three policies, one mean over all; the KL term of
    the chosen (micro-batch, timestep) pairs counts four times at a quarter of them."""
    changes = TRAINED | {"kl_fraction": kl_fraction}
    cfg, _, step, state, params = setup("cocoedit", {"data": 1}, devices=1, **changes)
    batch, s = random_batch(token_r=False), scalars()
    before = jax.device_get(state)
    chosen = np.ones((NUM_MICRO, cfg.num_timesteps(3)), bool)
    if kl_fraction < 1:
        chosen = np.asarray(reference_pairs(jax.random.fold_in(s.key, 2**32 - 1), NUM_MICRO, chosen.shape, kl_fraction))
        assert chosen.sum() == 1
    weight = (chosen / kl_fraction).astype(np.float32)
    expected, gradient = expected_step()(before.theta, before.old, params, batch, s.key, weight)
    new, metrics, _ = run("cocoedit", {"data": 1}, devices=1, **changes)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert metrics["kl"] > 1e-3 and metrics["deviation_old"] > 0
    norm = np.sqrt(sum(float(jnp.sum(jnp.square(g))) for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-4)
    clipped = jax.tree.map(lambda g: np.asarray(g) * np.float32(0.1 * min(1.0, 1.0 / norm)), gradient)  # (1 - beta_1)
    assert_trees_close(new.opt_state[1][0].mu, clipped, 1e-4)


def test_pure_noise_is_left_out_unless_asked_for():
    """At t = 1 the sampled latent is gone from x_t, and the error of predicting it largest."""
    assert SIGMAS[0] == 1
    errors = [
        float(run("cocoedit", {"data": 1}, devices=1, **changes)[1]["x0_error"])
        for changes in ({}, TRAINED)  # two levels of two, or of three; the KL term is not part of it
    ]
    assert errors[0] < 0.95 * errors[1]


def test_samples_left_out_do_not_count():
    """Invalid rows at the end, in a micro-batch that is not computed, give the step of the valid rows alone."""
    batch = random_batch(token_r=False)
    batch.valid[1] = 0
    short = run("cocoedit", {"data": 1}, devices=1, batch=batch, s=scalars(count=MICRO, num_micro=1))
    batch.x0[1] = np.nan  # would spoil everything if it were computed
    again = run("cocoedit", {"data": 1}, devices=1, batch=batch, s=scalars(count=MICRO, num_micro=1))
    weighted = random_batch(token_r=False)
    weighted.valid[1] = 0
    full = run("cocoedit", {"data": 1}, devices=1, batch=weighted, s=scalars(count=MICRO, num_micro=2))
    assert_trees_close(short[0].theta, again[0].theta, 0)
    assert_trees_close(short[0].opt_state[1][0].mu, full[0].opt_state[1][0].mu, 1e-5)


@pytest.mark.parametrize(("name", "weights"), [("cocoedit", (1 / 9, 8 / 9)), ("cocoedit-official", (1 / 2, 1 / 2))])
def test_global_and_micro_reduction_differ_as_documented(name, weights):
    """One valid sample in the first micro-batch, eight in the second: every sample, or every micro-batch, counts the
    same."""
    batch = random_batch(token_r=False)
    batch.valid[0, 1:] = 0
    swapped = jax.tree.map(lambda x: x[::-1].copy(), batch)
    losses = [
        run(name, {"data": 1}, 1, given, scalars(count, num_micro))[1]["loss"]
        for given, count, num_micro in ((batch, 9, 2), (batch, 1, 1), (swapped, 8, 1))
    ]
    np.testing.assert_allclose(losses[0], np.dot(weights, losses[1:]), rtol=1e-5)
    assert abs(losses[1] - losses[2]) > 0.01 * abs(losses[0])


def test_not_finite_leaves_the_state_and_names_the_gradients():
    batch = random_batch(token_r=False)
    batch.x0[0, 0] = np.nan
    _, _, _, state, _ = setup("cocoedit", {"data": 1}, devices=1)
    before = jax.device_get(state)
    new, metrics, finite = run("cocoedit", {"data": 1}, devices=1, batch=batch)
    assert not np.isfinite(metrics["loss"]) and not all(jax.tree.leaves(finite))
    assert_trees_close(new, before, 0)


def test_old_policy_type_zero_needs_no_second_forward():
    """With decay type 0 the old policy is the trained one: the old adapter is not read by the loss."""
    cfg, mesh, step, state, params = setup("cocoedit", {"data": 1}, devices=1, old_decay_type=0)
    placed = jax.device_put(random_batch(False), batch_sharding(mesh, axis=1))
    spoiled = state.replace(old=jax.tree.map(lambda x: x * 7, state.old), theta=jax.tree.map(jnp.copy, state.theta))
    a = jax.device_get(step(spoiled, params, placed, scalars())[1])
    _, _, _, fresh, _ = setup("cocoedit", {"data": 1}, devices=1, old_decay_type=0)
    b = jax.device_get(step(fresh, params, placed, scalars())[1])
    assert a["loss"] == b["loss"] and a["deviation_old"] == 0


def test_timesteps():
    levels = jnp.asarray(SIGMAS[:-1], jnp.float32)
    for choice in ("permutation", "stratified"):
        draws = jax.vmap(lambda k: sample_timesteps(k, levels, 2, choice))(jax.random.split(jax.random.key(0), 200))  # noqa: B023
        assert draws.shape == (200, 2)
        if choice == "permutation":
            assert all(len(set(np.asarray(d).tolist())) == 2 for d in draws)
        else:  # the first lies in the noisier half; the middle level belongs to both halves
            assert set(np.unique(np.asarray(draws[:, 0])).tolist()) == set(np.asarray(levels[:2]).tolist())
        values, counts = np.unique(np.asarray(draws), return_counts=True)
        assert values.tolist() == sorted(np.asarray(levels).tolist())
        np.testing.assert_allclose(counts / counts.sum(), 1 / 3, atol=0.06)  # every level equally often
