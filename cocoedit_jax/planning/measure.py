"""Runs rollout and optimizer step on the devices present, with random weights, and takes the time.

All candidates that run are timed in turn, round after round, so that a change of clock or load hits each of them.
"""

import gc
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cocoedit_jax.planning import predict
from cocoedit_jax.planning.compiler import lower_phase, parse_out_of_memory
from cocoedit_jax.planning.rows import PHASES, Row, finish, row_of
from cocoedit_jax.planning.workload import Candidate, Workload
from cocoedit_jax.reporting.telemetry import progress
from cocoedit_jax.sharding.flops import peak_flops
from cocoedit_jax.sharding.mesh import make_mesh
from cocoedit_jax.train.step import StepBatch, StepScalars

Arrays = Any


_HOST_BYTES = 2**24  # larger arrays are made on the devices


def fill(shapes: Any, seed: int = 0) -> Arrays:
    """Arrays of ``shapes`` (ShapeDtypeStructs with shardings): small random numbers, zeros for whole numbers, True.

    Large ones are made in place, never whole on one device.
    """
    rng = np.random.default_rng(seed)

    def make(x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            keys = jax.random.split(jax.random.key(seed), x.shape) if x.shape else jax.random.key(seed)
            return jax.device_put(keys, x.sharding)
        if x.dtype in (jnp.int8, jnp.float8_e4m3fn):  # a quantised kernel
            draw = jax.jit(lambda key: (32 * jax.random.normal(key, x.shape)).astype(x.dtype), out_shardings=x.sharding)
            return draw(jax.random.key(int(rng.integers(2**31))))
        if x.dtype == jnp.bool_ or not jnp.issubdtype(x.dtype, jnp.floating):
            return jax.device_put(np.full(x.shape, x.dtype == jnp.bool_, x.dtype), x.sharding)
        if x.size * x.dtype.itemsize <= _HOST_BYTES:
            return jax.device_put((0.02 * rng.standard_normal(x.shape)).astype(x.dtype), x.sharding)
        draw = jax.jit(lambda key: 0.02 * jax.random.normal(key, x.shape, x.dtype), out_shardings=x.sharding)
        return draw(jax.random.key(int(rng.integers(2**31))))

    return jax.tree.map(make, shapes)


def _usable_batch(batch: StepBatch) -> StepBatch:
    """Random numbers where the objective needs none in particular; all samples count."""
    ones = jax.tree.map(jnp.ones_like, batch.valid)
    return batch.replace(valid=ones, preserve_latent=jnp.ones_like(batch.preserve_latent), r=0 * batch.r + 0.5)  # pyright: ignore


class Program:
    """A compiled phase with its arguments; ``__call__`` runs it once, to the end, and returns seconds."""

    def __init__(self, workload: Workload, candidate: Candidate, phase: str, devices: Sequence[Any]):
        self.phase = phase
        start = time.perf_counter()
        lowered = lower_phase(workload, candidate, phase, make_mesh(dict(candidate.sizes), devices))
        self._compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - start
        # Executions of it in one step.
        self.executions = math.ceil(workload.samples / candidate.batch) if phase == "rollout" else 1
        shapes = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            lowered.args_info[0], self._compiled.input_shardings[0],
        )  # fmt: skip
        self._arguments = [fill(shape, seed) for seed, shape in enumerate(shapes)]
        if phase == "train":
            state, params, batch, scalars = self._arguments
            count = math.ceil(workload.samples / candidate.batch)
            values = {"num_micro": count, "count": workload.samples, "old_decay": 0.5, "ema_decay": 0.5}
            place = lambda name, old: jax.device_put(jnp.asarray(values[name], old.dtype), old.sharding)  # noqa: E731
            scalars = StepScalars(
                key=scalars.key, **{name: place(name, getattr(scalars, name)) for name in values}
            )  # fmt: skip
            self._arguments = [_zero_moments(state), params, _usable_batch(batch), scalars]

    def __call__(self) -> float:
        start = time.perf_counter()
        out = jax.block_until_ready(self._compiled(*self._arguments))
        seconds = time.perf_counter() - start
        if self.phase == "train":
            self._arguments[0] = out[0]  # the one given is donated
        return seconds * self.executions


def _zero_moments(state: Any) -> Any:
    """A second moment must not be negative."""
    return state.replace(opt_state=jax.tree.map(lambda x: x * 0, state.opt_state))


def peak_memory(devices: Sequence[Any]) -> int | None:
    """Most bytes that one of ``devices`` has held so far; None where the platform does not tell."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    known = [peak for peak in peaks if peak is not None]
    return max(known) if len(known) == len(peaks) else None


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return {"median": float(median), "q1": float(low), "q3": float(high), "samples": len(values)}


def measured_rows(
    workload: Workload,
    candidates: Sequence[Candidate],
    *,
    repeats: int = 5,
    phases: Sequence[str] = PHASES,
    devices: Sequence[Any] | None = None,
    program: Callable[..., Program] = Program,
) -> list[Row]:
    """A row for every candidate. One that runs out of memory, or cannot be compiled, is a row that says so.

    Programs of one candidate are held at a time while memory is what decides: a first round compiles, runs and drops
    each; then, as many as fit together are timed in turn.
    """
    devices = list(jax.devices() if devices is None else devices)
    editor = workload.editor("none", "xla")
    one, source = peak_flops(devices[0])
    peak = one * (1 if devices[0].platform == "cpu" else len(devices))
    flops = predict.model_flops(workload, editor)
    rows = [row_of(c, workload, devices[0].device_kind, len(devices), "measured") for c in candidates]
    times: dict[tuple[int, str], list[float]] = {}
    total = len(candidates) * len(phases) * (repeats + 1)
    with progress(total, "measure", "run") as bar:
        held: dict[tuple[int, str], Program] = {}
        for index, (candidate, row) in enumerate(zip(candidates, rows, strict=True)):
            for phase in phases:
                before = peak_memory(devices)
                found, made = _first_run(lambda: program(workload, candidate, phase, devices), held)  # noqa: B023
                row["phases"][phase] = found
                after = peak_memory(devices)
                if after is not None and before is not None and after > before and found["fits"]:
                    found["need"] = after
                bar.update(1)
                if made is not None:
                    held[index, phase] = made
                    times[index, phase] = []
                else:
                    bar.total -= 0 if found["fits"] else repeats
        for _ in range(repeats):
            for (index, phase), runner in held.items():
                times[index, phase].append(runner())
                bar.update(1)
        dropped = [key for index in range(len(rows)) for phase in phases if (key := (index, phase)) not in held]
        held.clear()
        for index, phase in dropped:  # those that do not fit beside the others
            if rows[index]["phases"][phase]["fits"]:
                runner = program(workload, candidates[index], phase, devices)
                runner()
                times[index, phase] = []
                for _ in range(repeats):
                    times[index, phase].append(runner())
                    bar.update(1)
                del runner
                gc.collect()
    for index, row in enumerate(rows):
        for phase, found in row["phases"].items():
            if found["fits"]:
                found["measured"] = spread(times[index, phase])
                found["mfu"] = flops[phase] / found["measured"]["median"] / peak
        row["peak_source"] = source
        finish(row, workload)
    return rows


def _first_run(
    make: Callable[[], Program], held: dict[tuple[int, str], Program]
) -> tuple[dict[str, Any], Program | None]:
    """What became of a program, and the program if it may stay beside those that are ``held``."""
    error: Exception | None = None
    for alone in (False, True):
        if alone and not held:
            break
        if alone:
            held.clear()  # the others may be why: give their memory back
            gc.collect()
        try:
            made = make()
            made()
            return {"fits": True, "compile_seconds": made.compile_seconds}, made
        except jax.errors.JaxRuntimeError as failure:
            error = failure
            if parse_out_of_memory(str(failure)) is None:
                break
        except (ValueError, NotImplementedError) as failure:
            error = failure
            break
        gc.collect()
    message = str(error).strip()
    exhausted = parse_out_of_memory(message)
    if exhausted is None:
        return {"fits": False, "error": message[:2000]}, None
    return {"fits": False, **exhausted, "message": message[:500]}, None
