"""The chip table, and names of slices and clusters."""

import dataclasses
import math
import re

from cocoedit_jax.errors import UserError

GB = 1e9
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device offers; figures of data sheets.

    Attributes:
        kind: "tpu", which the compiler plans for, or "gpu", planned by formula.
        flops: dense bf16 peak, FLOP/s.
        hbm: bytes that a program may use.
        hbm_bandwidth: bytes/s.
        link: bytes/s that it can send to its neighbours, over all links, one direction.
        network: bytes/s beyond a node or slice.
        node: devices on the fast links.
        cores: devices per chip, where a name counts chips differently than programs do.
        dims: of its torus.
    """

    kind: str
    flops: float
    hbm: float
    hbm_bandwidth: float
    link: float
    network: float
    node: int = 0
    cores: int = 1
    dims: int = 2


CHIPS: dict[str, Chip] = {
    # TPU: docs.cloud.google.com/tpu/docs/{v5e,v5p-training,v6e,tpu7x}: peak, HBM, and half of the "bidirectional ICI
    # bandwidth per chip" (400, 1200, 800, 1200 GB/s). HBM of v5e is what its compiler allows (of 16 GiB); of the others
    # the nominal size, lowered to the compiler's own limit where it states one.
    "v5e": Chip("tpu", 197e12, 15.75 * GIB, 819 * GB, 200 * GB, 3.1 * GB),
    "v5p": Chip("tpu", 459e12, 95 * GIB, 2765 * GB, 600 * GB, 6.2 * GB, dims=3),
    "v6e": Chip("tpu", 918e12, 31.25 * GIB, 1638 * GB, 400 * GB, 12.5 * GB),
    # Programs see the two TensorCores of a chip as two devices: half a chip each (2307 TFLOP/s, 192 GB, 7380 GB/s).
    "tpu7x": Chip("tpu", 1153.5e12, 96 * GB, 3690 * GB, 300 * GB, 6.2 * GB, cores=2, dims=3),
    # GPU: NVIDIA data sheets (SXM): dense bf16, HBM, NVLink 900 (B200: 1800) GB/s both directions together; one
    # 400 Gb/s InfiniBand adapter per GPU, as in DGX systems. 5 % of the memory is the driver's and the allocator's.
    "h100": Chip("gpu", 989e12, 0.95 * 80 * GB, 3350 * GB, 450 * GB, 50 * GB, node=8),
    "h200": Chip("gpu", 989e12, 0.95 * 141 * GB, 4800 * GB, 450 * GB, 50 * GB, node=8),
    "b200": Chip("gpu", 2250e12, 0.95 * 180 * GB, 7700 * GB, 900 * GB, 50 * GB, node=8),
}  # fmt: skip
_ALIASES = {"v5litepod": "v5e", "v7x": "tpu7x", "v5lite": "v5e"}

# Shapes of slices by chips, as Cloud TPU makes them unless told otherwise. Libtpu knows none smaller than a host.
_SHAPES: dict[int, dict[int, tuple[int, ...]]] = {
    2: {4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)},
    3: {
        4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8),
        512: (8, 8, 8),
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice or cluster.

    Attributes:
        name: as libtpu takes it, ``v5e:4x4``; of a GPU cluster ``h100:8``.
        family: in ``CHIPS``.
        devices: that a program sees.
    """

    name: str
    family: str
    devices: int

    @property
    def chip(self) -> Chip:
        return CHIPS[self.family]

    @property
    def link(self) -> float:
        """Bytes/s that one device can send when all devices exchange."""
        chip = self.chip
        return chip.network if chip.node and self.devices > chip.node else chip.link


def parse_topology(text: str) -> Topology:
    """``v5e:4x4``, a slice name as ``v5p-16`` (which counts cores: 8 chips), or a GPU cluster ``h100:8``.

    Raises:
        UserError: no such chip, shape or size.
    """
    found = re.fullmatch(r"([a-z]+\d*[a-z]*)([:-])(\d+(?:x\d+)*)", text.strip().lower())
    family = _ALIASES.get(found.group(1), found.group(1)) if found else ""
    if not found or family not in CHIPS:
        raise UserError(
            f"--topology={text}: expected a TPU slice as v5e:4x4 or v5p-16, or a GPU cluster as h100:8; "
            f"of {', '.join(sorted(CHIPS))}"
        )
    chip, numbers = CHIPS[family], tuple(int(n) for n in found.group(3).split("x"))
    if chip.kind == "gpu":
        count = numbers[0]
        if len(numbers) != 1 or not count or (count > chip.node and count % chip.node):
            raise UserError(
                f"--topology={text}: expected a number of GPUs, up to {chip.node} or a multiple of it: {family}:8"
            )
        return Topology(f"{family}:{count}", family, count)
    if found.group(2) == "-" or (len(numbers) == 1 and chip.dims > 1):
        # Names of v5p and tpu7x slices count TensorCores, two per chip.
        chips = numbers[0] / 2 if chip.dims == 3 else numbers[0]
        shapes = _SHAPES[chip.dims]
        if len(numbers) != 1 or chips not in shapes:
            names = ", ".join(f"{family}-{n * (2 if chip.dims == 3 else 1)}" for n in shapes)
            raise UserError(f"--topology={text}: no such slice; expected one of {names}, or a shape as {family}:"
                            + "x".join(map(str, shapes[8])))  # fmt: skip
        numbers = shapes[int(chips)]
    if len(numbers) != chip.dims or not all(numbers):
        example = "x".join(map(str, _SHAPES[chip.dims][8]))
        raise UserError(
            f"--topology={text}: {family} has {chip.dims} dimensions; expected for example {family}:{example}"
        )
    name = f"{family}:{'x'.join(map(str, numbers))}"
    return Topology(name, family, math.prod(numbers) * chip.cores)
