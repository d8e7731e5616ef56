"""Networks on a context axis: the same numbers, less memory on each device, and no exchange but attention's."""

import contextlib
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cocoedit_jax.models import flux, qwen
from cocoedit_jax.models.blocks import BlockInputs, DoubleStreamBlock, StreamNames, stack
from cocoedit_jax.models.layers import rope_table
from cocoedit_jax.sharding.mesh import make_mesh

FLUX = flux.FluxConfig(4, 1, 1, 6, 4, 8, 4, False, (2, 2, 2))
QWEN = qwen.QwenConfig(4, 1, 6, 4, 8, (2, 2, 2), zero_cond_t=True)


def case(kind, num_text, num_image):
    """A transformer with random parameters as ``hidden -> velocity``, and ``hidden``."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    shapes = nn.unbox((flux if kind == "flux" else qwen).abstract_params(FLUX if kind == "flux" else QWEN))
    params = jax.tree.map(lambda x: 0.3 * draw(*x.shape), shapes)
    text, t, ids = draw(2, num_text, 8), jnp.asarray([0.3, 0.8]), rng.integers(0, 9, (num_text + num_image, 3))
    if kind == "flux":
        model, rest = flux.FluxTransformer(FLUX), (text, draw(2, 4), t, None, ids, num_image // 2)
    else:
        mask = jnp.asarray(np.arange(num_text) < np.array([[num_text], [1]]))
        model, rest = qwen.QwenTransformer(QWEN), (text, mask, t, ids, num_image // 2)
    return lambda hidden: model.apply({"params": params}, hidden, *rest), draw(2, num_image, 4)


def assert_one_devices(apply, hidden, sizes):
    def found(sizes):
        with contextlib.nullcontext() if sizes is None else jax.set_mesh(make_mesh(sizes)):
            return jax.tree.leaves(jax.jit(apply)(hidden))

    for a, b in zip(found(sizes), found(None), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    "kind, sizes", [("flux", {"data": 2, "context": 2, "tensor": 2}), ("qwen", {"context": 4})], ids=["flux", "qwen"]
)
def test_velocity_and_gradient_are_one_devices(kind, sizes):
    apply: Any
    apply, hidden = case(kind, 4, 8)
    assert_one_devices(jax.value_and_grad(lambda x: jnp.sum(apply(x) ** 2)), hidden, sizes)


@pytest.mark.parametrize("kind", ["flux", "qwen"])
def test_lengths_that_do_not_divide(kind):
    assert_one_devices(*case(kind, 3, 6), {"context": 4})


TEXT, IMAGE, HIDDEN, HEADS = 128, 896, 256, 4


def compiled_gradient(sizes, backend, remat="full"):
    """The gradient of two middling blocks by their inputs, compiled."""
    names = StreamNames("img_mod", "img_mlp"), StreamNames("txt_mod", "txt_mlp")
    blocks = stack(DoubleStreamBlock, 2, remat)(HIDDEN, 4 * HIDDEN, HEADS, *names, jnp.float32, backend)
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    streams, temb = (struct(1, IMAGE, HIDDEN), struct(1, TEXT, HIDDEN)), struct(1, HIDDEN)
    ids = np.arange(TEXT + IMAGE)[:, None]

    def apply(streams, temb, params):
        given = BlockInputs(temb, rope_table(ids, (HIDDEN // HEADS,), 100.0))
        return blocks.apply({"params": params}, streams, given)[0]

    def init(streams, temb):
        given = BlockInputs(temb, rope_table(ids, (HIDDEN // HEADS,), 100.0))
        return blocks.init(jax.random.key(0), streams, given)["params"]

    params = nn.unbox(jax.eval_shape(init, streams, temb))
    loss = lambda *inputs: sum(jnp.sum(x**2) for x in apply(*inputs))  # noqa: E731
    with jax.set_mesh(make_mesh(sizes)):
        return jax.jit(jax.grad(loss)).lower(streams, temb, params).compile()


def exchanged(compiled):
    """{kind of collective: numbers in its largest result on one device}."""
    largest = {}
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    for results, kind in re.findall(rf"= (.+?) ({kinds})(?:-start)?\(", compiled.as_text()):
        sizes = [math.prod(int(n) for n in dims.split(",")) for dims in re.findall(r"\[([\d,]+)\]", results)]
        largest[kind] = max([largest.get(kind, 0), *sizes])
    return largest


@pytest.mark.parametrize("backend", ["ulysses", "ring"])
def test_a_block_holds_and_sends_its_share(backend):
    whole, split = compiled_gradient({}, backend), compiled_gradient({"context": 4}, backend)
    assert exchanged(whole) == {}
    sent = exchanged(split)
    share = (TEXT + IMAGE) * HIDDEN // 4
    kind = "all-to-all" if backend == "ulysses" else "collective-permute"
    assert set(sent) == {kind} and sent[kind] <= share
    analyses: list[Any] = [x.memory_analysis() for x in (whole, split)]
    memory = [analysis.temp_size_in_bytes for analysis in analyses]
    assert memory[1] < 0.5 * memory[0]
