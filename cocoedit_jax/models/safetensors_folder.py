"""Safetensors on disk, one tensor at a time: a component folder as diffusers and transformers write it.

Such a folder holds ``STEM.safetensors``, or shards and the ``STEM.safetensors.index.json`` that lists them. Headers are
read here, and bytes come by ``pread``: pages of a mapped file would count as memory of this process, and a mapped file
that is cut short kills it.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.telemetry import write_json

STEMS = ("diffusion_pytorch_model", "model")
INDEX = ".safetensors.index.json"
DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MAX_HEADER = 100_000_000  # bytes; the format's own limit


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes are: ``offset`` from the start of ``file``, row-major, in torch's layout."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows ``start`` to ``stop`` of the first dimension, in memory of their own; all of a scalar.

        Raises:
            UserError: the file cannot be read, or has become shorter.
        """
        shape, row = self.shape, self.nbytes
        if shape:
            stop = shape[0] if stop is None else stop
            shape = (stop - start, *shape[1:])
            row = math.prod(shape[1:]) * self.dtype.itemsize
        data = np.empty(math.prod(shape) * self.dtype.itemsize, np.uint8)
        try:
            with self.file.open("rb", buffering=0) as file:
                _fill(file.fileno(), data.data, self.offset + start * row)
        except OSError as error:
            raise UserError(f"{self.file}: not readable ({error})") from error
        return data.view(self.dtype).reshape(shape)


def _fill(descriptor: int, buffer: memoryview, offset: int) -> None:
    done = 0
    while done < len(buffer):  # the system reads at most 2 GB at once
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not count:
            raise OSError(f"ends at byte {offset + done}, inside a tensor")
        done += count


@dataclasses.dataclass
class Contents:
    """What a source holds: tensors by name, what is wrong with its files, and the names lost with unreadable ones."""

    tensors: dict[str, StoredTensor]
    problems: list[str]
    lost: set[str]


def _header(file: Path) -> dict[str, Any]:
    """A file's checked header, ``__metadata__`` left out, with ``data_offsets`` from the start of the file.

    Raises:
        ValueError, OSError: it is not a whole safetensors file; the message says why.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"{size} bytes, cut off before the end of its header, or not a safetensors file")
        try:
            raw = json.loads(stream.read(length))
            raw.pop("__metadata__", None)
            header = {name: dict(entry) for name, entry in raw.items()}
            for entry in header.values():
                begin, end = (int(offset) + 8 + length for offset in entry["data_offsets"])
                entry |= {"data_offsets": (begin, end), "shape": tuple(int(n) for n in entry["shape"])}
                if not 8 + length <= begin <= end or str(entry["dtype"]) != entry["dtype"]:
                    raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError("its header is not that of a safetensors file") from error
    expected = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if expected > size:
        raise ValueError(f"truncated: {size} bytes, its header describes {expected}")
    return header


def _files(source: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of ``source`` and, for shards, the index's {tensor name: file name}."""
    wanted = (
        f"expected a .safetensors file, or a folder with {' or '.join(s + '.safetensors' for s in STEMS)} or shards"
    )
    if source.is_file():
        if source.suffix != ".safetensors":
            raise UserError(f"{source}: {'a pickle; ' if source.suffix in _PICKLES else ''}{wanted}")
        return [source], None
    if not source.is_dir():
        raise UserError(f"{source}: no such file or folder; {wanted}")
    for stem in STEMS:
        index, single = source / (stem + INDEX), source / f"{stem}.safetensors"
        if index.is_file():
            return _listed(index)
        if single.is_file():
            return [single], None
    there = sorted(path.name for path in source.iterdir())
    if any(name.endswith(_PICKLES) for name in there):
        wanted += "; weights in pickle files (.bin, .pt) are not read, because loading one can run any code"
    raise UserError(f"{source}: no weights that can be read among {there[:8]}; {wanted}")


def _listed(index: Path) -> tuple[list[Path], dict[str, str]]:
    try:
        listed = {str(name): str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index with a 'weight_map' of tensor to file names ({error})") from error
    outside = sorted(file for file in set(listed.values()) if Path(file).name != file)
    if outside:
        raise UserError(f"{index}: names {outside[0]!r}; expected names of files beside it")
    return [index.parent / file for file in sorted(set(listed.values()))], listed


def scan(source: Path) -> Contents:
    """Reads all headers of ``source``, a .safetensors file or a component folder.

    Returns:
        The tensors found; faults of single files and tensors are listed in it, not raised, so that a caller can report
        everything at once.

    Raises:
        UserError: there is nothing there to read, or its index is broken.
    """
    files, listed = _files(source)
    out = Contents({}, [], set())
    for file in files:
        own = {name for name, home in (listed or {}).items() if home == file.name}
        try:
            header = _header(file)
        except FileNotFoundError:
            out.problems.append(f"absent: {file.name}, which the index names for {len(own)} tensor(s)")
            out.lost |= own
            continue
        except (OSError, ValueError) as error:
            out.problems.append(f"unreadable: {file.name} ({error})")
            out.lost |= own
            continue
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            dtype, shape = DTYPES.get(entry["dtype"]), entry["shape"]
            if dtype is None:
                out.problems.append(f"unsupported dtype: {name} is {entry['dtype']}, expected one of {[*DTYPES]}")
                out.lost.add(name)
            elif end - begin != math.prod(shape) * dtype.itemsize:
                out.problems.append(f"wrong length: {name} in {file.name}, {end - begin} bytes for {shape} {dtype}")
                out.lost.add(name)
            elif name in out.tensors:
                out.problems.append(f"twice: {name}, in {out.tensors[name].file.name} and {file.name}")
            else:
                out.tensors[name] = StoredTensor(file, dtype, shape, begin)
    if listed is None and not out.tensors and out.problems:
        raise UserError(f"{source}: {'; '.join(out.problems)}")
    return out


def natural(name: str) -> list[Any]:
    """Sort key that counts: layer 2 before layer 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


Spec = tuple[np.dtype, tuple[int, ...]]


def _nbytes(spec: Spec) -> int:
    return spec[0].itemsize * math.prod(spec[1])


def split(specs: Mapping[str, Spec], max_shard_size: int) -> list[list[str]]:
    """Names in natural order, cut into shards of at most ``max_shard_size`` bytes; a larger tensor gets its own."""
    shards: list[list[str]] = [[]]
    held = 0
    for name in sorted(specs, key=natural):
        size = _nbytes(specs[name])
        if shards[-1] and held + size > max_shard_size:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    # The widest type first: torch needs every tensor aligned to its item.
    return [sorted(names, key=lambda name: -specs[name][0].itemsize) for names in shards]


def write(
    folder: Path,
    specs: Mapping[str, Spec],
    tensors: Callable[[list[str]], Iterable[np.ndarray]],
    max_shard_size: int,
    advance: Callable[[int], Any],
) -> None:
    """Writes shards and their index, or one file, into ``folder`` as diffusers names them.

    Args:
        folder: exists; whoever calls makes it appear whole or not at all.
        specs: dtype and shape of every tensor.
        tensors: gives the tensors of the names asked for, in that order, one by one.
        max_shard_size: bytes of tensors in one file.
        advance: called with the number of bytes just written.
    """
    shards = split(specs, max_shard_size)
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    weight_map = {}
    for number, names in enumerate(shards, 1):
        count = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = folder / f"{STEMS[0]}{count}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            dtype, shape = specs[name]
            begin, end = end, end + _nbytes(specs[name])
            header[name] = {"dtype": kinds[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        with file.open("wb") as stream:
            stream.write(len(encoded).to_bytes(8, "little") + encoded)
            for name, tensor in zip(names, tensors(names), strict=True):
                if (tensor.dtype, tensor.shape) != specs[name]:
                    raise ValueError(f"{name}: {tensor.dtype} {tensor.shape}, planned as {specs[name]}")
                stream.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
                advance(tensor.nbytes)
        weight_map |= dict.fromkeys(names, file.name)
    if len(shards) > 1:
        total = sum(map(_nbytes, specs.values()))
        ordered = {name: weight_map[name] for name in sorted(weight_map, key=natural)}
        write_json(folder / (STEMS[0] + INDEX), {"metadata": {"total_size": total}, "weight_map": ordered})
