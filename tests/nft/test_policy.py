import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.nft.policy import blend, ema_decay, old_policy_decay


@pytest.mark.parametrize(
    ("decay_type", "step", "expected"),
    [(0, 9, 0), (1, 1, 0.001), (1, 500, 0.5), (1, 1000, 0.5), (2, 74, 0), (2, 75, 0), (2, 175, 0.75), (2, 209, 0.999)],
)
def test_old_policy_decay(decay_type, step, expected):
    assert old_policy_decay(step, decay_type) == pytest.approx(expected)


def test_unknown_decay_type():
    with pytest.raises(UserError, match="old_decay_type is 3"):
        old_policy_decay(1, 3)


def test_blend_keeps_structure_and_dtype():
    old = {"a": jnp.ones((2,), jnp.bfloat16), "b": {"c": jnp.zeros((3,))}}
    theta = {"a": jnp.full((2,), 3.0, jnp.bfloat16), "b": {"c": jnp.ones((3,))}}
    mixed = jax.jit(blend)(old, theta, 0.25)
    assert mixed["a"].dtype == jnp.bfloat16
    np.testing.assert_allclose(mixed["a"].astype(jnp.float32), 2.5)
    np.testing.assert_allclose(mixed["b"]["c"], 0.75)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), blend(old, theta, 0.0), theta)))


def test_ema_decay():
    assert ema_decay(1) == pytest.approx(2 / 11)
    assert ema_decay(1000) == 0.9
    assert ema_decay(1000, cap=0.99) == 0.99
