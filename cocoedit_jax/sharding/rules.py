"""The one table from logical axis names, written beside each weight and activation, to mesh axes."""

from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cocoedit_jax.sharding.mesh import CONTEXT, FSDP, SAMPLE_AXES, TENSOR

RULES: dict[str, str | None] = {
    "layers": None,  # scanned: every device needs every layer in turn
    "embed": FSDP,
    "heads": TENSOR,
    "mlp": TENSOR,
    "modulation": TENSOR,
}
# Of activations, outermost mesh axis first.
ACTIVATION_RULES: dict[str, tuple[str, ...]] = {
    "batch": SAMPLE_AXES,
    "tokens": (CONTEXT,),
    "heads": (TENSOR,),
}
# Of adapters and optimizer state where they are not replicated: their longest dimension.
ADAPTER_AXIS = FSDP


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


def manual_specs(abstract: Any, mesh: Mesh) -> Any:
    """For ``jax.shard_map`` that is manual in ``SAMPLE_AXES``: of each of ``parameter_shardings``, those axes."""
    return jax.tree.map(
        lambda s: PartitionSpec(*(axis if axis in SAMPLE_AXES else None for axis in s.spec)),
        parameter_shardings(abstract, mesh),
    )


def adapter_shardings(tree: Any, mesh: Mesh, *, sharded: bool = False) -> Any:
    """Shardings of adapters, optimizer state and whatever else is in ``tree``: replicated, or every array of at least
    two dimensions split over ``ADAPTER_AXIS``."""
    size = mesh.shape[ADAPTER_AXIS]

    def leaf(x: Any) -> NamedSharding:
        dimensions = [d for d in range(x.ndim) if x.shape[d] % size == 0] if sharded and x.ndim > 1 else []
        largest = max(dimensions, key=lambda d: x.shape[d], default=None)
        return NamedSharding(mesh, PartitionSpec(*(ADAPTER_AXIS if d == largest else None for d in range(x.ndim))))

    return jax.tree.map(leaf, tree)


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
