import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cocoedit_jax.models.tiling import tiled_decode


def enlarge(z):
    return jnp.repeat(jnp.repeat(z, 2, axis=1), 2, axis=2)


@pytest.mark.parametrize("size", [(4, 4), (5, 4), (6, 7), (8, 13), (3, 9), (16, 10)])
def test_tiles_fit_together(size):
    """Where a pixel depends on its own cell only, overlapping tiles agree and blending changes nothing."""
    z = np.random.default_rng(0).standard_normal((2, *size, 3), np.float32)
    out = jax.jit(lambda z: tiled_decode(enlarge, z, 4, 2))(z)
    np.testing.assert_allclose(out, enlarge(z), rtol=1e-6, atol=1e-6)


def test_seams_fade_linearly():
    """Two tiles of different constants: the overlap runs from the first to the second."""

    def mean_of_tile(z):
        return enlarge(jnp.broadcast_to(jnp.mean(z, axis=(1, 2), keepdims=True), z.shape))

    z = np.zeros((1, 1, 14, 1), np.float32)
    z[:, :, 8:] = 1.0  # the second tile starts at 6: its mean is 6 / 8
    out = jax.jit(lambda z: tiled_decode(mean_of_tile, z, 8, 2))(z)[0, 0, :, 0]
    # The third tile holds cells 12 and 13, which the second has too.
    expected = [0.0] * 12 + [0.75 * i / 4 for i in range(4)] + [0.75] * 8 + [0.75 + 0.25 * i / 4 for i in range(4)]
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)


def test_one_compilation_for_tiles_of_one_shape():
    traced = []

    def decode(z):
        traced.append(z.shape)
        return enlarge(z)

    jax.eval_shape(lambda z: tiled_decode(decode, z, 4, 2), jnp.zeros((1, 13, 13, 2)))
    assert len(traced) == len(set(traced)) == 4  # whole, cut off on the right, below, and both
