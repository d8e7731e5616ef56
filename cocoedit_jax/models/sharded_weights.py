"""Weights of any size from safetensors straight into sharded arrays, and back.

A tensor is read once, put on the devices that hold a part of it, and written there into its stacked array, in place.
The host holds what is read ahead and no more: neither the model nor a stack of its layers exists there as a whole.
"""

import collections
import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from cocoedit_jax.models import quantize, safetensors_folder, weights
from cocoedit_jax.models.safetensors_folder import StoredTensor
from cocoedit_jax.reporting import telemetry

STORED = "stored"  # a dtype argument: keep what the files hold
READ_AHEAD = 512 * 2**20  # bytes read and not yet placed; on a CPU, as many again may be placed and not yet copied
_THREADS = 8
_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def sharding_of(leaf: Any) -> Sharding:
    """The sharding of an array or ShapeDtypeStruct; the first local device where there is none."""
    return getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and placement of an array, a ShapeDtypeStruct or a quantised kernel."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(leaf))


def _drop_layers(sharding: Sharding) -> Sharding:
    """The sharding of one layer of a stack."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    if isinstance(sharding, SingleDeviceSharding):
        return sharding
    raise TypeError(f"sharding {sharding!r}; expected NamedSharding or SingleDeviceSharding")


@functools.lru_cache(maxsize=512)
def _programs(shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding) -> tuple[Any, Any, Any]:
    """Compiled once per kind of leaf, for all devices: an empty stack, a layer put into it, and a cast."""
    bits = _BITS[dtype.itemsize]

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=sharding)
    def place(stack: jax.Array, piece: jax.Array, layer: jax.Array) -> jax.Array:
        # As integers: XLA may change the bits of a NaN when it moves floats.
        stack, piece = (lax.bitcast_convert_type(x, bits) for x in (stack, piece.astype(dtype)))
        return lax.bitcast_convert_type(lax.dynamic_update_index_in_dim(stack, piece, layer, 0), dtype)

    empty = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)
    cast = jax.jit(lambda piece: piece.astype(dtype), out_shardings=sharding)
    return empty, place, cast


Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class _Piece:
    """One tensor of the files on its way into its leaf."""

    tensor: StoredTensor
    path: tuple[str, ...]
    layer: int | None
    sharding: Sharding  # of the piece, in our axes
    axes: tuple[int, ...]  # ours in the file's order

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape[axis] for axis in np.argsort(self.axes))

    def parts(self) -> dict[tuple[int, int], list[tuple[Any, Index]]]:
        """{rows of the file: [(device, index into these rows in the file's axes)]} for this process's devices."""
        out: dict[tuple[int, int], list[tuple[Any, Index]]] = {}
        for device, index in self.sharding.addressable_devices_indices_map(self.shape).items():
            stored = tuple((index or ())[axis] for axis in self.axes)
            start, stop, _ = stored[0].indices(self.tensor.shape[0]) if stored else (0, 0, 1)
            out.setdefault((start, stop), []).append((device, stored and (slice(None), *stored[1:])))
        return out

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes that this process reads."""
        if not self.tensor.shape:
            return self.tensor.nbytes
        return sum(stop - start for start, stop in self.parts()) * self.tensor.nbytes // max(1, self.tensor.shape[0])

    def load(self) -> jax.Array:
        """The tensor in our axes and its own dtype, on the devices; columns that none of them holds are dropped."""
        inverse, arrays = np.argsort(self.axes), {}
        for (start, stop), parts in self.parts().items():
            rows, placed = self.tensor.read(start, stop), {}
            for device, index in parts:
                # The runtime transposes while it copies, several times faster than NumPy and than XLA on a CPU. A
                # replica comes from the device that has it.
                part = placed.get(repr(index))
                arrays[device] = jax.device_put(rows[index].transpose(inverse) if part is None else part, device)
                placed.setdefault(repr(index), arrays[device])
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, list(arrays.values()))


def leaf_dtypes(
    flat: Mapping[tuple[str, ...], Any], dtype: Any, stored: Iterable[tuple[tuple[str, ...], np.dtype]]
) -> tuple[dict[tuple[str, ...], np.dtype], list[str]]:
    """Dtype of every leaf: ``dtype``, or its own if that is None, or as stored; and the stacks stored in several."""
    if not (isinstance(dtype, str) and dtype == STORED):
        return {path: np.dtype(leaf.dtype if dtype is None else dtype) for path, leaf in flat.items()}, []
    found: dict[tuple[str, ...], set[np.dtype]] = {}
    for path, kind in stored:
        found.setdefault(path, set()).add(kind)
    mixed = [
        f"mixed dtypes: {'.'.join(path)} is stored as {sorted(map(str, kinds))}, expected one; or give the dtype wanted"
        for path, kinds in found.items()
        if len(kinds) > 1
    ]
    return {path: min(kinds, key=str) for path, kinds in found.items()}, mixed


def load_sharded(
    source: Path,
    abstract: Mapping[str, Any],
    *,
    dtype: Any = None,
    skip: Mapping[str, Any] | None = None,
    read_ahead: int = READ_AHEAD,
) -> dict[str, Any]:
    """Parameters from safetensors files, every array placed as ``abstract`` says.

    Args:
        source: a .safetensors file, or a component folder of diffusers or transformers with one file or shards.
        abstract: nested dict of ShapeDtypeStructs or arrays, without partitioning boxes. Their shardings say where the
            arrays go (NamedSharding or SingleDeviceSharding; none: the first local device). A ``quantize.Kernel`` of
            them is filled layer by layer from what the files hold.
        dtype: of all arrays that are not quantised; None takes that of ``abstract``, ``"stored"`` that of the files.
        skip: shapes of more parameters, which the source must hold too and which are not read.
        read_ahead: bytes that may be in memory between being read and being placed.

    Returns:
        A tree like ``abstract``. Where no cast is needed its bits are those of the files.

    Raises:
        UserError: naming all of it together: absent, truncated and unreadable files; tensors that are missing,
            unexpected, of another shape or of a dtype that is no plain float; pickle files.
    """
    tensors = check_sharded(source, abstract, dtype=dtype, skip=skip)
    return load_stored(tensors, abstract, dtype=dtype, name=source.name, read_ahead=read_ahead)


def check_sharded(
    source: Path, abstract: Mapping[str, Any], *, dtype: Any = None, skip: Mapping[str, Any] | None = None
) -> dict[str, StoredTensor]:
    """The tensors that ``load_sharded`` would read, from the files' headers alone; refuses what it would refuse."""
    found = safetensors_folder.scan(source)
    shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
    problems = weights.misfits(weights.tensor_specs(abstract) | weights.tensor_specs(skip or {}), shapes, found.lost)
    _, mixed = _dtypes(found.tensors, abstract, dtype)
    weights.refuse(str(source), found.problems + problems + mixed, "problem(s) with the weights")
    return found.tensors


def _dtypes(
    tensors: Mapping[str, StoredTensor], abstract: Mapping[str, Any], dtype: Any
) -> tuple[dict[tuple[str, ...], np.dtype], list[str]]:
    """``leaf_dtypes`` of the parameters ``abstract``, where ``tensors`` are stored."""
    specs = weights.tensor_specs(abstract)
    stored = ((spec.path, tensors[name].dtype) for name, spec in specs.items() if name in tensors)
    return leaf_dtypes(weights.flatten(abstract), dtype, stored)


def load_stored(
    tensors: Mapping[str, StoredTensor],
    abstract: Mapping[str, Any],
    *,
    name: str,
    dtype: Any = None,
    read_ahead: int = READ_AHEAD,
) -> dict[str, Any]:
    """As ``load_sharded``, from tensors whose names and shapes are already known to fit; ``name`` is of the source."""
    specs, flat = weights.tensor_specs(abstract), weights.flatten(abstract)
    dtypes, _ = _dtypes(tensors, abstract, dtype)
    pieces = []
    for tensor, (path, layer, shape) in specs.items():
        sharding = sharding_of(flat[path])
        sharding = sharding if layer is None else _drop_layers(sharding)
        pieces.append(_Piece(tensors[tensor], path, layer, sharding, weights.torch_axes(path[-1], len(shape))))
    # In the order of the files, which is also the same in every process.
    pieces.sort(key=lambda piece: (piece.tensor.file, piece.tensor.offset))
    arrivals = ((piece.path, piece.layer, loaded, piece.nbytes) for piece, loaded in _read_ahead(pieces, read_ahead))
    return assemble(flat, dtypes, arrivals, sum(piece.nbytes for piece in pieces), name)


def assemble(
    flat: Mapping[tuple[str, ...], Any],
    dtypes: Mapping[tuple[str, ...], np.dtype],
    arrivals: Iterable[tuple[tuple[str, ...], int | None, jax.Array, int]],
    total: int,
    name: str,
) -> dict[str, Any]:
    """Casts or quantises what arrives and puts layers into their stacks, with a progress bar.

    Args:
        flat: {path: ShapeDtypeStruct or array, or Kernel of them} to fill.
        dtypes: what every leaf is cast to.
        arrivals: (path, layer or None, array placed as the leaf or its layer is, bytes read for it), of every leaf.
        total: bytes to read in all.
        name: of the source, for the progress bar.
    """
    arrays: dict[tuple[tuple[str, ...], int], jax.Array] = {}  # of every leaf, or part of a quantised kernel
    with telemetry.progress(total, f"load {name}", "B", process_index=jax.process_index(), scale=True) as bar:
        for path, layer, loaded, nbytes in arrivals:
            leaf = flat[path]
            if quantize.is_kernel(leaf):
                leaf = jax.tree.map(shape_of, leaf)
                row = leaf if layer is None else jax.tree.map(lambda x: _take_layer(x, 0), leaf)
                loaded = quantize.quantize_placed(loaded, row)
            for number, (target, part) in enumerate(zip(jax.tree.leaves(leaf), jax.tree.leaves(loaded), strict=True)):
                dtype = dtypes[path] if leaf is target else np.dtype(target.dtype)
                empty, place, cast = _programs(tuple(target.shape), dtype, sharding_of(target))
                key = path, number
                if layer is None:
                    array = part if part.dtype == dtype else cast(part)
                else:
                    array = place(arrays[key] if key in arrays else empty(), part, np.int32(layer))
                # Waited for, so that what was read is free before more is.
                arrays[key] = jax.block_until_ready(array)
                del part
            del loaded
            bar.update(nbytes)

    def leaf_of(path: tuple[str, ...]) -> Any:
        structure = jax.tree.structure(flat[path])
        return jax.tree.unflatten(structure, [arrays[path, i] for i in range(structure.num_leaves)])

    return weights.unflatten({path: leaf_of(path) for path in flat})


def _read_ahead(pieces: list[_Piece], budget: int) -> Iterator[tuple[_Piece, jax.Array]]:
    """The pieces in order, loaded by threads; at most ``budget`` bytes, or one piece, are under way at a time."""
    waiting: collections.deque[tuple[_Piece, concurrent.futures.Future[jax.Array]]] = collections.deque()
    todo, held = collections.deque(pieces), 0
    pool = concurrent.futures.ThreadPoolExecutor(_THREADS, "weights")
    try:
        while todo or waiting:
            while todo and (not waiting or held + todo[0].nbytes <= budget):
                piece = todo.popleft()
                held += piece.nbytes
                waiting.append((piece, pool.submit(piece.load)))
            piece, future = waiting.popleft()
            yield piece, future.result()
            held -= piece.nbytes
    finally:
        pool.shutdown(cancel_futures=True)


@jax.jit
def _layer(stack: jax.Array, layer: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(stack, _BITS[stack.dtype.itemsize])
    return lax.bitcast_convert_type(lax.dynamic_index_in_dim(bits, layer, keepdims=False), stack.dtype)


@jax.jit
def _bits(array: jax.Array) -> jax.Array:
    """A copy, as integers: an array keeps the NumPy array that it was made into, and this one is soon gone."""
    return lax.bitcast_convert_type(array, _BITS[array.dtype.itemsize])


def _take_layer(stack: Any, layer: int) -> Any:
    if isinstance(stack, jax.ShapeDtypeStruct):
        sharding = None if stack.sharding is None else _drop_layers(stack.sharding)
        return jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype, sharding=sharding)
    return stack[layer] if isinstance(stack, np.ndarray) else _layer(stack, np.int32(layer))


def unstacked(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with its stacks of blocks taken apart: ``transformer_blocks.3`` instead of row 3 of every leaf in
    ``transformer_blocks``. Tensors keep their names in files. Layers of JAX arrays are copies."""
    flat = {}
    for path, leaf in weights.flatten(tree).items():
        if path[0] in weights.STACKED:
            flat |= {layer_path(path, i): _take_layer(leaf, i) for i in range(leaf.shape[0])}
        else:
            flat[path] = leaf
    return weights.unflatten(flat)


def layer_path(path: tuple[str, ...], layer: int | None) -> tuple[str, ...]:
    """Path in the unstacked tree."""
    return path if layer is None else (f"{path[0]}.{layer}", *path[1:])


def save_sharded(folder: Path, params: Mapping[str, Any], *, max_shard_size: int = 5 * 10**9) -> None:
    """Writes ``params`` into ``folder`` as safetensors that diffusers reads, tensor by tensor.

    Args:
        folder: exists. The files in it are not complete before this returns.
        params: nested dict of arrays, stacked or not, all addressable by this process; bfloat16, float16 or float32.
        max_shard_size: bytes of tensors in one file.
    """
    specs, flat = weights.tensor_specs(params), weights.flatten(params)
    plan = {name: (np.dtype(flat[spec.path].dtype), spec.shape) for name, spec in specs.items()}

    def fetch(name: str) -> np.ndarray:
        path, layer, shape = specs[name]
        leaf = flat[path] if layer is None else _take_layer(flat[path], layer)
        if isinstance(leaf, jax.Array):
            leaf = np.asarray(_bits(leaf)).view(leaf.dtype)
        tensor = leaf.transpose(weights.torch_axes(path[-1], len(shape)))
        return np.ascontiguousarray(tensor).reshape(shape)  # NumPy makes a scalar contiguous as [1]

    def tensors(names: list[str]) -> Iterator[np.ndarray]:
        with concurrent.futures.ThreadPoolExecutor(2, "weights") as pool:
            waiting: collections.deque[concurrent.futures.Future[np.ndarray]] = collections.deque()
            for name in names:
                waiting.append(pool.submit(fetch, name))
                if len(waiting) > 4:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    total = sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in plan.values())
    with telemetry.progress(total, f"write {folder.name}", "B", scale=True) as bar:
        safetensors_folder.write(folder, plan, tensors, max_shard_size, bar.update)
