"""Attention on a mesh: values and gradients are those of one device."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from cocoedit_jax.models import parallel
from cocoedit_jax.models.attention import attention, token_axes
from cocoedit_jax.sharding.mesh import DATA, make_mesh


def draw(batch=2, length=13, heads=4, dim=8, dtype=jnp.float32):
    """q, k, v, cotangent, and a ragged mask in which a whole share of the first sample's keys is hidden."""
    rng = np.random.default_rng(0)
    tensors = tuple(jnp.asarray(x, dtype) for x in rng.standard_normal((4, batch, length, heads, dim)))
    mask = rng.random((batch, length)) < 0.6
    mask[:, 5] = True
    mask[0, :4] = False
    return *tensors, jnp.asarray(mask)


def results(inputs, masked=True, mesh=None, wrap=lambda f: f, **options):
    """Output and gradients of q, k, v, float32; ``wrap`` is put around the differentiated function."""
    *tensors, mask = inputs

    def run(q, k, v, cotangent, mask):
        def loss(q, k, v):
            out = attention(q, k, v, key_mask=mask if masked else None, **options)
            return jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32)), out

        grads, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, *grads

    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        found = jax.jit(wrap(run))(*tensors, mask)
    return [np.asarray(x, np.float32) for x in found]


def assert_same(found, expected, dtype=jnp.float32):
    for name, a, b in zip(("out", "q", "k", "v"), found, expected, strict=True):
        scale = np.abs(b).max()
        assert scale > 0
        np.testing.assert_allclose(a / scale, b / scale, atol=2e-6 if dtype == jnp.float32 else 0.02, err_msg=name)


CASES = [  # axes, shape, dtype, masked
    ({"context": 4}, {}, jnp.float32, True),  # a padded length, and a share without any key
    ({"context": 4}, {"length": 8}, jnp.float32, False),
    ({"context": 2, "tensor": 2, "data": 2}, {"length": 9}, jnp.bfloat16, True),
]


@pytest.mark.parametrize("backend", ["ulysses", "ring"])
@pytest.mark.parametrize("axes, shape, dtype, masked", CASES)
def test_split_sequences(backend, axes, shape, dtype, masked):
    inputs = draw(dtype=dtype, **shape)
    found = results(inputs, masked, make_mesh(axes), backend=backend, sharded=True)
    assert_same(found, results(inputs, masked, backend="xla"), dtype)


@pytest.mark.parametrize("backend", ["ulysses", "ring"])
def test_inside_a_manual_data_axis(backend):
    """As in the optimizer step: a shard_map over the data axis, inside of which the mesh is ambient."""
    mesh = make_mesh({"data": 2, "context": 2, "tensor": 2})
    everything = PartitionSpec(DATA)

    def wrap(run):
        return jax.shard_map(
            run, mesh=mesh, in_specs=everything, out_specs=everything, axis_names={DATA}, check_vma=False
        )

    inputs = draw()
    assert_same(results(inputs, wrap=wrap, backend=backend, sharded=True), results(inputs, backend="xla"))


@pytest.mark.parametrize("backend", ["blocked", "auto"])
def test_dimensions_that_do_not_divide_are_not_split(backend):
    inputs = draw(batch=3, heads=3)
    mesh = make_mesh({"data": 2, "context": 2, "tensor": 2})
    found = results(inputs, mesh=mesh, backend=backend, sharded=True)
    assert_same(found, results(inputs, backend="xla"))


def test_batch_is_split_over_data_and_fsdp():
    inputs = draw(batch=4)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert_same(results(inputs, mesh=mesh, sharded=True), results(inputs, backend="xla"))
    with jax.set_mesh(mesh):
        assert parallel.activation_spec(("batch", "tokens", "heads", None), (4, 8, 6, 5)) == PartitionSpec(
            ("data", "fsdp"), "context", "tensor", None
        )
        assert parallel.activation_spec(("batch", None), (2, 8)) == PartitionSpec("data", None)


def collectives(mesh, heads, backend="auto", grad=False):
    q, k, v, *_ = draw(heads=heads, length=16)
    attend = functools.partial(attention, backend=backend, sharded=True)
    with jax.set_mesh(mesh):
        text = jax.jit(attend).lower(q, k, v).as_text()
    return set(re.findall(r"stablehlo\.(all_to_all|collective_permute|all_gather)", text))


def test_choice_on_a_context_axis():
    mesh = make_mesh({"context": 4, "tensor": 2})
    assert collectives(mesh, heads=8) == {"all_to_all"}
    assert collectives(mesh, heads=4) == {"collective_permute"}  # two heads on a device, four devices of context
    assert collectives(mesh, heads=8, backend="ring") == {"collective_permute"}
    assert collectives(mesh, heads=8, backend="blocked") == set()
    with pytest.raises(ValueError, match="2 heads are not a multiple of 4 devices.*'ring'"):
        collectives(mesh, heads=4, backend="ulysses")


def test_cross_attention_is_refused_on_a_context_axis():
    q, k, v, *_ = draw()
    with jax.set_mesh(make_mesh({"context": 2})), pytest.raises(ValueError, match="13 queries and 12 keys"):
        attention(q, k[:, :12], v[:, :12], sharded=True)


@pytest.mark.parametrize(
    "backend, lengths, axes",
    [
        ("auto", (4, 24), ("context",)),
        ("ring", (4, 24), ("context",)),
        ("ulysses", (4, 24), ("context",)),
        ("auto", (6, 24), ()),  # text that four devices cannot share
        ("ring", (4, 22), ()),
        ("blocked", (4, 24), ()),  # takes whole sequences
    ],
)
def test_tokens_are_cut_by_the_caller_only_where_every_length_divides(backend, lengths, axes):
    assert token_axes(make_mesh({"context": 4, "data": 2}), backend, lengths) == axes
    assert token_axes(make_mesh({"data": 8}), backend, lengths) == ()


def test_a_backend_of_whole_sequences_refuses_shares():
    mesh = make_mesh({"context": 4})
    share = PartitionSpec(None, "context")
    run = jax.shard_map(
        lambda q, k, v: attention(q, k, v, backend="blocked", sharded=True),
        mesh=mesh, in_specs=share, out_specs=share, axis_names={"context"}, check_vma=False,
    )  # fmt: skip
    q, k, v, *_ = draw(length=8)
    with pytest.raises(ValueError, match="'blocked' on shares of tokens; expected one of .*'ring'"):
        jax.eval_shape(jax.jit(run), q, k, v)


def test_without_a_mesh_context_backends_are_the_local_one():
    inputs = draw()
    for backend in ("ring", "ulysses"):
        for a, b in zip(
            results(inputs, backend=backend, sharded=True), results(inputs, backend="blocked"), strict=True
        ):
            np.testing.assert_array_equal(a, b)


def test_platform_is_the_meshs():
    assert parallel.platform() == "cpu"
    devices = jax.sharding.AbstractMesh((2,), ("data",))
    with jax.sharding.use_abstract_mesh(devices):  # it does not say
        assert parallel.platform() == "cpu"


# --- joint sequences ---


@pytest.mark.parametrize("axes, num_text, num_image", [(None, 3, 5), ({"context": 4}, 4, 12), ({"context": 4}, 6, 8)])
def test_joint_sequences(axes, num_text, num_image):
    text = np.arange(2 * num_text * 3).reshape(2, num_text, 3)
    image = 1000 + np.arange(2 * num_image * 3).reshape(2, num_image, 3)
    with contextlib.nullcontext() if axes is None else jax.set_mesh(make_mesh(axes)):
        joint = parallel.join_streams(jnp.asarray(text), jnp.asarray(image))
        order = parallel.stream_order(num_text, num_image)
        back = parallel.split_streams(joint, num_text)
    np.testing.assert_array_equal(joint, np.concatenate([text, image], axis=1)[:, order])
    for found, expected in zip(back, (text, image), strict=True):
        np.testing.assert_array_equal(found, expected)
    if num_text % 4 == 0:  # each of four devices: its share of the text, then its share of the image
        np.testing.assert_array_equal(joint[:, :4], np.concatenate([text[:, :1], image[:, :3]], axis=1))
