"""Weights as an Orbax checkpoint: stacked arrays as the model holds them, restored onto any mesh without rearranging.

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
from cocoedit_jax.models import weights
from cocoedit_jax.models.sharded_weights import STORED, load_sharded, sharding_of
from cocoedit_jax.reporting import telemetry

MANIFEST, ARRAYS = "cocoedit_weights.json", "arrays"
FORMAT, VERSION = "orbax", 1
# A device reads whole chunks, so they must be smaller than its part of a stack of layers.
_CHUNK = 32 * 2**20
_BATCH = 2**30  # bytes restored in one call


def _checkpointer() -> ocp.Checkpointer:
    # Not compressed: bfloat16 weights hardly shrink.
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(use_compression=False, save_concurrent_gb=1, restore_concurrent_gb=1)
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
        params: nested dict of arrays, sharded in any way.
        config: the model's ``config.json``, kept as it is.
    """
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), params)
    with _growth(folder, total), _checkpointer() as checkpointer:
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


def _batches(sizes: Mapping[tuple[str, ...], int]) -> list[list[tuple[str, ...]]]:
    batches, held = [[]], 0
    for path, size in sizes.items():
        if batches[-1] and held + size > _BATCH:
            batches, held = [*batches, []], 0
        batches[-1].append(path)
        held += size
    return batches


def load_orbax(folder: Path, abstract: Mapping[str, Any], *, dtype: Any = None) -> dict[str, Any]:
    """Parameters that ``save_orbax`` wrote; arguments and result as those of ``sharded_weights.load_sharded``.

    The mesh they were saved from does not matter.

    Raises:
        UserError: naming all arrays that are missing, unexpected or of another shape; or the checkpoint cannot be read.
    """
    _manifest(folder)
    path = (folder / ARRAYS).resolve()
    flat = weights.flatten(abstract)
    with _checkpointer() as checkpointer:
        try:
            metadata: Any = checkpointer.metadata(path)
            found = weights.flatten(metadata.item_metadata.tree)
        except Exception as error:  # of many kinds, and None where the arrays' metadata cannot be read
            raise UserError(f"{path}: not a readable Orbax checkpoint ({error})") from error
        specs = {".".join(p): weights.Spec(p, None, tuple(leaf.shape)) for p, leaf in flat.items()}
        weights.refuse(str(path), weights.misfits(specs, {".".join(p): tuple(x.shape) for p, x in found.items()}))

        targets: dict[tuple[str, ...], jax.ShapeDtypeStruct] = {}
        for name, leaf in flat.items():
            kind = found[name].dtype if dtype == STORED else leaf.dtype if dtype is None else dtype
            targets[name] = jax.ShapeDtypeStruct(leaf.shape, kind, sharding=sharding_of(leaf))
        sizes = {name: math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for name, leaf in targets.items()}
        out: dict[tuple[str, ...], jax.Array] = {}
        total = sum(sizes.values())
        with telemetry.progress(
            total, f"load {folder.name}", "B", process_index=jax.process_index(), scale=True
        ) as bar:
            for batch in _batches(sizes):
                item = weights.unflatten({name: targets[name] for name in batch})
                args = jax.tree.map(
                    lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype, global_shape=x.shape), item
                )
                try:
                    restored = checkpointer.restore(
                        path, args=ocp.args.PyTreeRestore(item, restore_args=args, partial_restore=True)
                    )
                except Exception as error:  # Orbax raises plain Exception around what TensorStore reports
                    reason = str(error.__cause__ or error)[:300]
                    raise UserError(f"{path}: cannot be restored ({reason})") from error
                out |= weights.flatten(restored)
                bar.update(sum(sizes[name] for name in batch))
    return weights.unflatten({name: out[name] for name in flat})


def load_params(source: Path, abstract: Mapping[str, Any], *, dtype: Any = None) -> dict[str, Any]:
    """Parameters of a component folder in either form, or of a .safetensors file: see ``load_sharded``.

    Args:
        source: where the weights are; ``hub.resolve_model`` finds a model's folder, its components are folders in that.
        abstract: nested dict of ShapeDtypeStructs or arrays; their shardings say where the arrays go.
        dtype: of all arrays; None takes that of ``abstract``, ``"stored"`` that of the files.

    Raises:
        UserError: the weights are not there, or do not fit; everything wrong is named together.
    """
    return (load_orbax if is_orbax(source) else load_sharded)(source, abstract, dtype=dtype)
