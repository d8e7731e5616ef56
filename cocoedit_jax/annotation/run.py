"""The command: lays out or continues the work, runs what it was asked to, gathers when all is done."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cocoedit_jax.annotation import batch, engine
from cocoedit_jax.annotation.gather import Outcome, gather, unfinished
from cocoedit_jax.annotation.prompts import load_prompts
from cocoedit_jax.annotation.record import Item
from cocoedit_jax.annotation.report import write_report
from cocoedit_jax.annotation.segmenters import make_segmenter
from cocoedit_jax.annotation.settings import Settings
from cocoedit_jax.annotation.sources import plain, read_items
from cocoedit_jax.annotation.stages import STAGES, Rules
from cocoedit_jax.annotation.store import Store, parse_range
from cocoedit_jax.annotation.work import Worker
from cocoedit_jax.data.records import METADATA, record_id
from cocoedit_jax.errors import UserError


def annotate(
    settings: Settings,
    output: Path,
    *,
    source: str | None = None,
    prompt: str | None = None,
    part: str = "0/1",
    engine_name: str = "local",
    emit_batch: str | None = None,
    accept_batch: Sequence[str] = (),
    refilter: bool = False,
    retry_dead: bool = False,
) -> Outcome | None:
    """See launch/annotate.py for the arguments. Returns the outcome when every shard of the folder is done.

    Raises:
        UserError: input, settings or servers that cannot be used. What was earned is kept.
    """
    i, n = parse_range(part)
    prompts = load_prompts(settings.models.prompts)
    if refilter:
        return _gather_or_tell(Store.open(output), settings, part)
    if source is not None and output.resolve().is_relative_to(Path(source).resolve()):
        if prompt is not None or not _lists_records(Path(source)):
            raise UserError(f"--output={output}: lies in --input, whose pictures it would add to; give another place")
    items = None if source is None else find_items(source, prompt)
    plan = engine.plan(settings, prompts)
    store = None
    if items is None or Store.exists(output):
        store = _lay_out(output, items, plan, settings)
        numbers = store.numbers((i, n))
        if retry_dead:
            print(f"{engine.revive(store, numbers)} dead letters are taken up again")
        elif not unfinished(store):
            return _gather_or_tell(store, settings, part)
    # A server or segmenter that cannot be used is found before a folder is begun.
    if emit_batch or accept_batch:
        convention = batch.convention_for_batches(settings)
        model, later = None, bool(accept_batch) or STAGES.index(emit_batch or "") > STAGES.index("mask")
    else:
        model, later = engine.make_model(settings), engine_name == "local"
    with contextlib.ExitStack() as stack:
        stack.callback(getattr(model, "close", lambda: None))
        segmenter = make_segmenter(settings.mask.segmenter, settings.mask.options) if later else None
        if model is not None:
            convention = engine.probe(model, settings, prompts)
        if store is None:
            store = _lay_out(output, items, plan, settings)
        numbers = store.numbers((i, n))
        worker = Worker(store, Rules(settings, prompts, convention), model, segmenter)
        if engine_name == "ray":
            from cocoedit_jax.annotation.ray_engine import run_ray

            run_ray(output, settings, convention, numbers)
        elif model is None:
            return _by_batch(worker, numbers, emit_batch, accept_batch, part)
        else:
            engine.run_stages(worker, numbers)
        return _gather_or_tell(store, settings, part)


def _lay_out(output: Path, items: Sequence[Item] | None, plan: Mapping[str, Any], settings: Settings) -> Store:
    """The folder with the work laid out, by `items` where it is new. Raises UserError if it holds other work."""
    if items is not None:
        return Store.create(output, items, plan, settings.engine.shard_size)
    store = Store.open(output)
    store.check_plan(plan)
    return store


def _lists_records(folder: Path) -> bool:
    """Whether a file in ``folder`` names its pictures, so that those lying there are not searched for."""
    return any((folder / name).is_file() for name in (plain.PROMPTS, METADATA))


def find_items(source: str, prompt: str | None) -> list[Item]:
    """The items at `source`; with `prompt`, every picture of a folder with this instruction. Says what kinds of
    pictures of a folder are not read. Raises UserError.
    """
    folder = Path(source)
    listed = prompt is None and _lists_records(folder)
    if folder.is_dir() and not listed and (line := plain.left_out(folder)):
        print(line)
    if prompt is None:
        # Absolute: the same work from another folder, or on another machine with the same mounts.
        return [replace(item, image=str(Path(item.image).absolute())) for item in read_items(source)]
    if not folder.is_dir() or not prompt.strip():
        raise UserError(f"--prompt={prompt!r} with --input={source!r}; expected a text, and a folder of pictures")
    names = [(path, path.relative_to(folder).as_posix()) for path in plain.pictures(folder)]
    if not names:
        raise UserError(f"--input={source!r}: no pictures in it ({', '.join(plain.PICTURES)})")
    return [Item(record_id(name, prompt), str(path.absolute()), prompt.strip()) for path, name in names]


def _by_batch(worker: Worker, numbers: range, emit: str | None, accepted: Sequence[str], part: str) -> Outcome | None:
    store, settings = worker.store, worker.rules.settings
    if accepted:
        tally = batch.accept(store, worker.rules, [Path(name) for name in accepted], numbers)
        print(f"{tally.done} records taken on, {tally.unanswered} without a usable reply")
        # What needs no model comes at once, so that the next stage can be emitted.
        engine.run_stages(worker, numbers, ["mask"])
        return _gather_or_tell(store, settings, part)
    assert emit is not None
    engine.run_stages(worker, numbers, [stage for stage in ("load", "mask") if stage in STAGES[: STAGES.index(emit)]])
    files = batch.emit(store, worker.rules, emit, numbers)
    for path in files:
        print(f"wrote {path}")
    if files:
        print(
            f"next: vllm run-batch -i FILE -o REPLIES --model {settings.models.name} for each, then"
            f" --accept_batch=REPLIES"
        )
    else:
        print(f"no record waits for {emit}")
    return None


def _gather_or_tell(store: Store, settings: Settings, part: str) -> Outcome | None:
    waiting = unfinished(store)
    if waiting:
        stages = ", ".join(f"{count} for {stage}" for stage, count in waiting.items())
        print(f"part {part}: done. In the whole folder {waiting.total()} records wait ({stages}); no data set yet")
        return None
    outcome = gather(store, settings)
    print(outcome.text())
    print(f"report:   {write_report(store.root, settings.filter)}")
    print(f"data set: {store.root / METADATA}; check it with: python -m launch.prepare_data --check={store.root}")
    return outcome
