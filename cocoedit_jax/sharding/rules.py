"""The one table from logical axis names, written beside each weight, to mesh axes."""

from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RULES: dict[str, str | None] = {
    "layers": None,  # scanned: every device needs every layer in turn
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "modulation": "tensor",
}


def partition_spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The mesh axes of one array; a dimension that its mesh axis does not divide stays whole.

    Raises:
        KeyError: a logical name that is not in ``RULES``.
    """
    axes = [None if name is None else RULES[name] for name in names]
    return PartitionSpec(
        *(axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape, strict=True))
    )


def parameter_shardings(abstract: Any, mesh: Mesh) -> Any:
    """Shardings for a tree of boxed parameters (``editor.abstract()``); unboxed leaves are replicated."""

    def leaf(x: Any) -> NamedSharding:
        if isinstance(x, nn.LogicallyPartitioned):
            return NamedSharding(mesh, partition_spec(x.names, x.value.shape, mesh))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(leaf, abstract, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def sharded_shapes(abstract: Any, mesh: Mesh, dtype: Any = None) -> Any:
    """ShapeDtypeStructs with the shardings of the rule table, without boxes: what the weight loaders fill.

    Args:
        abstract: boxed parameters, as for ``parameter_shardings``.
        mesh: where they go.
        dtype: of all of them; None keeps each one's own.
    """
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype if dtype is None else dtype, sharding=sharding),
        nn.unbox(abstract),
        parameter_shardings(abstract, mesh),
    )
