"""Runs rollout and optimizer step on the devices present, with random weights, and takes the time.

All candidates are timed in turn, round after round, so that a change of clock or load hits each of them. One program's
arrays are held at a time: the memory that it needs is its own, and models are compared that do not fit twice. The base
stays where the next program wants it placed as the last one did.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cocoedit_jax.planning import predict
from cocoedit_jax.planning.compiler import lower_phase, parse_out_of_memory, planned_memory
from cocoedit_jax.planning.held import held, with_beside
from cocoedit_jax.planning.rows import PHASES, Row, finish, row_of
from cocoedit_jax.planning.workload import Candidate, Workload
from cocoedit_jax.reporting.telemetry import progress
from cocoedit_jax.sharding.flops import peak_flops
from cocoedit_jax.sharding.mesh import make_mesh
from cocoedit_jax.train.step import StepBatch, StepScalars

Arrays = Any

_HOST_BYTES = 2**24  # larger arrays are made on the devices


def fill(shape: Any, seed: int = 0) -> jax.Array:
    """An array of ``shape`` (a ShapeDtypeStruct with a sharding): small random numbers, zeros for whole numbers, True.

    A large one is made in place, never whole on one device.
    """
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        keys = jax.random.split(jax.random.key(seed), shape.shape) if shape.shape else jax.random.key(seed)
        return jax.device_put(keys, shape.sharding)
    if shape.dtype in (jnp.int8, jnp.float8_e4m3fn):  # a quantised kernel
        return _hashed(shape)()
    if shape.dtype == jnp.bool_ or not jnp.issubdtype(shape.dtype, jnp.floating):
        return jax.device_put(np.full(shape.shape, shape.dtype == jnp.bool_, shape.dtype), shape.sharding)
    if shape.size * shape.dtype.itemsize <= _HOST_BYTES:
        numbers = np.random.default_rng(seed).standard_normal(shape.shape)
        return jax.device_put((0.02 * numbers).astype(shape.dtype), shape.sharding)
    return _hashed(shape)()


def _hashed(shape: Any) -> Callable[[], jax.Array]:
    """A program that makes an array of ``shape``: uniform by a hash of the place (as MurmurHash3, Appleby 2011), in
    +-0.035, or of 8-bit numbers in +-100.

    Elements are made where they stay: random bits of gigabytes would need more memory than what is to be measured.
    """
    width = 200.0 if shape.dtype.itemsize == 1 else 0.07

    def make() -> jax.Array:
        h = jnp.zeros(shape.shape, jnp.uint32)
        for axis in range(len(shape.shape)):
            h = (h ^ jax.lax.broadcasted_iota(jnp.uint32, shape.shape, axis)) * jnp.uint32(0x85EBCA6B)
            h = (h ^ (h >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
            h = h ^ (h >> jnp.uint32(16))
        unit = (h >> jnp.uint32(8)).astype(jnp.float32) * np.float32(2**-24)
        return ((unit - np.float32(0.5)) * np.float32(width)).astype(shape.dtype)

    return jax.jit(make, out_shardings=shape.sharding)


def fill_all(shapes: Any, seed: int = 0) -> Arrays:
    """``fill`` for a tree, each array from a seed of its own."""
    leaves, structure = jax.tree.flatten(shapes)
    return jax.tree.unflatten(structure, [fill(leaf, 1000 * seed + i) for i, leaf in enumerate(leaves)])


def _as_wanted(x: jax.Array, sharding: Any) -> bool:
    """Whether ``x`` is placed by ``sharding``; None: of an argument that is not used."""
    return sharding is None or x.sharding.is_equivalent_to(sharding, x.ndim)


class HeldBase:
    """The frozen base as the last program had it placed."""

    def __init__(self) -> None:
        self._held: dict[Any, jax.Array] = {}

    def placed(self, shapes: Any) -> Arrays:
        """Parameters of ``shapes``; those that are held as wanted are kept, all others are given up first."""
        wanted = dict(jax.tree_util.tree_leaves_with_path(shapes))
        kept = {
            path: x for path, x in self._held.items()
            if path in wanted and (x.shape, x.dtype) == (wanted[path].shape, wanted[path].dtype)
            and _as_wanted(x, wanted[path].sharding)
        }  # fmt: skip
        self._held = kept
        for seed, (path, shape) in enumerate(wanted.items()):
            if path not in kept:
                kept[path] = fill(shape, seed)
        return jax.tree.unflatten(jax.tree.structure(shapes), [kept[path] for path in wanted])

    def drop(self) -> None:
        self._held = {}


def _usable_batch(batch: StepBatch) -> StepBatch:
    """Random numbers where the objective needs none in particular; all samples count."""
    ones = jax.tree.map(jnp.ones_like, batch.valid)
    return batch.replace(valid=ones, preserve_latent=jnp.ones_like(batch.preserve_latent), r=0 * batch.r + 0.5)  # pyright: ignore


def _zero_moments(state: Any) -> Any:
    """A second moment must not be negative."""
    return state.replace(opt_state=jax.tree.map(lambda x: x * 0, state.opt_state))


@contextlib.contextmanager
def _cache_hits() -> Iterator[list[str]]:
    """Fills with an entry for every program that is read from JAX's cache of compiled programs."""
    hits: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event.endswith("/cache_hits"):
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)


class Program:
    """A compiled phase. ``__call__`` places its arguments, runs it, and gives back all but the base.

    Attributes:
        compile_seconds: of tracing and compiling.
        kept: whether the program was on disk already, so that ``compile_seconds`` are those of reading it.
        memory: of one device, by the compiler's plan (``planned_memory``).
        share: of a step that one call runs: of the rollout one batch; of the optimizer step as many micro-batches as
            were asked for.
    """

    def __init__(
        self, workload: Workload, candidate: Candidate, phase: str, devices: Sequence[Any], micro_batches: int = 2
    ):
        self.phase = phase
        start = time.perf_counter()
        lowered = lower_phase(workload, candidate, phase, make_mesh(dict(candidate.sizes), devices))
        with _cache_hits() as hits:
            self._compiled = lowered.compile()
        self.kept = bool(hits)
        self.compile_seconds = time.perf_counter() - start
        self.memory = planned_memory(self._compiled)
        count = math.ceil(workload.samples / candidate.batch)
        run = 1 if phase == "rollout" else min(count, micro_batches)
        self.share = run / count
        self._scalars = {"num_micro": run, "count": min(workload.samples, run * candidate.batch),
                         "old_decay": 0.5, "ema_decay": 0.5}  # fmt: skip
        self._shapes = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            lowered.args_info[0], self._compiled.input_shardings[0],
        )  # fmt: skip

    def _arguments(self, base: HeldBase) -> list[Any]:
        where = 0 if self.phase == "rollout" else 1  # of the base among the arguments
        given = [base.placed(x) if i == where else fill_all(x, i + 1) for i, x in enumerate(self._shapes)]
        if self.phase == "rollout":
            return given
        state, params, batch, scalars = given
        place = lambda name, old: jax.device_put(jnp.asarray(self._scalars[name], old.dtype), old.sharding)  # noqa: E731
        scalars = StepScalars(key=scalars.key, **{name: place(name, getattr(scalars, name)) for name in self._scalars})
        return [_zero_moments(state), params, _usable_batch(batch), scalars]

    def __call__(self, base: HeldBase) -> float:
        """Seconds of a whole step's work: those of the ``share`` that is run, divided by it."""
        arguments = jax.block_until_ready(self._arguments(base))
        start = time.perf_counter()
        jax.block_until_ready(self._compiled(*arguments))
        return (time.perf_counter() - start) / self.share


def peak_memory(devices: Sequence[Any]) -> int | None:
    """Most bytes that one of ``devices`` has held so far; None where the platform does not tell."""
    return max(_told(devices, "peak_bytes_in_use"), default=None)


def memory_limit(devices: Sequence[Any]) -> int | None:
    """Bytes that a run may use of each of ``devices``; None where the platform does not tell."""
    return min(_told(devices, "bytes_limit"), default=None) or None  # 0: there is none


def _told(devices: Sequence[Any], name: str) -> list[int]:
    """The figure ``name`` of each of ``devices``; empty unless all tell it."""
    found: list[Any] = [(device.memory_stats() or {}).get(name) for device in devices]
    return [] if None in found else found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "q1": float(low), "q3": float(high), "samples": len(values)}


def measured_rows(
    workload: Workload,
    candidates: Sequence[Candidate],
    *,
    repeats: int = 5,
    micro_batches: int = 2,
    phases: Sequence[str] = PHASES,
    devices: Sequence[Any] | None = None,
    done: Callable[[list[Row]], object] = lambda rows: None,
    program: Callable[..., Program] = Program,
) -> list[Row]:
    """A row for every candidate, on the devices of this process. One that runs out of memory, or cannot be compiled, is
    a row that says so.

    A first round compiles and runs each once, which says what fits; then all that do are timed in turn.

    Args:
        repeats: timed rounds.
        micro_batches: most that are run of an optimizer step; its time is that of all of them, in proportion.
        done: called with what is known so far, after every candidate and every round.
    """
    devices = list(jax.devices() if devices is None else devices)
    editor = workload.editor("none", "xla")
    one, source = peak_flops(devices[0])
    peak = one * (1 if devices[0].platform == "cpu" else len(devices))
    flops = predict.model_flops(workload, editor)
    rows = [row_of(c, workload, devices[0].device_kind, len(devices), "measured") for c in candidates]
    runs: dict[tuple[int, str], tuple[Program, list[float]]] = {}
    base = HeldBase()

    def update() -> None:
        for (index, phase), (_, seconds) in runs.items():
            found = rows[index]["phases"][phase]
            if seconds:
                found["measured"] = spread(seconds)
                found["mfu"] = flops[phase] / found["measured"]["median"] / peak
        for row in rows:
            row |= {"peak_source": source, "micro_batches": micro_batches}
            if len(row["phases"]) == len(phases):
                finish(row, workload)
        done([row for row in rows if len(row["phases"]) == len(phases)])

    with progress(len(candidates) * len(phases) * (repeats + 1), "measure", "run") as bar:
        for index, (candidate, row) in enumerate(zip(candidates, rows, strict=True)):
            for phase in phases:
                before = peak_memory(devices)
                found, made = _first_run(
                    lambda: program(workload, candidate, phase, devices, micro_batches), base  # noqa: B023
                )  # fmt: skip
                after = peak_memory(devices)
                if found["fits"]:
                    if before is not None and after is not None and after > before:
                        found["peak"] = after  # nobody needed as much: it is this program's
                        # The encoders were placed with its base, but it does not use them: they are held beside it.
                        found["need"] = after - held(workload, candidate, phase)[1]["encoders"]
                    found = with_beside(found, workload, candidate, phase, memory_limit(devices))
                row["phases"][phase] = found
                if made is None or not found["fits"]:
                    bar.total -= repeats
                else:
                    runs[index, phase] = (made, [])
                bar.update(1)
            update()
        for rounds_left in reversed(range(repeats)):
            for index, phase in list(runs):
                runner, seconds = runs[index, phase]
                took, fault = _attempt(functools.partial(runner, base), base)
                if fault is None:
                    seconds.append(took)
                else:  # it ran once, but memory may be in pieces by now
                    rows[index]["phases"][phase] = fault
                    del runs[index, phase]
                    bar.total -= rounds_left
                bar.update(1)
            update()
    return rows


def _first_run(make: Callable[[], Program], base: HeldBase) -> tuple[dict[str, Any], Program | None]:
    """What became of a program, and the program if it runs."""

    def run() -> Program:
        made = make()
        made(base)
        return made

    made, fault = _attempt(run, base)
    if fault is not None:
        return fault, None
    return {
        "fits": True, "compile_seconds": made.compile_seconds, "kept": made.kept, "memory": made.memory,
        "need": made.memory["total"],
    }, made  # fmt: skip


def _attempt(work: Callable[[], Any], base: HeldBase) -> tuple[Any, dict[str, Any] | None]:
    """What ``work`` gives, and None; if it runs out of memory or cannot be compiled, None and the phase of a row that
    says so, and ``base`` holds nothing any more."""
    try:
        return work(), None
    except jax.errors.JaxRuntimeError as error:
        message = str(error).strip()
    except (ValueError, NotImplementedError) as error:
        message = f"{type(error).__name__}: {error}".strip()
    base.drop()
    exhausted = parse_out_of_memory(message)
    if exhausted is None:
        return None, {"fits": False, "error": message[:2000]}
    return None, {"fits": False, **exhausted, "message": message[:500]}
