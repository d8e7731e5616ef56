"""What a step may leave out: counted where it runs, and what is learned stays what it was on average."""

import dataclasses

import jax
import numpy as np
import pytest

from cocoedit_jax.nft.presets import preset
from cocoedit_jax.sharding.mesh import AXES, batch_sharding, make_mesh, replicated
from cocoedit_jax.train import step as step_module
from cocoedit_jax.train.step import TrainState, make_train_step, reference_pairs
from tests.train.test_step import (
    ADAPTER,
    EDITOR,
    GRID,
    LORA,
    OPTIMIZER,
    SIGMAS,
    assert_trees_close,
    random_batch,
    random_params,
    run,
    scalars,
)

# The settings of a program that another test file compiles too.
KL = {"kl_weight": 0.1, "train_at_pure_noise": True}


@pytest.mark.parametrize(("fraction", "num_micro"), [(0.25, 3), (0.3, 5), (0.9, 5), (1 / 3, 1)])
def test_pairs_are_chosen_with_equal_probability(fraction, num_micro):
    keys = jax.random.split(jax.random.key(0), 4000)
    chosen = np.asarray(jax.vmap(lambda key: reference_pairs(key, num_micro, (5, 4), fraction))(keys))
    used = chosen[:, :num_micro]
    counts = used.sum(axis=(1, 2))
    wanted = num_micro * 4 * fraction
    assert set(counts.tolist()) <= {int(np.floor(wanted + 1e-6)), int(np.ceil(wanted - 1e-6))}
    np.testing.assert_allclose(used.mean(axis=0), fraction, atol=4 * np.sqrt(fraction * (1 - fraction) / len(keys)))
    # No pair is tied to another one: they are not chosen together more often than in a draw without replacement.
    flat = used.reshape(len(keys), -1)
    together = (flat.T @ flat.astype(int)) / len(keys)
    size = flat.shape[1]
    expected = (counts * (counts - 1)).mean() / (size * (size - 1))
    np.testing.assert_allclose(together[~np.eye(size, dtype=bool)], expected, atol=0.035)


def counted_forwards(monkeypatch, **changes) -> tuple[int, int]:
    """Forward passes of the network that one step executes, and those of the reference policy among them."""
    monkeypatch.setattr(step_module, "SAMPLE_AXES", AXES)  # callbacks need a program that is manual over all axes
    passes: list[bool] = []

    class Counting(type(EDITOR)):
        def velocity(self, params, adapter, x_t, *rest):
            jax.debug.callback(lambda: passes.append(adapter is None))
            return super().velocity(params, adapter, x_t, *rest)

    fields = {field.name: getattr(EDITOR, field.name) for field in dataclasses.fields(EDITOR)}
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    cfg = preset("cocoedit").replace(**changes)
    step = make_train_step(Counting(**fields), GRID, SIGMAS, cfg, LORA, OPTIMIZER, mesh)
    theta = jax.tree.map(np.asarray, ADAPTER)
    trained, old = (jax.tree.map(np.copy, theta) for _ in range(2))
    state = TrainState(trained, old, None, OPTIMIZER.init(theta), np.zeros((), np.int32))
    state = jax.device_put(state, replicated(mesh))
    batch = jax.device_put(random_batch(token_r=False), batch_sharding(mesh, axis=1))
    jax.block_until_ready(step(state, jax.device_put(random_params(EDITOR), replicated(mesh)), batch, scalars()))
    jax.effects_barrier()
    return len(passes), sum(passes)


@pytest.mark.parametrize(
    ("changes", "forwards", "reference"),
    [
        # 2 micro-batches x 2 timesteps x (trained, old, reference)
        pytest.param({}, 12, 4, marks=pytest.mark.slow),
        ({"kl_fraction": 0.25}, 9, 1),
        pytest.param({"kl_weight": 0.0, "old_decay_type": 0}, 4, 0, marks=pytest.mark.slow),
    ],
    ids=["all", "a quarter of the KL", "no KL, and old is trained"],
)
def test_what_is_left_out_is_not_executed(monkeypatch, changes, forwards, reference):
    assert counted_forwards(monkeypatch, **{"timestep_fraction": 0.7, **changes}) == (forwards, reference)


@pytest.mark.slow
def test_kl_of_a_fraction_is_that_of_all_on_average():
    """Same samples, noise and timesteps; only the choice of pairs differs from key to key."""
    keys = [dataclasses.replace(scalars(), key=jax.random.key(seed)) for seed in range(100, 125)]
    whole, part = (
        np.asarray([run("cocoedit", {"data": 1}, 1, None, s, **KL, kl_fraction=fraction)[1]["kl"] for s in keys])
        for fraction in (1.0, 0.25)
    )
    assert whole.min() > 0 and part.std() > whole.std()
    ratio = part / whole
    assert abs(ratio.mean() - 1) < 3 * ratio.std(ddof=1) / np.sqrt(len(keys)) < 0.4


@pytest.mark.slow
def test_devices_choose_the_same_pairs():
    """The forward that is left out holds collectives: a device that took part alone would wait for ever."""
    sharded = run("cocoedit", {"fsdp": 8}, **KL, kl_fraction=0.25)
    single = run("cocoedit", {"data": 1}, devices=1, **KL, kl_fraction=0.25)
    np.testing.assert_allclose(sharded[1]["kl"], single[1]["kl"], rtol=1e-5)
    assert single[1]["kl"] > 0
    assert_trees_close(sharded[0].opt_state[1][0].mu, single[0].opt_state[1][0].mu, 1e-5)
