"""The frozen base, moved between the layouts of the phases that use it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from cocoedit_jax.models.quantize import is_kernel, quantize_placed, with_format
from cocoedit_jax.sharding.rules import parameter_shardings, sharded_shapes


def reshard(tree: Any, shardings: Any) -> Any:
    """``tree`` placed by ``shardings``; arrays that are placed differently are given up, one after another, so that
    both placements of all of them are never held at once."""

    def move(x: jax.Array, sharding: Any) -> jax.Array:
        if x.sharding.is_equivalent_to(sharding, x.ndim):
            return x
        moved = jax.block_until_ready(jax.device_put(x, sharding))
        x.delete()  # donated, it would be kept where its shards are of another size
        return moved

    return jax.tree.map(move, tree, shardings)


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
        another. Both stay on the devices, and share only what no mesh splits (``abstract`` has no axis names for it).
        """

        def leaf(target: Any, box: Any, x: jax.Array) -> Any:
            if is_kernel(target):
                return jax.block_until_ready(quantize_placed(x, target))
            # A move of one base gives up its arrays.
            return jnp.copy(x) if isinstance(box, nn.LogicallyPartitioned) else x

        wanted = sharded_shapes(abstract, self.mesh)
        return Base(jax.tree.map(leaf, wanted, abstract, self.params, is_leaf=is_kernel), abstract, self.mesh)
