"""Which samples of a step, and which of its records, every device and so every process works on.

It depends on the mesh alone, not on how its devices are spread over processes: so does every number of a run.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cocoedit_jax.sharding import processes
from cocoedit_jax.sharding.mesh import AXES, replicated, sample_shards

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Shares:
    """Each of the S shares of samples (data x fsdp) owns N / S consecutive samples, and so mostly whole groups.

    Attributes:
        mesh: of sampling.
        count: samples, N.
        batches: samples of each batch in the order of its rows ``[batches, B]``: a slice of every share's. Those from N
            on fill up the last ones.
        rows: the rows of a batch whose pictures this process has, and judges where they are samples.
        groups: numbers of the groups whose record this process loads, for its devices to encode and to judge.
        encoded: group of every row when records are encoded, the same number of rows on each device.
        position: for every group a row of ``encoded`` that holds it ``[G]``; 0 for groups without samples.
    """

    mesh: Mesh
    count: int
    batches: np.ndarray
    rows: np.ndarray
    groups: np.ndarray
    encoded: np.ndarray
    position: np.ndarray

    def judged(self, batch: int) -> np.ndarray:
        """The rows of a batch that this process judges."""
        return self.rows[self.batches[batch, self.rows] < self.count]

    @property
    def own(self) -> np.ndarray:
        """The samples that this process judges, batch by batch."""
        found = self.batches[:, self.rows].reshape(-1)
        return found[found < self.count]

    @property
    def order(self) -> np.ndarray:
        """Where each sample is in the concatenated batches ``[N]``."""
        return np.argsort(self.batches.reshape(-1))[: self.count]

    def place(self, tree: Any) -> Any:
        """Arrays ``[len(groups), ...]`` of the loaded records, as ``encoded`` spreads them over the devices of all
        processes."""
        rows = np.searchsorted(self.groups, self.encoded)
        sharding = NamedSharding(self.mesh, PartitionSpec(AXES))

        def leaf(x: Any) -> Array:
            x = np.asarray(x)
            part = lambda at: x[rows[at[0]]]  # noqa: E731  # pyright: ignore[reportOptionalSubscript]
            return jax.make_array_from_callback((len(rows), *x.shape[1:]), sharding, part)

        return jax.tree.map(leaf, tree)

    def whole(self, x: np.ndarray) -> np.ndarray:
        """Of arrays ``[len(groups), ...]`` of the loaded records, those of all groups ``[G, ...]``."""
        if processes.count() == 1:
            return x[np.searchsorted(self.groups, self.encoded[self.position])]
        return fetch(self.place(x))[self.position]


def divide(
    group: np.ndarray, batch_size: int, mesh: Mesh, process: int | None = None, rows: np.ndarray | None = None
) -> Shares:
    """Shares of the samples with group numbers ``group`` ``[N]``, sampled ``batch_size`` at once.

    Args:
        batch_size: a multiple of the number of shares.
        process: whose; default: this one.
        rows: sample these alone; numbers of samples then count them. Records are encoded as for all.
    """
    process = processes.index() if process is None else process
    shares, size = sample_shards(mesh), mesh.size
    drawn = group if rows is None else group[rows]
    filled = -(-len(drawn) // batch_size) * batch_size
    batches = np.arange(filled).reshape(shares, -1, batch_size // shares).swapaxes(0, 1).reshape(-1, batch_size)
    home = np.asarray([device.process_index for device in mesh.devices.flat])

    # Pictures are split over all devices where they divide, else over the shares: make_sampler.
    parts = size if batch_size % size == 0 else shares
    device_of_row = np.arange(batch_size) // (batch_size // parts) * (size // parts)
    judged = np.flatnonzero(home[device_of_row] == process)
    own = batches[:, judged][batches[:, judged] < len(drawn)]

    names, first = np.unique(group, return_index=True)
    per_share = -(-len(group) // batch_size) * batch_size // shares
    lists = [names[first // per_share == share].tolist() for share in range(shares)]
    devices = size // shares
    per_device = max(1, *(-(-len(found) // devices) for found in lists))
    start = np.minimum(np.arange(shares) * per_share, len(group) - 1)
    # A device with nothing left to do repeats what its share has anyway.
    filler = [found[-1] if found else int(group[begin]) for found, begin in zip(lists, start, strict=True)]
    encoded = np.asarray([
        (found + [last] * (devices * per_device))[: devices * per_device]
        for found, last in zip(lists, filler, strict=True)
    ]).reshape(-1)  # fmt: skip
    position = np.zeros(int(group.max()) + 1, np.int64)
    for row in range(len(encoded) - 1, -1, -1):
        position[encoded[row]] = row
    needed = np.union1d(encoded[np.repeat(home, per_device) == process], drawn[own])
    return Shares(mesh, len(drawn), batches, judged, needed.astype(np.int64), encoded, position)


def place(tree: Any, shardings: Any) -> Any:
    """``tree``, which is the same in all processes, placed by ``shardings``: one of them, or a tree of them.

    Every process hands over its own part. ``jax.device_put`` would first compare the arrays of all processes, and where
    each has one device its result cannot be taken apart (JAX 0.10.2).
    """

    def leaf(x: Any, sharding: NamedSharding) -> Array:
        if sharding.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
            return jax.device_put(x, sharding)
        if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.jit(lambda key: key, out_shardings=sharding)(x)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda x: leaf(x, shardings), tree)
    return jax.tree.map(leaf, tree, shardings)


def fetch(x: Array) -> np.ndarray:
    """``x`` whole on the host, of whichever processes hold it; all must call it."""
    if not x.is_fully_addressable and not x.is_fully_replicated:
        mesh: Any = x.sharding.mesh  # pyright: ignore[reportAttributeAccessIssue]
        x = jax.jit(lambda y: y, out_shardings=replicated(mesh))(x)
    return np.asarray(x)


def local_rows(x: Array, rows: Sequence[int] | np.ndarray) -> Any:
    """The rows ``rows`` of ``x``, which devices of this process hold.

    Where they are the whole of some shards, they stay on these devices and nothing is waited for.
    """
    if x.is_fully_addressable and np.array_equal(rows, np.arange(len(x))):
        return x
    shards = {shard.index[0].start or 0: shard for shard in reversed(x.addressable_shards)}
    held = {start: range(start, start + len(shards[start].data)) for start in sorted(shards)}
    used = [start for start, own in held.items() if set(own) <= {int(row) for row in rows}]
    if used and np.array_equal(rows, np.concatenate([held[start] for start in used])):
        here = Mesh(np.asarray([shards[start].device for start in used]), ("rows",))
        sharding = NamedSharding(here, PartitionSpec("rows"))
        parts = [shards[start].data for start in used]
        return jax.make_array_from_single_device_arrays((len(rows), *x.shape[1:]), sharding, parts)
    found = {start + i: row for start in held for i, row in enumerate(np.asarray(shards[start].data))}
    return np.stack([found[int(row)] for row in rows]) if len(rows) else np.zeros((0, *x.shape[1:]), x.dtype)
