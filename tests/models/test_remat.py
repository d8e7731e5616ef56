"""Remat policies: the same gradients, and what each of them keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cocoedit_jax.models.blocks import REMAT_POLICIES, BlockInputs, DoubleStreamBlock, StreamNames, stack
from cocoedit_jax.models.layers import rope_table
from cocoedit_jax.sharding.mesh import make_mesh

LAYERS, BATCH, TEXT, IMAGE, HEADS, HIDDEN = 2, 1, 4, 12, 2, 16
NAMES = StreamNames("img_mod", "img_mlp"), StreamNames("txt_mod", "txt_mlp")


def network(remat, backend="blocked"):
    """``(x, params) -> sum of squares``, and its inputs."""
    blocks = stack(DoubleStreamBlock, LAYERS, remat)(HIDDEN, 2 * HIDDEN, HEADS, *NAMES, jnp.float32, backend)
    rng = np.random.default_rng(0)
    text, image, temb = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((BATCH, TEXT, HIDDEN), (BATCH, IMAGE, HIDDEN), (BATCH, HIDDEN))
    )
    given = BlockInputs(temb, rope_table(np.arange(TEXT + IMAGE)[:, None], (HIDDEN // HEADS,), 100.0))
    shapes = jax.eval_shape(lambda key: blocks.init(key, (image, text), given)["params"], jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), shapes)

    def loss(streams, params):
        streams, _ = blocks.apply({"params": params}, streams, given)
        return sum(jnp.sum(x**2) for x in streams)

    return loss, ((image, text), params)


@pytest.fixture(scope="module")
def expected():
    loss, inputs = network("none", "xla")
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*inputs)


@pytest.mark.parametrize("remat", [name for name in REMAT_POLICIES if name != "none"])
def test_gradients_are_the_same(remat, expected):
    loss, inputs = network(remat)
    found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*inputs)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def saved(remat, backend="blocked"):
    """Numbers that the forward pass keeps for the backward pass."""
    loss, (streams, params) = network(remat, backend)
    residuals = jax.eval_shape(lambda x: jax.vjp(lambda x: loss(x, params), x)[1], streams)
    return sum(x.size for x in jax.tree.leaves(residuals))


def test_what_is_kept():
    tokens = LAYERS * BATCH * (TEXT + IMAGE)
    kept = {remat: saved(remat) for remat in ("none", "attention", "full", "offload")}
    # Attention's output, and one softmax statistic per head.
    assert kept["attention"] - kept["full"] == tokens * (HIDDEN + HEADS)
    assert kept["offload"] == kept["full"]
    assert kept["none"] > kept["attention"]
    assert saved("attention", "xla") - saved("full", "xla") == tokens * HIDDEN


@pytest.mark.parametrize("backend, shares", [("blocked", 1), ("ulysses", 2), ("ring", 2)])
def test_attention_is_not_run_again_where_it_is_kept(backend, shares):
    def maxima(remat):  # of softmax, which only the forward pass and its recomputation take
        loss, inputs = network(remat, backend)
        with jax.set_mesh(make_mesh({"context": shares})):
            return str(jax.make_jaxpr(jax.grad(loss))(*inputs)).count("= reduce_max[")

    once = 2 if backend == "ring" else 1  # its own keys, and the loop over those that come round
    assert (maxima("full"), maxima("attention")) == (2 * once, once)


def test_offload_places_block_inputs_on_the_host():
    loss, (streams, params) = network("offload")
    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(streams, params))
    for length in (TEXT, IMAGE):
        assert f"f32<host>[{LAYERS},{BATCH},{length},{HIDDEN}]" in jaxpr
    loss, _ = network("full")
    assert "<host>" not in str(jax.make_jaxpr(jax.grad(loss))(streams, params))
