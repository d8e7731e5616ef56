"""How activations are split over the ambient device mesh: the mesh that is in force while a network is being traced.

A network knows no mesh, so that one editor serves rollout and training under different layouts. Inside of
``jax.shard_map`` (the optimizer step) the mesh is in force by itself. Elsewhere whoever jits says so: within the jitted
function ``with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):``, or around the call ``with jax.set_mesh(mesh):``.
Without one, or on one device, everything here does nothing.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from cocoedit_jax.sharding.mesh import CONTEXT
from cocoedit_jax.sharding.rules import ACTIVATION_RULES, RULES

Array = jax.Array

BATCH, TOKENS, HEADS = "batch", "tokens", "heads"  # names in ``ACTIVATION_RULES``


def automatic_axes() -> dict[str, int]:
    """{axis of the ambient mesh that is not manual already: devices along it}; empty without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}


def platform() -> str:
    """Of the devices that will run what is being traced, "cpu", "gpu" or "tpu": the ambient mesh's, which may be ones
    that are not here, or else the default ones'."""
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    if mesh.empty or device is None or device.platform is None:
        return jax.default_backend()
    return device.platform


def context_size() -> int:
    """Devices that a sequence is split over."""
    return automatic_axes().get(CONTEXT, 1)


def activation_spec(names: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """The mesh axes of an activation by ``ACTIVATION_RULES``, out of the automatic ones; a dimension keeps the longest
    run of its axes whose product divides it."""
    sizes = automatic_axes()
    spec: list[Any] = []
    for name, length in zip(names, shape, strict=True):
        axes = tuple(axis for axis in ACTIVATION_RULES.get(name or "", ()) if axis in sizes)
        while axes and length % math.prod(sizes[axis] for axis in axes):
            axes = axes[:-1]
        spec.append(axes or None)
    return PartitionSpec(*spec)


def shards(axes: str | tuple[str, ...] | None) -> int:
    """Into how many shares an entry of ``activation_spec`` cuts its dimension."""
    sizes = automatic_axes()
    return math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def constrain_tokens(x: Array) -> Array:
    """States ``[B, S, D]``, with their tokens split over the context axis, so that every layer between two attentions
    works on its own share. Without that axis, or where it does not divide S, they stay as they are."""
    spec = activation_spec((BATCH, TOKENS, None), x.shape)
    return x if context_size() == 1 or spec[1] is None else jax.lax.with_sharding_constraint(x, spec)


# --- weights ---------------------------------------------------------------------------------------------------------
# Where a mesh axis is manual, a network is given each device's shards of its weights, and a layer fetches the rest of
# its own when it runs: one layer's are whole at a time. No gradient is reduced on the way back, as an automatic axis
# would: the base is frozen, and those of the adapters stay with the samples that made them.


def holds_shards() -> bool:
    """Whether weights may be shards that ``whole`` completes."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(axis in mesh.manual_axes and mesh.shape[axis] > 1 for axis in RULES.values())


def whole(shard: Array, names: Sequence[str | None], shape: Sequence[int]) -> Array:
    """The weight of ``shape`` and logical axis ``names``, fetched from the devices that hold the rest of ``shard``.

    Raises:
        ValueError: it is no shard of such a weight.
    """
    axes = [RULES[name] if name else None for name in names]
    missing = [dimension for dimension, size in enumerate(shape) if shard.shape[dimension] != size]

    def fetch(x: Array) -> Array:
        for dimension in missing:
            x = jax.lax.all_gather(x, axes[dimension], axis=dimension, tiled=True)
        return x

    others = automatic_axes()
    if missing and max(others.values(), default=1) > 1:
        # Those axes are made manual too: across automatic ones, every device would first fetch all of their shares.
        split = (axis in others and size % others[axis] == 0 for axis, size in zip(axes, shape, strict=True))
        spec = PartitionSpec(*(axis if divides else None for axis, divides in zip(axes, split, strict=True)))
        fetch = jax.shard_map(fetch, in_specs=spec, out_specs=spec, axis_names=frozenset(others), check_vma=False)
    weight = fetch(shard)
    if weight.shape != tuple(shape):
        raise ValueError(f"weight of {weight.shape} from shards of {shard.shape}; expected {tuple(shape)}")
    return weight


def not_whole_weights(primitive: Any, *_: Any, **__: Any) -> bool:
    """Rematerialisation policy: keep all but the weights that ``whole`` fetched, which would be those of all layers."""
    return primitive.name != jax.lax.all_gather_p.name


# --- joint sequences -------------------------------------------------------------------------------------------------
# [text, image] split over the context axis would have to be cut elsewhere than text and image themselves are, and every
# token sent to another device. Attention does not mind the order, so every device's share of the joint sequence is its
# share of the text, then its share of the image, and nothing is sent.


def _parts(num_text: int, num_image: int) -> int:
    size = context_size()
    return 1 if num_text % size or num_image % size else size


def join_streams(text: Array, image: Array) -> Array:
    """``[B, S_text, ...]`` and ``[B, S, ...] -> [B, S_text + S, ...]``, in the order of ``stream_order``."""
    parts = _parts(text.shape[1], image.shape[1])
    shares = [x.reshape(x.shape[0], parts, -1, *x.shape[2:]) for x in (text, image)]
    joint = jnp.concatenate(shares, axis=2)
    return joint.reshape(joint.shape[0], -1, *joint.shape[3:])


def split_streams(joint: Array, num_text: int) -> tuple[Array, Array]:
    """The inverse of ``join_streams``."""
    parts = _parts(num_text, joint.shape[1] - num_text)
    shares = joint.reshape(joint.shape[0], parts, -1, *joint.shape[2:])
    text, image = jnp.split(shares, [num_text // parts], axis=2)
    return tuple(x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (text, image))  # pyright: ignore


def stream_order(num_text: int, num_image: int) -> np.ndarray:
    """For each place of the joint sequence, which of [text, image] is there, int ``[S_text + S]``."""
    parts = _parts(num_text, num_image)
    text, image = np.split(np.arange(num_text + num_image), [num_text])
    return np.concatenate([text.reshape(parts, -1), image.reshape(parts, -1)], axis=1).reshape(-1)
