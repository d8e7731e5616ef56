import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.flow.schedule import flow_match_sigmas
from cocoedit_jax.flow.solvers import SOLVERS, sample, solver_coefficients


def field(z, sigma):
    return np.sin(3.0 * z) * (0.5 + sigma) - 0.2 * z


def field_jax(z, sigma):
    return jnp.sin(3.0 * z) * (0.5 + sigma) - 0.2 * z


def dpm2_loop(z, sigmas):
    """The textbook form with exponentials and divided differences, in float64."""
    lam = [np.log((1 - s) / s) if 0 < s < 1 else (-np.inf if s == 1 else np.inf) for s in sigmas]
    last_x0, steps = None, len(sigmas) - 1
    for i in range(steps):
        s, s_next = sigmas[i], sigmas[i + 1]
        x0 = z - s * field(z, s)
        if i in (0, steps - 1):
            noise = (z - (1 - s) * x0) / s
            z = (1 - s_next) * x0 + s_next * noise
        else:
            h = lam[i + 1] - lam[i]
            ratio = (lam[i] - lam[i - 1]) / h
            d1 = 0.0 if np.isinf(ratio) else (x0 - last_x0) / ratio
            gain = (1 - s_next) * (np.exp(-h) - 1)
            z = s_next / s * z - gain * x0 - 0.5 * gain * d1
        last_x0 = x0
    return z


@pytest.mark.parametrize("first", [1.0, 0.9])
def test_dpm2_equals_the_textbook_loop(first):
    sigmas = flow_match_sigmas(9, 300) * first
    z = np.random.default_rng(0).normal(size=(2, 5, 3))
    ours = sample(field_jax, jnp.asarray(z, jnp.float32), sigmas, "dpm2")
    np.testing.assert_allclose(ours, dpm2_loop(z, sigmas), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["euler", "flow", "ddim", "dpm1"])
def test_first_order_solvers_are_euler(name):
    sigmas = flow_match_sigmas(7, 300)
    z = np.random.default_rng(1).normal(size=(2, 4))
    expected = z.copy()
    for s, s_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        expected = expected + (s_next - s) * field(expected, s)
    ours = sample(field_jax, jnp.asarray(z, jnp.float32), sigmas, name)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_second_order_is_closer_to_the_solution():
    z = jnp.asarray(np.random.default_rng(2).normal(size=(64,)), jnp.float32)
    exact = sample(field_jax, z, flow_match_sigmas(2000, 300), "euler")
    errors = {n: float(jnp.abs(sample(field_jax, z, flow_match_sigmas(20, 300), n) - exact).mean()) for n in SOLVERS}
    assert errors["dpm2"] < 0.5 * errors["euler"]


@pytest.mark.parametrize("name", SOLVERS)
def test_coefficients_keep_a_constant_and_end_at_the_prediction(name):
    coefficients = solver_coefficients(name, flow_match_sigmas(6, 300))
    assert coefficients.dtype == np.float64 and coefficients.shape == (6, 3)
    # A field with v = 0 leaves the state where it is: the three weights add up to 1.
    np.testing.assert_allclose(coefficients.sum(axis=1), 1.0, atol=1e-12)
    np.testing.assert_array_equal(coefficients[-1], [0.0, 1.0, 0.0])
    np.testing.assert_array_equal(coefficients[:2, 2], 0.0)


def test_trajectory_and_dtypes():
    sigmas = flow_match_sigmas(4, 64)
    z = jnp.ones((2, 3), jnp.bfloat16)
    seen = []

    def velocity(state, sigma):
        seen.append((state.dtype, sigma.dtype, sigma.shape))
        return field_jax(state, sigma).astype(jnp.bfloat16)

    final, states = jax.jit(lambda s: sample(velocity, s, sigmas, return_trajectory=True))(z)
    assert final.dtype == jnp.float32 and states.shape == (5, 2, 3)
    np.testing.assert_array_equal(states[0], np.ones((2, 3)))
    np.testing.assert_array_equal(states[-1], final)
    assert set(seen) == {(jnp.dtype("float32"), jnp.dtype("float32"), ())}


@pytest.mark.parametrize(
    ("name", "sigmas", "named"),
    [
        ("heun", [1, 0.5, 0], "solver is 'heun'"),
        ("dpm2", [1.0], "sigmas has shape"),
        ("dpm2", [1.0, 0.5, 0.5, 0.0], "strictly decreasing"),
        ("dpm2", [1.2, 0.5, 0.0], "strictly decreasing"),
    ],
)
def test_bad_input_is_named(name, sigmas, named):
    with pytest.raises(UserError, match=named):
        solver_coefficients(name, sigmas)
