"""A FLUX transformer that fits a test: its shapes, random parameters, and a mesh of any kind for them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cocoedit_jax.models.flux import FluxConfig, abstract_params
from cocoedit_jax.sharding.mesh import make_mesh
from cocoedit_jax.sharding.rules import sharded_shapes

CONFIG = FluxConfig(4, 2, 3, 6, 2, 8, 4, True, (2, 2, 2))
# As diffusers writes it.
CONFIG_JSON = {
    "_class_name": "FluxTransformer2DModel",
    "_diffusers_version": "0.42.1",
    "attention_head_dim": 6,
    "axes_dims_rope": [2, 2, 2],
    "guidance_embeds": True,
    "in_channels": 4,
    "joint_attention_dim": 8,
    "num_attention_heads": 2,
    "num_layers": 2,
    "num_single_layers": 3,
    "out_channels": None,
    "patch_size": 1,
    "pooled_projection_dim": 4,
}


def random_params(dtype=jnp.float32, seed=0):
    """Every bit pattern of ``dtype``, NaNs and subnormal numbers too: what is copied must come out the same."""
    rng = np.random.default_rng(seed)
    size = np.dtype(dtype).itemsize
    return jax.tree.map(
        lambda x: rng.integers(0, 256, (*x.shape[:-1], x.shape[-1] * size), np.uint8).view(dtype),
        nn.unbox(abstract_params(CONFIG)),
    )


def normal_params(dtype=jnp.float32):
    """Numbers as weights are, for casts."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.standard_normal(x.shape, np.float32).astype(dtype), nn.unbox(abstract_params(CONFIG))
    )


def target(sizes, dtype=jnp.float32):
    return sharded_shapes(abstract_params(CONFIG), make_mesh(sizes), dtype)


def bits(array):
    return np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8)


def assert_same_bits(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        found = ours
        for key in path:
            found = found[key.key]
        assert (found.shape, found.dtype) == (leaf.shape, leaf.dtype), path
        np.testing.assert_array_equal(bits(found), bits(leaf), str(path))


def assert_placed_as(ours, abstract):
    assert jax.tree.map(lambda x: x.sharding, ours) == jax.tree.map(lambda x: x.sharding, abstract)
