"""What a compiled program sends between devices, read from its text: which exchanges, how often, between whom.

The text names every instruction once; one inside of a loop runs as often as the loop does. XLA notes that as
``known_trip_count``, except in programs for TPUs. There it follows from the loop's condition and its counter's step;
the counter starts at 0, as those of JAX and of XLA's own loops over shards do.

A TPU program may run a collective in pieces, each fused with other work; they have one channel, and count once.

Bytes are those that one device sends in a ring (the bandwidth-optimal algorithm of NCCL and of TPU tori): with g
devices in a group, (g - 1) / g of the result for all-gather, of the operand for reduce-scatter and all-to-all, twice
that for all-reduce, the whole operand for collective-permute.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
Groups = tuple[tuple[int, ...], ...]

_COLLECTIVE = re.compile(rf" ({'|'.join(KINDS)}|ragged-all-to-all)(-start)?\(")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_SCALAR = re.compile(r"^[su]\d+\[\]\S* (constant|get-tuple-element|add|copy)\(([^)]*)\)(?:, index=(\d+))?")
_BELOW = re.compile(r" compare\((?:[^%]*)%?([\w.\-]+), (?:[^%]*)%?([\w.\-]+)\), direction=LT")
_LOOP = re.compile(r"\b(condition|body)=%?([\w.\-]+)")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_COMMENT = re.compile(r"/\*.*?\*/")
_PAIRS = re.compile(r"source_target_pairs=\{(.*?)\}\}")
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}\s]*\})?\}")
_TILED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{((?:'\w+'(?:, ?)?)*)\}")


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One collective of a program.

    Attributes:
        kind: one of ``KINDS``.
        count: executions.
        bytes: sent by one device in each.
        shapes: of the arrays in its result on one device.
        groups: devices that exchange with one another, by their place in the program's mesh.
        in_loop: whether it is inside of a loop.
    """

    kind: str
    count: float
    bytes: float
    shapes: tuple[tuple[int, ...], ...]
    groups: Groups
    in_loop: bool

    def axes(self, mesh: Mesh) -> tuple[str, ...]:
        """The axes of ``mesh``, of more than one device, along which it exchanges."""
        coordinates = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), axis=1)
        varies = np.zeros(len(mesh.axis_names), bool)
        for group in self.groups:
            varies |= (coordinates[list(group)] != coordinates[group[0]]).any(axis=0)
        return tuple(name for name, differs in zip(mesh.axis_names, varies, strict=True) if differs)


@dataclasses.dataclass(frozen=True)
class Total:
    """All executions of one kind.

    Attributes:
        count: executions.
        bytes: sent by one device.
    """

    count: float = 0.0
    bytes: float = 0.0


def by_kind(found: Iterable[Exchange]) -> dict[str, Total]:
    """The sums over all exchanges of each kind."""
    out: dict[str, Total] = {}
    for e in found:
        before = out.get(e.kind, Total())
        out[e.kind] = Total(before.count + e.count, before.bytes + e.count * e.bytes)
    return dict(sorted(out.items()))


def exchanges(text: str, devices: int, unknown_trips: float = 1.0, branch_share: float = 1.0) -> list[Exchange]:
    """What one execution of the program ``text`` (``compiled.as_text()``) exchanges.

    Args:
        devices: of the program.
        unknown_trips: how often a loop without a known trip count runs, if it is in no other such loop: the optimizer
            step's loop over micro-batches.
        branch_share: how often each branch of a conditional runs when that is reached; 1: all of them always.

    Raises:
        ValueError: a form of device groups that is not known.
    """
    computations, entry = _parse(text, devices, branch_share)
    out: list[Exchange] = []
    silent: set[str] = set()  # computations without collectives

    def own_and_fused(name: str) -> list[_Piece]:
        """Those of a computation and its fusions, pieces once."""
        computation = computations.get(name, _Computation())
        found, seen = list(computation.own), {(piece.channel, piece.kind) for piece in computation.own}
        for fused in computation.fused:
            for piece in own_and_fused(fused):
                if (piece.channel, piece.kind) not in seen:
                    seen.add((piece.channel, piece.kind))
                    found.append(piece)
        return found

    def visit(name: str, count: float, in_loop: bool, in_unknown: bool) -> None:
        if name in silent:
            return
        before = len(out)
        for piece in own_and_fused(name):
            out.append(Exchange(piece.kind, count, piece.bytes, piece.shapes, piece.groups, in_loop))
        for call in computations.get(name, _Computation()).calls:
            times, unknown = call.times, False
            if call.loop is not None:
                found = _trips(computations, call.loop)
                unknown = found is None
                times = (1.0 if in_unknown else unknown_trips) if found is None else found
            visit(call.name, count * times, in_loop or call.is_loop, in_unknown or unknown)
        if len(out) == before:
            silent.add(name)

    visit(entry, 1.0, False, False)
    return out


@dataclasses.dataclass(frozen=True)
class _Piece:
    channel: str
    kind: str
    bytes: float
    shapes: tuple[tuple[int, ...], ...]
    groups: Groups


@dataclasses.dataclass(frozen=True)
class _Loop:
    condition: str
    body: str


@dataclasses.dataclass(frozen=True)
class _Call:
    name: str
    is_loop: bool = False
    times: float = 1.0
    loop: _Loop | None = None  # where the number of times is not noted


@dataclasses.dataclass
class _Computation:
    own: list[_Piece] = dataclasses.field(default_factory=list)
    fused: list[str] = dataclasses.field(default_factory=list)  # computations of fusions
    calls: list[_Call] = dataclasses.field(default_factory=list)
    scalars: dict[str, tuple[str, str, str]] = dataclasses.field(default_factory=dict)  # operation, operands, index
    below: tuple[str, str] | None = None  # operands of a comparison for "less than"
    results: list[str] = dataclasses.field(default_factory=list)  # of a tuple at the end

    def constant(self, name: str) -> int | None:
        operation, value, _ = self.scalars.get(name, ("", "", ""))
        return int(value) if operation == "constant" else None

    def element(self, name: str) -> int | None:
        """Which element of the loop's state ``name`` is."""
        operation, operands, index = self.scalars.get(name, ("", "", ""))
        if operation == "copy":
            return self.element(_NAME.findall(operands)[0])
        return int(index) if operation == "get-tuple-element" else None


def _parse(text: str, devices: int, branch_share: float) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if not line.startswith(" "):
            header = _HEADER.match(line) if " -> " in line or line.startswith("ENTRY") else None
            if header:
                current = computations.setdefault(header.group(2), _Computation())
                entry = header.group(2) if header.group(1) else entry
            continue
        start, equals, body = line.partition(" = ")
        if current is None or not equals:
            continue
        body = body.split(", metadata={")[0] + line[line.find(", backend_config=") :] if "metadata={" in body else body
        if found := _COLLECTIVE.search(" " + body):
            body = _COMMENT.sub("", body)  # counts the elements of long tuples
            found = _COLLECTIVE.search(" " + body) or found
            kind = found.group(1).removeprefix("ragged-")
            result = body[: max(0, found.start() - 1)]
            if found.group(2) and kind in ("all-gather", "collective-permute", "all-to-all"):
                result = _elements(result)[1]  # (operands, results, contexts)
            groups, channel = _groups(body, devices), _CHANNEL.search(body)
            current.own.append(
                _Piece(
                    channel.group(1) if channel else start,
                    kind,
                    _sent(kind, _size(result), max(map(len, groups))),
                    tuple(tuple(int(d) for d in dims.split(",") if d) for _, dims in _ARRAY.findall(result)),
                    groups,
                )
            )
            continue  # what it applies is an addition
        if "-done(" in body or "-update(" in body:
            continue  # the other half of what "start" called
        called = _CALLED.findall(body)
        if branches := _BRANCHES.search(body):
            called += [name.strip().lstrip("%") for name in branches.group(1).split(",")]
        name = start.strip().removeprefix("ROOT ").lstrip("%")
        if scalar := _SCALAR.match(body):
            current.scalars[name] = (scalar.group(1), scalar.group(2), scalar.group(3) or "")
        if below := _BELOW.search(body):
            current.below = (below.group(1), below.group(2))
        if start.strip().startswith("ROOT") and " tuple(" in body:
            current.results = _NAME.findall(body.rpartition(" tuple(")[2].partition(")")[0])
        if " fusion(" in body:
            current.fused += called
        elif " while(" in " " + body:
            known, parts = _TRIPS.search(body), dict(_LOOP.findall(body))
            loop = None if known else _Loop(parts.get("condition", ""), parts.get("body", ""))
            current.calls += [_Call(name, True, float(known.group(1)) if known else 1.0, loop) for name in called]
        elif " conditional(" in body:
            current.calls += [_Call(name, times=branch_share) for name in called]
        else:
            current.calls += [_Call(name) for name in called]
    return computations, entry


def _trips(computations: Mapping[str, _Computation], loop: _Loop) -> int | None:
    """How often it runs; None: that is no constant."""
    empty = _Computation()
    condition, body = computations.get(loop.condition, empty), computations.get(loop.body, empty)
    if condition.below is None:
        return None
    counter, limit = condition.element(condition.below[0]), condition.constant(condition.below[1])
    if counter is None or limit is None:
        return None
    step = 1
    if counter < len(body.results):
        operation, operands, _ = body.scalars.get(body.results[counter], ("", "", ""))
        steps = [value for name in _NAME.findall(operands) if (value := body.constant(name))]
        step = steps[0] if operation == "add" and steps else 1
    return -(-limit // step)


def _bits(dtype: str) -> int:
    digits = None if dtype in ("pred", "token") else re.search(r"\d+", dtype)
    return int(digits.group()) if digits else 8


def _size(shapes: str) -> float:
    """Bytes of all arrays in ``shapes``."""
    total = sum(
        math.prod(int(d) for d in dims.split(",") if d) * _bits(dtype) for dtype, dims in _ARRAY.findall(shapes)
    )
    return total / 8


def _elements(shape: str) -> list[str]:
    """The members of a tuple's shape; of an array's, itself."""
    shape = shape.strip()
    if not shape.startswith("("):
        return [shape]
    members, depth, last = [], 0, 1
    for index, char in enumerate(shape):
        depth += (char in "([{") - (char in ")]}")
        if (char == "," and depth == 1) or depth == 0:
            members.append(shape[last:index])
            last = index + 1
        if depth == 0:
            break
    return members


def _sent(kind: str, size: float, group: int) -> float:
    """Bytes that one device sends for a result of ``size`` bytes among ``group`` devices."""
    if kind == "collective-permute":
        return size
    share = (group - 1) / group
    if kind == "all-reduce":
        return 2 * size * share
    return size * (group - 1) if kind == "reduce-scatter" else size * share  # a shard of g times the size


def _groups(line: str, devices: int) -> Groups:
    """The groups of devices of a collective, or its pairs of sender and receiver."""
    whole = tuple(map(tuple, [range(devices)]))
    if pairs := _PAIRS.search(line):
        return tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)", pairs[0]))
    if listed := _LISTED.search(line):
        groups = re.findall(r"\{([\d,\s]+)\}", listed[1] or "")
        return tuple(tuple(int(n) for n in group.split(",")) for group in groups) or whole
    numbers: Any
    if tiled := _TILED.search(line):
        shape, dims, order = ([int(n) for n in part.split(",")] if part else [] for part in tiled.groups())
        numbers = np.arange(math.prod(dims)).reshape(dims).transpose(order or range(len(dims)))
        return tuple(map(tuple, numbers.reshape(shape[0], -1).tolist()))
    if named := _NAMED.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        names, used = list(sizes), re.findall(r"'(\w+)'", named[3])
        numbers = np.arange(math.prod(sizes.values()))
        if named[2]:
            dims, order = ([int(n) for n in re.findall(r"\d+", part)] for part in named[2].split("T"))
            numbers = numbers.reshape(dims).transpose(order)
        across = sorted(range(len(names)), key=lambda n: names[n] in used)
        numbers = numbers.reshape(list(sizes.values())).transpose(across)
        return tuple(map(tuple, numbers.reshape(-1, math.prod(sizes[n] for n in used)).tolist()))
    if "replica_groups=" in line:
        raise ValueError(f"device groups of another form than those known: {line.strip()[:400]}")
    return whole
