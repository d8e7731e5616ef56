"""The frozen base, moved between the layouts of the phases that use it."""

from typing import Any

import jax
from jax.sharding import Mesh

from cocoedit_jax.sharding.rules import parameter_shardings


def reshard(tree: Any, shardings: Any) -> Any:
    """``tree`` placed by ``shardings``; arrays that are placed differently are given up, one after another, so that
    both placements of all of them are never held at once."""

    def move(x: jax.Array, sharding: Any) -> jax.Array:
        if x.sharding.is_equivalent_to(sharding, x.ndim):
            return x
        return jax.block_until_ready(jax.device_put(x, sharding, donate=True))

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

    def on(self, mesh: Mesh) -> Any:
        """The parameters on ``mesh``, over the same devices; moved there if they are elsewhere."""
        if mesh != self.mesh:
            self.params = reshard(self.params, parameter_shardings(self._abstract, mesh))
            self.mesh = mesh
        return self.params
