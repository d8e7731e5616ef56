"""Sizes of named layouts, where they are refused, and moves between them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from cocoedit_jax.errors import UserError
from cocoedit_jax.models.quantize import quantize
from cocoedit_jax.models.qwen import QwenConfig
from cocoedit_jax.sharding.base import Base, weights_fingerprint
from cocoedit_jax.sharding.layouts import LAYOUTS, candidates, check_shape, layout_mesh, parse_layout
from cocoedit_jax.sharding.mesh import AXES, make_mesh, sample_shards
from cocoedit_jax.sharding.rules import adapter_shardings, parameter_shardings


@pytest.mark.parametrize(
    ("layout", "given", "sizes"),
    [
        ("replicated", {}, (8, 1, 1, 1)),
        ("fsdp", {}, (1, 8, 1, 1)),
        ("fsdp", {"data": 2}, (2, 4, 1, 1)),
        ("fsdp", {"data": -1, "fsdp": 2}, (4, 2, 1, 1)),
        ("data_fsdp", {}, (2, 4, 1, 1)),
        ("data_fsdp:fsdp=2", {}, (4, 2, 1, 1)),
        ("tensor:tensor=4", {}, (2, 1, 1, 4)),
        ("fsdp_tensor", {}, (1, 4, 1, 2)),
        ("fsdp_tensor:tensor=4", {"tensor": 0, "data": 2}, (2, 1, 1, 4)),
        ("fsdp_context", {}, (1, 4, 2, 1)),
        ("replicated", {"data": 2, "fsdp": 2}, (2, 2, 1, 1)),  # the first four devices
    ],
)
def test_sizes(layout, given, sizes):
    mesh = layout_mesh(layout, given)
    assert tuple(mesh.shape.values()) == sizes
    assert sample_shards(mesh) == sizes[0] * sizes[1]


@pytest.mark.parametrize(
    ("layout", "given", "message"),
    [
        ("zero", {}, "config.mesh.layout='zero'; expected one of .*'fsdp_tensor'"),
        ("fsdp:rows=2", {}, "'fsdp:rows=2'; expected"),
        ("fsdp:fsdp=-1", {}, "'fsdp:fsdp=-1'; expected"),
        ("fsdp_tensor:tensor=3", {}, "fsdp_tensor:tensor=3.*does not fit 8"),
        ("fsdp", {"fsdp": 16}, "'fsdp'.*does not fit 8"),
    ],
)
def test_refused(layout, given, message):
    with pytest.raises(UserError, match=message):
        layout_mesh(layout, given, field="config.mesh.layout")


def test_heads_must_divide():
    check_shape(layout_mesh("tensor:tensor=8"), QwenConfig(), "config.mesh")
    with pytest.raises(UserError, match="config.mesh: 4 devices on the tensor axis.*2 attention heads"):
        check_shape(layout_mesh("tensor:tensor=4"), QwenConfig(num_attention_heads=2), "config.mesh")


@pytest.mark.parametrize("devices", [1, 4, 6, 8])
def test_candidates_are_distinct_and_can_be_built(devices):
    found = list(candidates(devices, heads=6))
    assert len({tuple(sizes.values()) for _, sizes in found}) == len(found)
    for text, sizes in found:
        assert dict(layout_mesh(text, devices=jax.devices()[:devices]).shape) == sizes and set(sizes) == set(AXES)
        assert 6 % sizes["tensor"] == 0
    if devices == 8:
        assert {parse_layout(text)[0].purpose for text, _ in found} == {layout.purpose for layout in LAYOUTS.values()}


def boxed_tree():
    box = lambda x, *names: nn.LogicallyPartitioned(jnp.asarray(x), names)  # noqa: E731
    x = np.arange(8.0 * 16, dtype=np.float32).reshape(8, 16)
    return {"w": box(x, "embed", "mlp"), "scale": box(np.ones(8, np.float32), None)}


def on_host(boxed):
    """numpy arrays: what is placed from JAX arrays may share their memory."""
    return jax.tree.map(np.asarray, nn.unbox(boxed))


def test_the_base_moves_between_layouts_and_gives_up_the_old_placement():
    abstract, first, second = boxed_tree(), layout_mesh("fsdp_tensor"), layout_mesh("replicated")
    params = jax.device_put(nn.unbox(abstract), parameter_shardings(abstract, first))
    assert params["w"].sharding.shard_shape((8, 16)) == (2, 8)
    base = Base(params, abstract, first)
    assert base.on(first) is params and base.on(make_mesh({"fsdp": 4, "tensor": 2})) is params
    moved = base.on(second)
    assert base.mesh == second and moved is base.params
    assert moved["w"].sharding.is_fully_replicated and params["w"].is_deleted()
    assert not moved["scale"].is_deleted()  # was whole everywhere, and still is
    back = base.on(first)
    assert back["w"].sharding.spec == PartitionSpec("fsdp", "tensor")
    np.testing.assert_array_equal(back["w"], nn.unbox(abstract)["w"])


@pytest.mark.parametrize("shuffled", [False, True])
def test_every_layout_moves_to_every_other(shuffled):
    """Also where a device keeps its part, and where the meshes have the devices in different orders, as on TPUs."""
    abstract, host = boxed_tree(), on_host(boxed_tree())
    meshes = [layout_mesh(text) for text, _ in candidates(8)]
    if shuffled:
        order = [0, 4, 2, 6, 1, 5, 3, 7]
        meshes[1:] = [make_mesh(mesh.shape, [jax.devices()[i] for i in order]) for mesh in meshes[1:]]
        meshes = [meshes[0], *meshes[1::3]]
    for first, second in itertools.permutations(meshes, 2):
        base = Base(jax.device_put(host, parameter_shardings(abstract, first)), abstract, first)
        for mesh in (second, first):
            moved = base.on(mesh)["w"]
            assert moved.sharding.is_equivalent_to(parameter_shardings(abstract, mesh)["w"], 2)
            for shard in moved.addressable_shards:
                np.testing.assert_array_equal(shard.data, host["w"][shard.index])


def test_two_bases_move_apart_from_one_another():
    abstract = boxed_tree() | {"autoencoder": {"w": np.ones(4, np.float32)}}
    first, second = layout_mesh("fsdp"), make_mesh({"fsdp": 4, "context": 2}, jax.devices()[::-1])
    base = Base(jax.device_put(on_host(abstract), parameter_shardings(abstract, first)), abstract, first)
    other = base.quantized(abstract)
    other.on(second)
    for one, mesh in ((base, first), (other, second), (base, second), (other, first)):
        for leaf, expected in zip(jax.tree.leaves(one.on(mesh)), jax.tree.leaves(on_host(abstract)), strict=True):
            np.testing.assert_array_equal(leaf, expected)


def test_fingerprint_tells_bases_apart_and_no_layouts():
    abstract = boxed_tree()
    tree = nn.unbox(abstract)
    w, scale = np.asarray(tree["w"]), np.asarray(tree["scale"])
    swapped = w.copy()
    swapped[0, 0], swapped[7, 15] = w[7, 15], w[0, 0]
    one_bit = w.copy()
    one_bit[3, 5] = np.nextafter(w[3, 5], np.float32(99))
    others = [
        {"w": w, "norm": scale}, {"w": w.reshape(4, 32), "scale": scale}, {"w": w.T, "scale": scale},
        {"w": swapped, "scale": scale}, {"w": one_bit, "scale": scale}, {"w": w, "scale": scale.astype(jnp.bfloat16)},
    ]  # fmt: skip
    found = [weights_fingerprint(jax.tree.map(jnp.asarray, other)) for other in [tree, *others]]
    assert len(set(found)) == 7 and all(len(one) == 16 for one in found)
    for layout in ("fsdp_tensor", "replicated", "fsdp"):
        placed = jax.device_put(tree, parameter_shardings(abstract, layout_mesh(layout)))
        assert weights_fingerprint(placed) == found[0]


def test_fingerprint_counts_only_what_is_stored():
    stored = {"norm": jnp.ones(3)}
    kernels = [quantize(jnp.full((4, 4), value), "int8") for value in (1.0, 2.0)]
    prints = {weights_fingerprint({"transformer": stored | {"w": w}, "modulation": {"t": w.scale}}) for w in kernels}
    assert prints == {weights_fingerprint({"transformer": stored})}


def test_adapters_are_split_by_their_longest_dimension():
    mesh = layout_mesh("data_fsdp:fsdp=4")
    tree = {"a": jnp.zeros((2, 12, 3)), "b": jnp.zeros((2, 3, 8)), "odd": jnp.zeros((3, 3)), "count": jnp.zeros(())}
    specs = {k: s.spec for k, s in adapter_shardings(tree, mesh, sharded=True).items()}
    assert specs["a"] == PartitionSpec(None, "fsdp", None) and specs["b"] == PartitionSpec(None, None, "fsdp")
    assert not any(specs["odd"]) and not any(specs["count"])
    assert all(s.is_fully_replicated for s in adapter_shardings(tree, mesh).values())
