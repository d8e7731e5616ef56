"""How activations and weights are split over the ambient device mesh: the one in force while a network is being traced.

A network knows no mesh, so that one editor serves rollout and training under different layouts. Inside of
``jax.shard_map`` (sampler and optimizer step) the mesh is in force by itself. Elsewhere whoever jits says so: within
the jitted function ``with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):``, or around the call
``with jax.set_mesh(mesh):``. Without one, or on one device, everything here does nothing.
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
    return dict(jax.sharding.get_abstract_mesh().shape).get(CONTEXT, 1)


def tokens_are_shares() -> bool:
    """Whether the context axis is manual: then a transformer works on its device's tokens only (``share_tokens``)."""
    return context_size() > 1 and CONTEXT not in automatic_axes()


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


def constrain(x: Array, names: Sequence[str | None]) -> Array:
    """``x``, split by ``activation_spec`` and in no other way. Where there is nothing to split over, as it is."""
    if max(automatic_axes().values(), default=1) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(names, x.shape))


def constrain_tokens(x: Array) -> Array:
    """States ``[B, S, D]``, with their tokens split over the context axis where it divides S, so that every layer
    between two attentions works on its own share; and with all of their features on every device."""
    return constrain(x, (BATCH, TOKENS, None))


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


def _parts(num_text: int, num_image: int, size: int) -> int:
    return 1 if num_text % size or num_image % size else size


def join_streams(text: Array, image: Array) -> Array:
    """``[B, S_text, ...]`` and ``[B, S, ...] -> [B, S_text + S, ...]``, in the order of ``stream_order``."""
    parts = _parts(text.shape[1], image.shape[1], automatic_axes().get(CONTEXT, 1))
    shares = [x.reshape(x.shape[0], parts, -1, *x.shape[2:]) for x in (text, image)]
    joint = jnp.concatenate(shares, axis=2)
    return joint.reshape(joint.shape[0], -1, *joint.shape[3:])


def split_streams(joint: Array, num_text: int) -> tuple[Array, Array]:
    """The inverse of ``join_streams``."""
    parts = _parts(num_text, joint.shape[1] - num_text, automatic_axes().get(CONTEXT, 1))
    shares = joint.reshape(joint.shape[0], parts, -1, *joint.shape[2:])
    text, image = jnp.split(shares, [num_text // parts], axis=2)
    return tuple(x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (text, image))  # pyright: ignore


def stream_order(num_text: int, num_image: int) -> np.ndarray:
    """For each place of the joint sequence, which of [text, image] is there, int ``[S_text + S]``; of whole lengths."""
    parts = _parts(num_text, num_image, context_size())
    text, image = np.split(np.arange(num_text + num_image), [num_text])
    return np.concatenate([text.reshape(parts, -1), image.reshape(parts, -1)], axis=1).reshape(-1)


# --- shares of tokens ------------------------------------------------------------------------------------------------
# Where the context axis is manual, gradients of the adapters by a device's own tokens stay there until they are summed
# once; an automatic one sums those of every layer whenever they are made.


def share_tokens(x: Array, axis: int = 1) -> Array:
    """This device's share of the tokens along ``axis`` of a whole ``x``, where ``tokens_are_shares``; else ``x``.

    Raises:
        ValueError: a length that the context axis does not divide.
    """
    if not tokens_are_shares():
        return x
    size = context_size()
    if x.shape[axis] % size:
        raise ValueError(f"{x.shape[axis]} tokens on a context axis of {size}; expected a multiple")
    length = x.shape[axis] // size
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(CONTEXT) * length, length, axis)


def whole_tokens(x: Array) -> Array:
    """The inverse of ``share_tokens`` along axis 1. Every device goes on with the same tokens, so that the gradient of
    its own share is complete."""
    return _gathered(x) if tokens_are_shares() else x


@jax.custom_vjp
def _gathered(x: Array) -> Array:
    return jax.lax.all_gather(x, CONTEXT, axis=1, tiled=True)


_gathered.defvjp(lambda x: (_gathered(x), None), lambda _, gradient: (share_tokens(gradient),))
