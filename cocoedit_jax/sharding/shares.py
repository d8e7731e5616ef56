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
        batches: samples of each batch in the order of its rows ``[batches, B]``: a slice of every share's.
        judged: the rows of a batch whose pictures this process has and judges.
        groups: numbers of the groups whose record this process loads, for its devices to encode and to judge.
        encoded: group of every row when records are encoded, the same number of rows on each device.
        position: for every group a row of ``encoded`` that holds it ``[G]``; 0 for groups without samples.
    """

    mesh: Mesh
    batches: np.ndarray
    judged: np.ndarray
    groups: np.ndarray
    encoded: np.ndarray
    position: np.ndarray

    @property
    def own(self) -> np.ndarray:
        """The samples that this process judges, ascending."""
        return np.sort(self.batches[:, self.judged].reshape(-1))

    @property
    def order(self) -> np.ndarray:
        """Where each sample is in the concatenated batches ``[N]``."""
        return np.argsort(self.batches.reshape(-1))

    def place(self, tree: Any) -> Any:
        """Arrays ``[len(groups), ...]`` of the loaded records, as ``encoded`` spreads them over the devices of all
        processes."""
        rows = np.searchsorted(self.groups, self.encoded)
        sharding = NamedSharding(self.mesh, PartitionSpec(AXES))

        def leaf(x: Any) -> Array:
            x = np.asarray(x)
            return jax.make_array_from_callback((len(rows), *x.shape[1:]), sharding, lambda at: x[rows[at[0]]])

        return jax.tree.map(leaf, tree)

    def whole(self, x: np.ndarray) -> np.ndarray:
        """Of arrays ``[len(groups), ...]`` of the loaded records, those of all groups ``[G, ...]``."""
        if processes.count() == 1:
            return x[np.searchsorted(self.groups, self.encoded[self.position])]
        return fetch(self.place(x))[self.position]


def divide(group: np.ndarray, batch_size: int, mesh: Mesh, process: int | None = None) -> Shares:
    """Shares of the samples with group numbers ``group`` ``[N]``, sampled ``batch_size`` at once.

    N is a multiple of ``batch_size``, and that one of the shares. ``process``: whose; default: this one.
    """
    process = processes.index() if process is None else process
    shares, size = sample_shards(mesh), mesh.size
    batches = np.arange(len(group)).reshape(shares, -1, batch_size // shares).swapaxes(0, 1).reshape(-1, batch_size)
    home = np.asarray([device.process_index for device in mesh.devices.flat])

    # Pictures are split over all devices where they divide, else over the shares: make_sampler.
    parts = size if batch_size % size == 0 else shares
    device_of_row = np.arange(batch_size) // (batch_size // parts) * (size // parts)
    judged = np.flatnonzero(home[device_of_row] == process)

    names, first = np.unique(group, return_index=True)
    share_of = first // (len(group) // shares)
    lists = [names[share_of == share].tolist() for share in range(shares)]
    devices = size // shares
    rows = max(1, *(-(-len(found) // devices) for found in lists))
    start = np.arange(shares) * (len(group) // shares)
    # A device with nothing left to do repeats what its share has anyway.
    filler = [found[-1] if found else int(group[begin]) for found, begin in zip(lists, start, strict=True)]
    encoded = np.asarray([
        (found + [last] * (devices * rows))[: devices * rows] for found, last in zip(lists, filler, strict=True)
    ]).reshape(-1)  # fmt: skip
    position = np.zeros(int(group.max()) + 1, np.int64)
    for row in range(len(encoded) - 1, -1, -1):
        position[encoded[row]] = row
    needed = np.union1d(encoded[np.repeat(home, rows) == process], group[batches[:, judged]])
    return Shares(mesh, batches, judged, needed.astype(np.int64), encoded, position)


def place(tree: Any, sharding: NamedSharding) -> Any:
    """``tree``, which is the same in all processes, placed by ``sharding``; every process hands over its own part."""

    def leaf(x: Any) -> Array:
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.jit(lambda key: key, out_shardings=sharding)(x)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])

    return jax.tree.map(leaf, tree)


def fetch(x: Array) -> np.ndarray:
    """``x`` whole on the host, of whichever processes hold it; all must call it."""
    if not x.is_fully_addressable and not x.is_fully_replicated:
        mesh: Any = x.sharding.mesh  # pyright: ignore[reportAttributeAccessIssue]
        x = jax.jit(lambda y: y, out_shardings=replicated(mesh))(x)
    return np.asarray(x)


def local_rows(x: Array, rows: Sequence[int] | np.ndarray) -> Any:
    """The rows ``rows`` of ``x``, which devices of this process hold: ``x`` itself where they are all of it."""
    if x.is_fully_addressable and len(rows) == len(x):
        return x
    held: dict[int, np.ndarray] = {}
    for shard in x.addressable_shards:
        start = shard.index[0].start or 0
        if start not in held:
            held[start] = np.asarray(shard.data)
    found = {start + i: part[i] for start, part in held.items() for i in range(len(part))}
    return np.stack([found[int(row)] for row in rows]) if len(rows) else np.zeros((0, *x.shape[1:]), x.dtype)
