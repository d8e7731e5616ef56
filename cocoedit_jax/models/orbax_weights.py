"""Weights as an Orbax checkpoint that restores onto any mesh, every device reading only its part.

Layers are arrays of their own in it: saving and restoring then needs memory for a few layers beyond the weights, where
stacks of them, of up to 3.6 GB in FLUX.1, would be in memory twice.

A component folder in this form holds ``cocoedit_weights.json`` (format version, the model's own configuration) and the
checkpoint ``arrays``. ``load_params`` reads it and diffusers' form alike.
"""

import contextlib
import json
import math
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import quantize, weights
from cocoedit_jax.models.sharded_weights import (
    assemble,
    check_sharded,
    layer_path,
    leaf_dtypes,
    load_sharded,
    shape_of,
    unstacked,
)
from cocoedit_jax.reporting import telemetry

MANIFEST, ARRAYS = "cocoedit_weights.json", "arrays"
FORMAT, VERSION = "orbax", 1
# A device reads whole chunks, so they must be smaller than its part of an array.
_CHUNK = 8 * 2**20
_BATCH = 512 * 2**20  # bytes restored in one call


def _checkpointer(tree: Any) -> ocp.Checkpointer:
    """For arrays or shapes like those of ``tree``. Orbax refuses a limit below what it moves at once."""
    largest = max((math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)), default=0)
    limit = 1 + 4 * largest // 10**9  # GB, if stored as float32
    # Not compressed: bfloat16 weights hardly shrink.
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(use_compression=False, save_concurrent_gb=limit, restore_concurrent_gb=limit)
    )


@contextlib.contextmanager
def _growth(folder: Path, total: int) -> Iterator[None]:
    """A progress bar that watches the files in ``folder``, for a writer that does not tell."""
    done = threading.Event()

    def watch(bar: Any) -> None:
        while not done.wait(0.5):
            with contextlib.suppress(OSError):  # files are renamed meanwhile
                size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                bar.update(max(0, min(size, total) - bar.n))

    bar = telemetry.progress(total, f"write {folder.name}", "B", process_index=jax.process_index(), scale=True)
    with bar:
        thread = threading.Thread(target=watch, args=(bar,), daemon=True)
        thread.start()
        try:
            yield
            finished = total
        except BaseException:
            finished = 0
            raise
        finally:
            done.set()
            thread.join()
            bar.update(max(0, finished - bar.n))


def save_orbax(folder: Path, params: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Writes ``params`` into ``folder``, which exists; the manifest, without which it is not read, comes last.

    Args:
        params: nested dict of JAX arrays, sharded in any way. Stacks of layers are copied; ``unstacked`` trees are not.
        config: the model's ``config.json``, kept as it is.
    """
    params = unstacked(params)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), params)
    with _growth(folder, total), _checkpointer(params) as checkpointer:
        checkpointer.save((folder / ARRAYS).resolve(), args=ocp.args.PyTreeSave(params, save_args=args))
    telemetry.write_json(folder / MANIFEST, {"format": FORMAT, "version": VERSION, "config": dict(config)})


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_text())
        found = raw["format"], raw["version"], dict(raw["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable ({error!r}); expected what launch.convert_weights writes") from error
    if found[:2] != (FORMAT, VERSION):
        raise UserError(f"{path}: format {found[0]!r} version {found[1]!r}; expected {FORMAT!r} version {VERSION}")
    return found[2]


def is_orbax(folder: Path) -> bool:
    """Whether ``folder`` holds weights in this form, rather than in diffusers'."""
    return (folder / MANIFEST).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """The model's ``config.json`` of a component folder in either form.

    Raises:
        UserError: there is none, or it is no JSON object.
    """
    if is_orbax(folder):
        return _manifest(folder)
    path = folder / "config.json"
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not readable ({error}); expected the model's configuration, as JSON") from error


def load_orbax(
    folder: Path, abstract: Mapping[str, Any], *, dtype: Any = None, skip: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Parameters that ``save_orbax`` wrote; arguments and result as those of ``sharded_weights.load_sharded``.

    The mesh they were saved from does not matter.

    Raises:
        UserError: naming all arrays that are missing, unexpected or of another shape; or the checkpoint cannot be read.
    """
    path, flat = (folder / ARRAYS).resolve(), weights.flatten(abstract)
    homes, parts = _homes(abstract), _parts(abstract)
    with _checkpointer(parts) as checkpointer:
        found, dtypes = _checked(checkpointer, folder, flat, homes, parts, dtype, skip)

        def arrivals() -> Iterator[tuple[tuple[str, ...], int | None, jax.Array, int]]:
            sizes = {part: math.prod(found[part].shape) * np.dtype(found[part].dtype).itemsize for part in parts}
            for batch in _batches(sizes):
                restored = _restore(checkpointer, path, {part: (parts[part], found[part].dtype) for part in batch})
                for part in batch:
                    yield *homes[part], restored.pop(part), sizes[part]

        total = sum(math.prod(found[p].shape) * np.dtype(found[p].dtype).itemsize for p in parts)
        return assemble(flat, dtypes, arrivals(), total, folder.name)


def check_orbax(folder: Path, abstract: Mapping[str, Any]) -> None:
    """Refuses what ``load_orbax`` would refuse, from the checkpoint's metadata alone."""
    with _checkpointer({}) as checkpointer:
        _checked(checkpointer, folder, weights.flatten(abstract), _homes(abstract), _parts(abstract), None, None)


def _homes(abstract: Mapping[str, Any]) -> dict[tuple[str, ...], tuple[tuple[str, ...], int | None]]:
    """{path in the checkpoint: (leaf, layer)}."""
    return {layer_path(s.path, s.layer): (s.path, s.layer) for s in weights.tensor_specs(abstract).values()}


def _parts(abstract: Mapping[str, Any]) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """{path in the checkpoint: shape and placement}."""
    return weights.flatten(unstacked(jax.tree.map(shape_of, abstract, is_leaf=quantize.is_kernel)))


def _checked(
    checkpointer: ocp.Checkpointer,
    folder: Path,
    flat: Mapping[tuple[str, ...], Any],
    homes: Mapping[tuple[str, ...], tuple[tuple[str, ...], int | None]],
    parts: dict[tuple[str, ...], jax.ShapeDtypeStruct],
    dtype: Any,
    skip: Mapping[str, Any] | None,
) -> tuple[dict[tuple[str, ...], Any], dict[tuple[str, ...], np.dtype]]:
    """Metadata of the stored arrays by their paths, and the dtype of every leaf of ``flat``."""
    _manifest(folder)
    path = (folder / ARRAYS).resolve()
    try:
        metadata: Any = checkpointer.metadata(path)
        found = weights.flatten(metadata.item_metadata.tree)
    except Exception as error:  # of many kinds, and None where the arrays' metadata cannot be read
        raise UserError(f"{path}: not a readable Orbax checkpoint ({error})") from error
    known = parts | _parts(skip or {})
    specs = {".".join(p): weights.Spec(p, None, tuple(leaf.shape)) for p, leaf in known.items()}
    problems = weights.misfits(specs, {".".join(p): tuple(x.shape) for p, x in found.items()})
    stored = ((home[0], np.dtype(found[part].dtype)) for part, home in homes.items() if part in found)
    dtypes, mixed = leaf_dtypes(flat, dtype, stored)
    weights.refuse(str(path), problems + mixed)
    return found, dtypes


def _batches(sizes: Mapping[tuple[str, ...], int]) -> list[list[tuple[str, ...]]]:
    batches, held = [[]], 0
    for path, size in sizes.items():
        if batches[-1] and held + size > _BATCH:
            batches, held = [*batches, []], 0
        batches[-1].append(path)
        held += size
    return batches


def _restore(checkpointer: ocp.Checkpointer, path: Path, parts: Mapping[tuple[str, ...], Any]) -> dict[Any, jax.Array]:
    """Some arrays of the checkpoint, {path: (where, stored dtype)}, in the dtype in which they are stored."""
    item = {p: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding) for p, (leaf, dtype) in parts.items()}
    args = {p: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype, global_shape=x.shape) for p, x in item.items()}
    item, args = weights.unflatten(item), weights.unflatten(args)
    try:
        restored = checkpointer.restore(
            path, args=ocp.args.PyTreeRestore(item, restore_args=args, partial_restore=True)
        )
    except Exception as error:  # Orbax raises plain Exception around what TensorStore reports
        raise UserError(f"{path}: cannot be restored ({str(error.__cause__ or error)[:300]})") from error
    return weights.flatten(restored)


def load_params(
    source: Path, abstract: Mapping[str, Any], *, dtype: Any = None, skip: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Parameters of a component folder in either form, or of a .safetensors file: see ``load_sharded``.

    Args:
        source: where the weights are; ``hub.resolve_model`` finds a model's folder, its components are folders in that.
        abstract: nested dict of ShapeDtypeStructs or arrays; their shardings say where the arrays go.
        dtype: of all arrays; None takes that of ``abstract``, ``"stored"`` that of the files.
        skip: shapes of more parameters, which the source must hold too and which are not read.

    Raises:
        UserError: the weights are not there, or do not fit; everything wrong is named together.
    """
    return (load_orbax if is_orbax(source) else load_sharded)(source, abstract, dtype=dtype, skip=skip)


def check_params(source: Path, abstract: Mapping[str, Any]) -> None:
    """Refuses what ``load_params`` would refuse, from headers and metadata alone: no array is made."""
    (check_orbax if is_orbax(source) else check_sharded)(source, abstract)
