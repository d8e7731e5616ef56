"""Deterministic solvers of the rectified-flow ODE, all written as one linear recurrence.

With ``x0hat_i = z_i - sigma_i * v(z_i, sigma_i)`` every solver here is
``z_{i+1} = a_i z_i + b_i x0hat_i + c_i x0hat_{i-1}``; the coefficients depend on the noise levels alone and are
computed on the host in float64.
"""

from collections.abc import Callable, Sequence
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from cocoedit_jax.errors import UserError

Array = jax.Array
VelocityFn = Callable[[Array, Array], Array]
CoefficientBuilder = Callable[[np.ndarray], np.ndarray]


def _first_order(sigmas: np.ndarray) -> np.ndarray:
    """Euler. For ``x_t = (1 - t) x0 + t noise`` DDIM (eta 0) and first-order DPM-Solver++ are the same step."""
    ratio = sigmas[1:] / sigmas[:-1]
    return np.stack([ratio, 1.0 - ratio, np.zeros_like(ratio)], axis=1)


def _dpm2(sigmas: np.ndarray) -> np.ndarray:
    """DPM-Solver++ 2M (arXiv 2211.01095), first order in the first and the last step as in the released code."""
    coefficients = _first_order(sigmas)

    def log_snr(sigma: float) -> float:
        return float(np.log1p(-sigma) - np.log(sigma))

    for i in range(1, len(sigmas) - 2):
        # sigma = 1 has log-SNR -inf: the ratio of steps is infinite and the correction vanishes.
        if sigmas[i - 1] >= 1.0:
            continue
        previous, here, following = (log_snr(s) for s in sigmas[i - 1 : i + 2])
        step_ratio = (here - previous) / (following - here)
        correction = 0.5 * coefficients[i, 1] / step_ratio
        coefficients[i, 1] += correction
        coefficients[i, 2] = -correction
    return coefficients


SOLVERS: dict[str, CoefficientBuilder] = {
    "euler": _first_order,
    "flow": _first_order,
    "ddim": _first_order,
    "dpm1": _first_order,
    "dpm2": _dpm2,
}


def solver_coefficients(name: str, sigmas: Sequence[float] | np.ndarray) -> np.ndarray:
    """Coefficients ``(a_i, b_i, c_i)`` of a solver.

    Args:
        name: a key of ``SOLVERS``.
        sigmas: noise levels ``[N + 1]`` in [0, 1], strictly decreasing; only the last may be 0.

    Returns:
        float64 ``[N, 3]``.

    Raises:
        UserError: for an unknown solver or unusable noise levels.
    """
    if name not in SOLVERS:
        raise UserError(f"solver is {name!r}; expected one of {sorted(SOLVERS)}")
    levels = np.asarray(sigmas, dtype=np.float64)
    if levels.ndim != 1 or len(levels) < 2:
        raise UserError(f"sigmas has shape {levels.shape}; expected a list of at least two noise levels")
    if not (np.all(np.diff(levels) < 0) and levels[0] <= 1.0 and levels[-1] >= 0.0):
        raise UserError(f"sigmas is {levels.tolist()}; expected strictly decreasing noise levels in [0, 1]")
    return SOLVERS[name](levels)


@overload
def sample(velocity_fn: VelocityFn, z: Array, sigmas: Sequence[float] | np.ndarray, solver: str = ...) -> Array: ...


@overload
def sample(
    velocity_fn: VelocityFn,
    z: Array,
    sigmas: Sequence[float] | np.ndarray,
    solver: str = ...,
    *,
    return_trajectory: Literal[True],
) -> tuple[Array, Array]: ...


def sample(
    velocity_fn: VelocityFn,
    z: Array,
    sigmas: Sequence[float] | np.ndarray,
    solver: str = "dpm2",
    *,
    return_trajectory: bool = False,
) -> Array | tuple[Array, Array]:
    """Integrate the ODE from ``z`` at ``sigmas[0]`` to ``sigmas[-1]``, one velocity call per step.

    Args:
        velocity_fn: ``(z, sigma) -> v`` with ``z`` float32 of the state's shape and ``sigma`` a float32 scalar.
        z: starting state of any shape, normally standard normal noise.
        sigmas: host array ``[N + 1]``, see ``solver_coefficients``.
        solver: a key of ``SOLVERS``.
        return_trajectory: also return every state.

    Returns:
        The final state, float32, shape of ``z``; with ``return_trajectory`` the pair ``(final, states)``, where
        ``states`` is ``[N + 1, *z.shape]`` and includes the start.

    Raises:
        UserError: as ``solver_coefficients``.
    """
    coefficients = jnp.asarray(solver_coefficients(solver, sigmas), jnp.float32)
    levels = jnp.asarray(np.asarray(sigmas)[:-1], jnp.float32)
    start = z.astype(jnp.float32)

    def step(carry: tuple[Array, Array], inputs: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array | None]:
        state, previous = carry
        sigma, (a, b, c) = inputs
        x0_hat = state - sigma * velocity_fn(state, sigma).astype(jnp.float32)
        following = a * state + b * x0_hat + c * previous
        return (following, x0_hat), following if return_trajectory else None

    (final, _), states = jax.lax.scan(step, (start, jnp.zeros_like(start)), (levels, coefficients))
    if states is not None:
        return final, jnp.concatenate([start[None], states])
    return final
