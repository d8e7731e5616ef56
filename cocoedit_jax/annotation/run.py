"""The command: lays out or continues the work, runs what it was asked to, gathers when all is done."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from cocoedit_jax.annotation import batch, engine
from cocoedit_jax.annotation.gather import Outcome, gather, unfinished
from cocoedit_jax.annotation.prompts import load_prompts
from cocoedit_jax.annotation.record import Item
from cocoedit_jax.annotation.settings import Settings
from cocoedit_jax.annotation.sources import plain, read_items
from cocoedit_jax.annotation.stages import STAGES
from cocoedit_jax.annotation.store import Store, parse_range
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
    # A picture that would take too much memory is a dead letter, not a warning.
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    if refilter:
        store = Store.open(output)
        return _gather_or_tell(store, settings, part)
    items = None if source is None else find_items(source, prompt)
    if items is None:
        store = Store.open(output)
        store.check_plan(engine.plan(settings, prompts))
    offline = bool(emit_batch or accept_batch)
    if offline:
        convention = batch.convention_for_batches(settings)
    else:  # before a folder is begun: a server that cannot be used leaves nothing behind
        convention = engine.probe(engine.make_model(settings), settings, prompts)
    store = Store.open(output) if items is None else Store.create(
        output, items, engine.plan(settings, prompts), settings.engine.shard_size
    )  # fmt: skip
    numbers = store.numbers((i, n))
    if retry_dead:
        print(f"{engine.revive(store, numbers)} dead letters are taken up again")
    if engine_name == "ray":
        from cocoedit_jax.annotation.ray_engine import run_ray

        run_ray(output, settings, convention, numbers)
    elif emit_batch or accept_batch:
        return _by_batch(store, settings, convention, numbers, emit_batch, accept_batch, part)
    else:
        engine.run_stages(engine.make_worker(store, settings, convention, STAGES), numbers)
    return _gather_or_tell(store, settings, part)


def find_items(source: str, prompt: str | None) -> list[Item]:
    """The items at `source`; with `prompt`, every picture of a folder with this instruction. Raises UserError."""
    if prompt is None:
        return read_items(source)
    folder = Path(source)
    if not folder.is_dir() or not prompt.strip():
        raise UserError(f"--prompt={prompt!r} with --input={source!r}; expected a text, and a folder of pictures")
    names = [(path, path.relative_to(folder).as_posix()) for path in plain.pictures(folder)]
    if not names:
        raise UserError(f"--input={source!r}: no pictures in it ({', '.join(plain.PICTURES)})")
    return [Item(record_id(name, prompt), str(path), prompt.strip()) for path, name in names]


def _by_batch(
    store: Store,
    settings: Settings,
    convention: str,
    numbers: range,
    emit: str | None,
    accepted: Sequence[str],
    part: str,
) -> Outcome | None:
    worker = engine.make_worker(store, settings, convention, ["mask"])
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
    print(f"data set: {store.root / METADATA}; check it with: python -m launch.prepare_data --check={store.root}")
    return outcome
