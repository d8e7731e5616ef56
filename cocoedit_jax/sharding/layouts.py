"""Named layouts: how many devices go to each mesh axis.

A layout is written ``NAME``, or ``NAME:AXIS=SIZE,AXIS=SIZE`` where its own sizes are not what is wanted:
``fsdp_tensor:tensor=4``. What an axis does to weights, samples and activations is in ``rules.py``.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from cocoedit_jax.errors import UserError
from cocoedit_jax.sharding.mesh import AXES, CONTEXT, DATA, FSDP, TENSOR, make_mesh

REST = -1  # as a size: the devices that the other axes leave


@dataclasses.dataclass(frozen=True)
class Layout:
    """A kind of mesh.

    Attributes:
        purpose: what each device holds, and when that is the layout to choose.
        rest: the axis that takes the devices that others leave.
        parts: the other axes that are used; sizes where none are given, 0: about the square root of the devices.
    """

    purpose: str
    rest: str
    parts: tuple[tuple[str, int], ...] = ()

    def sizes(self, devices: int, given: Mapping[str, int] | None = None) -> dict[str, int]:
        """Sizes of all mesh axes for ``devices``, one of them maybe ``REST``; ``given`` ones (not 0) override."""
        sizes = dict.fromkeys(AXES, 1)
        for axis, size in self.parts:
            sizes[axis] = size or _near_root(devices)
        explicit = {axis: size for axis, size in (given or {}).items() if size}
        if REST not in explicit.values():
            sizes[self.rest] = REST
        return sizes | explicit


LAYOUTS: dict[str, Layout] = {
    "replicated": Layout("the whole base, and samples of its own: fastest, where the base fits", DATA),
    "fsdp": Layout("a share of every weight, fetched layer by layer, and samples of its own", FSDP),
    "data_fsdp": Layout("as fsdp, within groups of devices that each hold the base once", DATA, ((FSDP, 0),)),
    "tensor": Layout("a share of heads and MLPs, and samples that others have too: for few", DATA, ((TENSOR, 2),)),
    "fsdp_tensor": Layout("as fsdp, with smaller fetches, and sums over devices in every layer", FSDP, ((TENSOR, 2),)),
    "fsdp_context": Layout("as fsdp, and a share of each sample's tokens: for large pictures", FSDP, ((CONTEXT, 2),)),
}  # fmt: skip


def _near_root(devices: int) -> int:
    """The smallest divisor that is at least the square root."""
    return next(d for d in range(math.isqrt(devices - 1) + 1, devices + 1) if devices % d == 0)


def parse_layout(text: str, field: str = "layout") -> tuple[Layout, dict[str, int]]:
    """The layout that ``text`` names, and the sizes it gives.

    Raises:
        UserError: naming ``field``, for another text.
    """
    name, _, rest = text.partition(":")
    given: dict[str, int] = {}
    usable = name in LAYOUTS
    for part in rest.split(",") if rest else ():
        axis, _, size = part.partition("=")
        usable &= axis in AXES and size.isdecimal() and int(size) > 0
        given[axis] = int(size) if size.isdecimal() else 0
    if not usable:
        raise UserError(f"{field}={text!r}; expected one of {list(LAYOUTS)}, sizes as in 'fsdp_tensor:tensor=4'")
    return LAYOUTS[name], given


def layout_mesh(
    text: str, given: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None, field: str = "layout"
) -> Mesh:
    """The mesh of the layout ``text`` over ``devices`` (default: all). ``given`` sizes, those that are not 0, override
    the layout's.

    Raises:
        UserError: naming ``field``: no such layout, or sizes that do not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    layout, own = parse_layout(text, field)
    try:
        return make_mesh(layout.sizes(len(devices), own | {k: v for k, v in (given or {}).items() if v}), devices)
    except UserError as error:
        raise UserError(f"{field}={text!r}: {error}") from error


def candidates(devices: int, *, heads: int | None = None, largest: int = 8) -> Iterator[tuple[str, dict[str, int]]]:
    """Every distinct layout of ``devices``, as ``(text, sizes of all axes)``.

    Args:
        heads: attention heads, which a tensor axis must divide.
        largest: of tensor and context axes, whose exchanges do not pay over more devices.
    """
    seen: set[tuple[int, ...]] = set()
    for name, layout in LAYOUTS.items():
        if not layout.parts:
            texts = [name]
        else:
            ((axis, _),) = layout.parts
            limit = devices if axis == FSDP else min(largest, devices)
            texts = [f"{name}:{axis}={size}" for size in range(2, limit + 1) if devices % size == 0]
            if axis == TENSOR and heads:
                texts = [text for text in texts if heads % int(text.rpartition("=")[2]) == 0]
        for text in texts:
            layout, given = parse_layout(text)
            sizes = layout.sizes(devices, given)
            sizes[layout.rest] = devices // math.prod(size for size in sizes.values() if size != REST)
            if tuple(sizes.values()) not in seen:
                seen.add(tuple(sizes.values()))
                yield text, sizes


def check_shape(mesh: Mesh, shape: Any, field: str) -> None:
    """Raises UserError, naming ``field``, where the transformer ``shape`` cannot be split as ``mesh`` asks."""
    tensor = mesh.shape[TENSOR]
    if shape.num_attention_heads % tensor:
        raise UserError(
            f"{field}: {tensor} devices on the tensor axis; expected a divisor of the model's "
            f"{shape.num_attention_heads} attention heads"
        )
