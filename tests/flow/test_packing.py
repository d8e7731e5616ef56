import jax.numpy as jnp
import numpy as np
import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.flow.packing import downsample_mask_nearest, pack, position_ids, token_share, unpack


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_unpack_inverts_pack_on_oblong_grids(p, kind):
    latents = kind(np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32))
    tokens = pack(latents, p)
    assert tokens.shape == (2, 96 // p**2, 3 * p**2)
    np.testing.assert_array_equal(unpack(tokens, 8, 12, p), latents)


def test_order_of_tokens_and_channels():
    b, h, w, channels, p = 2, 4, 6, 5, 2
    latents = np.arange(b * h * w * channels, dtype=np.float32).reshape(b, h, w, channels)
    tokens = pack(latents, p)
    for y in range(h):
        for x in range(w):
            for c in range(channels):
                token, feature = (y // p) * (w // p) + x // p, c * p * p + (y % p) * p + x % p
                np.testing.assert_array_equal(tokens[:, token, feature], latents[:, y, x, c])


def test_positions_match_the_token_order():
    ids = position_ids(2, 3, 1)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, [[1, 0, 0], [1, 0, 1], [1, 0, 2], [1, 1, 0], [1, 1, 1], [1, 1, 2]])


def test_masks_at_latent_resolution():
    mask = np.random.default_rng(1).random((2, 16, 24)).astype(np.float32)
    small = downsample_mask_nearest(mask, 8)
    assert small.shape == (2, 2, 3)
    assert small[1, 1, 2] == mask[1, 8, 16]
    share = token_share(mask, 4)
    assert share.shape == (2, 24)
    np.testing.assert_allclose(share[1, 1 * 6 + 2], mask[1, 4:8, 8:12].mean(), rtol=1e-6)


def test_bad_shapes_are_named():
    with pytest.raises(UserError, match="latent grid is 5x4"):
        pack(np.zeros((1, 5, 4, 3)), 2)
    with pytest.raises(UserError, match=r"\(1, 5, 12\)"):
        unpack(np.zeros((1, 5, 12)), 4, 4, 2)
    with pytest.raises(UserError, match="mask is 10x16"):
        downsample_mask_nearest(np.zeros((1, 10, 16)), 8)
