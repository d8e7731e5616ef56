"""The frozen base, moved between the layouts of the phases that use it."""

import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from cocoedit_jax.models.layers import MODULATION
from cocoedit_jax.models.quantize import is_kernel, quantize_placed, with_format
from cocoedit_jax.sharding.rules import parameter_shardings, sharded_shapes


@functools.cache
def _placer(sharding: Any) -> Any:
    return jax.jit(lambda x: x, out_shardings=sharding)


def _placed_anew(x: jax.Array, sharding: Any) -> jax.Array:
    """A copy of ``x`` that is placed by ``sharding`` and shares no memory with it."""
    if _devices(x.sharding) == _devices(sharding):
        return _placer(sharding)(x)  # between the devices
    # Meshes of a TPU slice may have its chips in different orders, which no program takes. device_put may go over the
    # host, and keeps the shards that stay where they are, which would go with ``x``.
    return jnp.copy(jax.device_put(x, sharding))


def _devices(sharding: Any) -> list[Any]:
    mesh: Any = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return [sharding] if mesh is None else list(mesh.devices.flat)


def reshard(tree: Any, shardings: Any) -> Any:
    """``tree`` placed by ``shardings``; arrays that are placed differently are given up, one after another, so that
    both placements of all of them are never held at once."""

    def move(x: jax.Array, sharding: Any) -> jax.Array:
        if x.sharding.is_equivalent_to(sharding, x.ndim):
            return x
        moved = jax.block_until_ready(_placed_anew(x, sharding))
        x.delete()  # donated, it would be kept where its shards are of another size
        return moved

    return jax.tree.map(move, tree, shardings)


@jax.jit
def _checksums(arrays: list[jax.Array]) -> list[jax.Array]:
    """A uint32 of every array: its elements' bits, each times an odd number that tells its place, summed modulo 2^32.
    Whole numbers add up alike in every order, so on every mesh."""

    def checksum(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
        place = jnp.zeros(x.shape, jnp.uint32)  # as a sum over axes: a reshape would gather what is split
        for axis, size in enumerate(x.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return jnp.sum(bits * (jnp.uint32(2) * place + jnp.uint32(1)), dtype=jnp.uint32)

    return [checksum(x) for x in arrays]


def weights_fingerprint(params: Any) -> str:
    """16 hex digits that tell one base from another: names, shapes, dtypes and every bit of the arrays in it.

    Read where the arrays are, once; the same in every layout and for any number of processes. Only arrays that are as
    they were stored count: what loading computes, quantised kernels and modulation tables, may differ in the last
    digits on another chip.
    """
    stored = {name: tree for name, tree in params.items() if name != MODULATION}
    named = jax.tree_util.tree_flatten_with_path(stored, is_leaf=is_kernel)[0]
    named = [(jax.tree_util.keystr(path), x) for path, x in named if not is_kernel(x)]
    sums = jax.device_get(_checksums([x for _, x in named]))
    lines = [f"{name} {x.dtype} {x.shape} {int(total)}" for (name, x), total in zip(named, sums, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


class Base:
    """The parameters of the frozen base, by the rule table on the mesh of whichever phase used them last.

    Attributes:
        params: as they are placed now; arrays got earlier are gone after a move.
        mesh: where.
    """

    def __init__(self, params: Any, abstract: Any, mesh: Mesh):
        """``abstract``: ``editor.abstract()``, with logical axis names."""
        self.params, self.mesh, self._abstract = params, mesh, abstract

    def on(self, mesh: Mesh, quantize: str = "") -> Any:
        """The parameters on ``mesh``, over the same devices; moved there if they are elsewhere.

        ``quantize``: another format, of those that store the same numbers, in which quantised kernels are multiplied.
        """
        if mesh != self.mesh:
            self.params = reshard(self.params, parameter_shardings(self._abstract, mesh))
            self.mesh = mesh
        return with_format(self.params, quantize) if quantize else self.params

    def quantized(self, abstract: Any) -> "Base":
        """A second base, with the kernels of this one, of full precision, quantised as in ``abstract``, one stack after
        another. Both stay on the devices and share nothing: a move of one gives up its arrays.
        """

        def leaf(target: Any, x: jax.Array) -> Any:
            return jax.block_until_ready(quantize_placed(x, target)) if is_kernel(target) else jnp.copy(x)

        wanted = sharded_shapes(abstract, self.mesh)
        return Base(jax.tree.map(leaf, wanted, self.params, is_leaf=is_kernel), abstract, self.mesh)
