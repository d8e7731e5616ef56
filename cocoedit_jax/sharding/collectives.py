"""What a compiled program sends between devices, read from its text."""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4}
_OPERATION = re.compile(rf"= (?P<result>\(?[^=]*?) (?P<kind>{'|'.join(KINDS)})(?:-start)?\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=\{?([^,}\s]+(?:, ?%[^,}\s]+)*)"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One of a program's exchanges.

    Attributes:
        kind: one of ``KINDS``.
        axes: the mesh axes, of more than one device, along which it exchanges.
        bytes: of its result on one device.
        in_loop: whether it is inside of a loop, and may run many times.
        shapes: of the arrays in its result.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    in_loop: bool
    shapes: tuple[tuple[int, ...], ...]


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """All of a program's, from ``compiled.as_text()``. Those in a loop are counted once.

    Raises:
        ValueError: a form of device groups that is not known.
    """
    computations = _computations(text)
    inside = _inside_loops(computations)
    found = []
    for name, lines in computations.items():
        for line in lines:
            if match := _OPERATION.search(line):
                arrays = re.findall(r"([a-z]\w*)\[([\d,]*)\]", match["result"])
                shapes = tuple(tuple(int(d) for d in dims.split(",") if d) for _, dims in arrays)
                size = sum(math.prod(s) * _bits(kind) // 8 for s, (kind, _) in zip(shapes, arrays, strict=True))
                found.append(Collective(match["kind"], _axes(line, mesh), size, name in inside, shapes))
    return found


def _bits(dtype: str) -> int:
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return _BITS.get(dtype) or (int(digits[1]) if digits else 8)


def _computations(text: str) -> dict[str, list[str]]:
    """{name: lines of its body}."""
    out: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?(%?[\w.\-]+) [^=]*\{$", line):
            lines = out.setdefault(header[1].lstrip("%"), [])
        else:
            lines.append(line)
    return out


def _inside_loops(computations: dict[str, list[str]]) -> set[str]:
    """Names of loop bodies, and of what they call."""
    calls = {
        name: {
            part.strip().lstrip("%") for line in lines for names in _CALLED.findall(line) for part in names.split(",")
        }
        for name, lines in computations.items()
    }
    waiting = [
        part.lstrip("%") for lines in computations.values() for line in lines
        if " while(" in line for part in re.findall(r"(?:body|condition)=(%?[\w.\-]+)", line)
    ]  # fmt: skip
    inside: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in inside:
            inside.add(name)
            waiting += calls.get(name, ())
    return inside


def _axes(line: str, mesh: Mesh) -> tuple[str, ...]:
    """Mesh axes whose coordinates differ within a group of devices."""
    coordinates = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), axis=1)
    varies = np.zeros(len(mesh.axis_names), bool)
    for group in _groups(line, mesh.size):
        varies |= (coordinates[list(group)] != coordinates[group[0]]).any(axis=0)
    return tuple(name for name, differs in zip(mesh.axis_names, varies, strict=True) if differs)


def _groups(line: str, devices: int) -> Sequence[Sequence[int]]:
    """The groups of devices of a collective, or its pairs of sender and receiver."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return [[int(n) for n in pair] for pair in re.findall(r"\{(\d+),(\d+)", pairs[0])]
    if listed := re.search(r"replica_groups=\{(\{[\d,{}\s]*\})?\}", line):
        groups = [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,\s]+)\}", listed[1] or "")]
        return groups or [list(range(devices))]
    if tiled := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims, order = ([int(n) for n in part.split(",")] if part else [] for part in tiled.groups())
        ids = np.arange(math.prod(dims)).reshape(dims).transpose(order or range(len(dims)))
        return ids.reshape(shape[0], -1).tolist()
    if named := re.search(r"replica_groups=mesh\[(.*?)\](?:, ?device_ids=\(?\[[^)]*\)?)? *\{(.*?)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'?([\w.]+)'?=(\d+)", named[1])}
        used = re.findall(r"'?([\w.]+)'?", named[2])
        names = list(sizes)
        order = [names.index(n) for n in names if n not in used] + [names.index(n) for n in names if n in used]
        ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values())).transpose(order)
        return ids.reshape(-1, math.prod(sizes[n] for n in used)).tolist()
    raise ValueError(f"device groups of another form than those known: {line.strip()[:400]}")
