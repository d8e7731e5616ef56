"""The device mesh: four named axes, always all four, so that every specification can name any of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cocoedit_jax.errors import UserError

DATA, FSDP, CONTEXT, TENSOR = AXES = ("data", "fsdp", "context", "tensor")
SAMPLE_AXES = (DATA, FSDP)  # both split samples; manual wherever the velocity network runs on samples


def arranged(devices: Sequence[Any], shape: Sequence[int]) -> np.ndarray:
    """``devices`` as an array of ``shape`` (sizes of ``AXES``).

    On TPUs neighbours on an axis are neighbours on the torus. Slices, or hosts of GPUs, are along the data axis, whose
    one reduction per step can take the slow network between them, or else the fsdp axis. Where no such order exists,
    and on CPUs, as they are given.
    """
    given = np.asarray(devices).reshape(shape)
    platform = devices[0].platform
    if platform == "cpu" or len(devices) == 1:
        return given
    islands = {d.process_index if platform == "gpu" else getattr(d, "slice_index", None) or 0 for d in devices}
    options: dict[str, Any] = {"devices": devices, "allow_split_physical_axes": True}
    try:
        if len(islands) == 1:
            return mesh_utils.create_device_mesh(shape, **options)
        for axis in map(AXES.index, SAMPLE_AXES):
            if shape[axis] % len(islands) == 0:
                across = [len(islands) if i == axis else 1 for i in range(len(AXES))]
                within = [size // n for size, n in zip(shape, across, strict=True)]
                options["process_is_granule"] = platform == "gpu"
                return mesh_utils.create_hybrid_device_mesh(within, across, **options)
    except (ValueError, NotImplementedError, AssertionError):
        pass  # some of a slice's devices, or sizes that its torus cannot be cut into
    return given


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over ``devices`` (default: all); sizes with a smaller product use the first ones. One size may be -1: it
    takes what the others leave.

    Raises:
        UserError: unknown axis, impossible size, or more devices asked for than there are.
    """
    devices = jax.devices() if devices is None else devices
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise UserError(f"mesh: unknown axis {unknown[0]!r}; expected some of {AXES}")
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    fixed = math.prod(size for size in shape if size != -1)
    given = dict(zip(AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UserError(f"mesh: {given}; expected whole numbers, at least 1, or -1 for one axis")
    if fixed > len(devices) or (-1 in shape and len(devices) % fixed):
        raise UserError(f"mesh: {given} does not fit {len(devices)} device(s); expected sizes whose product does")
    shape = [len(devices) // fixed if size == -1 else size for size in shape]
    devices = devices[: math.prod(shape)]
    # axis_types is stated because constructors disagree on the default.
    return Mesh(arranged(devices, shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def sample_shards(mesh: Mesh) -> int:
    """Into how many shares a batch of samples is split."""
    return math.prod(mesh.shape[axis] for axis in SAMPLE_AXES)


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The sharding of an array whose dimension ``axis`` counts samples."""
    return NamedSharding(mesh, PartitionSpec(*([None] * axis), SAMPLE_AXES))
