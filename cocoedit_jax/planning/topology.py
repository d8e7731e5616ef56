"""Names of slices and clusters: how many devices of which chip."""

import dataclasses
import math
import re

from cocoedit_jax.errors import UserError
from cocoedit_jax.sharding.chips import CHIPS, Chip

# TPUs that the compiler describes with two devices per chip, where programs see one, cannot be planned for.
PLANNED = {name: chip for name, chip in CHIPS.items() if name != "v4"}
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

    def bandwidth(self, stride: int, size: int) -> float:
        """Bytes/s that each device sends in exchanges within groups of ``size`` devices, ``stride`` apart.

        A group of GPUs that reaches beyond a node has as many adapters as members in a node, and NCCL's rings use all
        of them.
        """
        chip = self.chip
        if not chip.node or self.devices <= chip.node or stride * size <= chip.node:
            return chip.link
        return min(chip.link, max(1, chip.node // stride) * chip.network)


def parse_topology(text: str) -> Topology:
    """``v5e:4x4``, a slice name as ``v5p-16`` (which counts cores: 8 chips), or a GPU cluster ``h100:8``.

    Raises:
        UserError: no such chip, shape or size.
    """
    found = re.fullmatch(r"([a-z]+\d*[a-z]*)([:-])(\d+(?:x\d+)*)", text.strip().lower())
    family = _ALIASES.get(found.group(1), found.group(1)) if found else ""
    if not found or family not in PLANNED:
        raise UserError(
            f"--topology={text}: expected a TPU slice as v5e:4x4 or v5p-16, or a GPU cluster as h100:8; "
            f"of {', '.join(sorted(PLANNED))}"
        )
    chip, numbers = CHIPS[family], tuple(int(n) for n in found.group(3).split("x"))
    if chip.platform == "gpu":
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
