"""Collectives of a compiled program, from its text: how often each kind runs, and the bytes that it moves.

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
from collections.abc import Mapping
from typing import Any

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

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
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_LISTED = re.compile(r"\breplica_groups=\{\{([\d,]*)\}")
_IOTA = re.compile(r"\breplica_groups=\[(\d+),(\d+)\]<=")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All executions of one kind.

    Attributes:
        count: executions.
        bytes: sent by one device.
    """

    count: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Collective") -> "Collective":
        return Collective(self.count + other.count, self.bytes + other.bytes)


def _bits(dtype: str) -> int:
    if dtype in ("pred", "token"):
        return 8
    digits = re.search(r"\d+", dtype)
    return int(digits.group()) if digits else 8


def _size(shapes: str) -> float:
    """Bytes of all arrays in ``shapes``."""
    total = 0
    for dtype, dims in _ARRAY.findall(shapes):
        total += math.prod(int(d) for d in dims.split(",") if d) * _bits(dtype)
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


def _group(line: str, devices: int) -> int:
    """Devices that take part together."""
    if found := _IOTA.search(line):
        return int(found.group(2))
    if found := _LISTED.search(line):
        return len(found.group(1).split(","))
    return devices


def _sent(kind: str, is_start: bool, shape: str, line: str, devices: int) -> float:
    """Bytes that one device sends in one execution."""
    if is_start and kind in ("all-gather", "collective-permute", "all-to-all"):
        shape = _elements(shape)[1]  # (operands, results, contexts)
    size, group = _size(shape), _group(line, devices)
    if kind == "collective-permute":
        return size
    share = (group - 1) / group
    if kind == "all-reduce":
        return 2 * size * share
    return size * (group - 1) if kind == "reduce-scatter" else size * share  # a shard of g times the size


@dataclasses.dataclass
class _Computation:
    own: list[tuple[str, str, float]] = dataclasses.field(default_factory=list)  # channel, kind, bytes
    fused: list[str] = dataclasses.field(default_factory=list)  # computations of fusions
    calls: list[tuple[str, Any]] = dataclasses.field(default_factory=list)  # name; times, or _Loop where not noted
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


@dataclasses.dataclass(frozen=True)
class _Loop:
    condition: str
    body: str


def _parse(text: str, devices: int) -> tuple[dict[str, _Computation], str]:
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
            kind = found.group(1).removeprefix("ragged-")
            shape = body[: max(0, found.start() - 1)]
            channel = _CHANNEL.search(body)
            sent = _sent(kind, bool(found.group(2)), shape, body, devices)
            current.own.append((channel.group(1) if channel else start, kind, sent))
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
            continue
        times: Any = 1
        if " while(" in " " + body:
            known, parts = _TRIPS.search(body), dict(_LOOP.findall(body))
            times = int(known.group(1)) if known else _Loop(parts.get("condition", ""), parts.get("body", ""))
        current.calls += [(name, times) for name in called]
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


def collectives(text: str, devices: int = 1, unknown_trips: float = 1.0) -> dict[str, Collective]:
    """What one execution of the program ``text`` (``compiled.as_text()``) exchanges, by kind.

    Of a conditional, all branches are counted.

    Args:
        devices: of the program, for collectives without groups.
        unknown_trips: how often a loop without a known trip count runs, if it is in no other such loop: the optimizer
            step's loop over micro-batches.
    """
    computations, entry = _parse(text, devices)
    memo: dict[tuple[str, bool], dict[str, Collective]] = {}

    def own_and_fused(name: str) -> list[tuple[str, str, float]]:
        """Those of a computation and its fusions, pieces once."""
        computation = computations.get(name, _Computation())
        found, seen = list(computation.own), {piece[:2] for piece in computation.own}
        for fused in computation.fused:
            for piece in own_and_fused(fused):
                if piece[:2] not in seen:
                    seen.add(piece[:2])
                    found.append(piece)
        return found

    def total(name: str, in_unknown: bool) -> dict[str, Collective]:
        if (name, in_unknown) in memo:
            return memo[name, in_unknown]
        out: dict[str, Collective] = {}
        computation = computations.get(name, _Computation())
        for _, kind, size in own_and_fused(name):
            out[kind] = out.get(kind, Collective()) + Collective(1, size)
        for called, times in computation.calls:
            if isinstance(times, _Loop):
                times = _trips(computations, times)
            unknown = times is None
            factor = (1.0 if in_unknown else unknown_trips) if times is None else float(times)
            for kind, found in total(called, in_unknown or unknown).items():
                out[kind] = out.get(kind, Collective()) + Collective(factor * found.count, factor * found.bytes)
        memo[name, in_unknown] = out
        return out

    return dict(sorted(total(entry, False).items()))


def total_bytes(found: Mapping[str, Collective]) -> float:
    """Sent by one device, over all kinds."""
    return sum(c.bytes for c in found.values())
