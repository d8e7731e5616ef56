import jax.numpy as jnp
import numpy as np
import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.nft.regions import erode, region_weights, weighted_mse


def test_erosion_is_a_minimum_filter_that_spares_the_border():
    mask = np.random.default_rng(0).random((2, 9, 7)).astype(np.float32)
    expected = np.empty_like(mask)
    for y in range(9):
        for x in range(7):
            expected[:, y, x] = mask[:, max(0, y - 2) : y + 3, max(0, x - 2) : x + 3].min(axis=(1, 2))
    np.testing.assert_array_equal(erode(jnp.asarray(mask), 2), expected)
    np.testing.assert_array_equal(erode(jnp.asarray(mask), 0), mask)


def test_ring_belongs_to_both_regions():
    keep = np.ones((1, 12, 12), np.float32)
    keep[:, 3:9, 3:9] = 0
    preserve, edit = region_weights(jnp.asarray(keep), 1, 1, 0.2)
    row = [1, 1, 0.2, 0.2, 0, 0, 0, 0, 0.2, 0.2, 1, 1]
    np.testing.assert_allclose(preserve[0, 5], row, atol=1e-6)
    np.testing.assert_allclose(edit[0, 5], [0, 0, 0.2, 0.2, 1, 1, 1, 1, 0.2, 0.2, 0, 0], atol=1e-6)


def test_without_erosion_the_weights_are_the_mask():
    keep = jnp.asarray(np.random.default_rng(1).integers(0, 2, (2, 6, 6)), jnp.float32)
    preserve, edit = region_weights(keep, 0, 0, 0.2)
    np.testing.assert_array_equal(preserve, keep)
    np.testing.assert_array_equal(edit, 1 - keep)


def test_one_sided_masks_have_no_ring():
    preserve, edit = region_weights(jnp.ones((1, 6, 6)), 2, 2, 0.2)
    assert np.all(np.asarray(preserve) == 1) and np.all(np.asarray(edit) == 0)


def test_weighted_mean_square():
    rng = np.random.default_rng(2)
    a, b = (rng.normal(size=(2, 3, 4, 5)).astype(np.float32) for _ in range(2))
    w = rng.random((2, 3, 4)).astype(np.float32)
    w[1] = 0
    expected = np.average((a[0] - b[0]) ** 2, weights=np.broadcast_to(w[0][..., None], a[0].shape))
    np.testing.assert_allclose(weighted_mse(jnp.asarray(a), jnp.asarray(b), jnp.asarray(w)), [expected, 0], rtol=1e-5)


def test_bad_input_is_named():
    with pytest.raises(UserError, match="radius is -1"):
        erode(jnp.zeros((1, 4, 4)), -1)
    with pytest.raises(UserError, match="mask has shape"):
        erode(jnp.zeros((4, 4)), 1)
