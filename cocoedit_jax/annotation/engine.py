"""Runs the stages over the shards in this process, one stage after another, and decides about missing answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

from cocoedit_jax.annotation import boxes
from cocoedit_jax.annotation.fake import FakeModel
from cocoedit_jax.annotation.prompts import Prompts, load_prompts
from cocoedit_jax.annotation.record import Annotation
from cocoedit_jax.annotation.segmenters import make_segmenter
from cocoedit_jax.annotation.settings import Settings
from cocoedit_jax.annotation.stages import MODEL_STAGES, STAGES, Rules, box_request, pending_at
from cocoedit_jax.annotation.store import Store
from cocoedit_jax.annotation.work import Model, Tally, Worker, are_few, give_up, reached
from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.telemetry import progress
from cocoedit_jax.rewards.chat import ChatClient, ChatRequest, image_part, text_part, user_message

FAKE = "fake"  # models.name of the model that needs no server
_SILENT = 8  # so many records of a shard without one answer among them are no chance


def plan(settings: Settings, prompts: Prompts) -> dict[str, Any]:
    """What must stay the same while a folder is being annotated."""
    return {**settings.fixed(), "prompts": prompts.hashes()}


def make_model(settings: Settings) -> Model:
    """A client of the servers in the settings. Raises UserError."""
    models = settings.models
    if models.name == FAKE:
        return FakeModel()
    return ChatClient(
        models.endpoints, models.name, concurrency=models.concurrency, timeout_s=models.timeout_s,
        key_env=models.key_env, key_file=models.key_file,
    )  # fmt: skip


def make_worker(store: Store, settings: Settings, convention: str, stages: Sequence[str]) -> Worker:
    """A worker that can do `stages`. Raises UserError."""
    rules = Rules(settings, load_prompts(settings.models.prompts), convention)
    model = make_model(settings) if set(stages) & set(MODEL_STAGES) else None
    segmenter = make_segmenter(settings.mask.segmenter, settings.mask.options) if "mask" in stages else None
    return Worker(store, rules, model, segmenter)


def named_convention(settings: Settings) -> str | None:
    """The box convention that the settings or the model's name give."""
    if settings.box.convention != "auto":
        return settings.box.convention
    return boxes.convention_of(settings.models.name)


def box_probe(settings: Settings, prompts: Prompts) -> ChatRequest:
    """The question about the test picture; its answer goes to `boxes.settle_convention`."""
    image, _ = boxes.probe_picture(settings.models.cell)
    return box_request(image, boxes.PROBE_INSTRUCTION, "color", Rules(settings, prompts, ""))


def probe(model: Model, settings: Settings, prompts: Prompts) -> str:
    """Asks for the box of a known square, and for a digit with log-probabilities; returns the box convention.

    Raises:
        UserError: no answer, a box that fits no convention or another one than set, no log-probabilities.
    """
    if not settings.box.probe:
        convention = named_convention(settings)
        if convention is None:
            raise UserError(
                f"config.box.convention='auto': nothing is known of {settings.models.name!r}; set it, or leave"
                " config.box.probe on"
            )
        return convention
    image, _ = boxes.probe_picture(settings.models.cell)
    question = text_part("How many squares are in the picture? Answer with one digit alone.")
    digit = ChatRequest([user_message(image_part(image), question)], logprobs=True, request_id="score|probe|probe")
    box = replace(box_probe(settings, prompts), request_id="box|probe|probe")
    replies = model.complete_all([box, digit], settings.models.probe_s)
    for reply in replies:
        if reply.failure is not None:
            raise UserError(f"config.models: {settings.models.name} cannot be asked: {reply.failure}")
    if replies[1].logprobs is None:
        raise UserError(
            f"config.models: the server of {settings.models.name} sends no log-probabilities, which scores are made of"
            " (transformers serve leaves them out silently); use vLLM or python -m launch.serve_judge"
        )
    return boxes.settle_convention(
        settings.box.convention, settings.models.name, replies[0].text or "", settings.models.cell
    )


def run_stages(worker: Worker, numbers: Sequence[int], stages: Sequence[str] = STAGES) -> None:
    """Takes the shards through the stages, one stage after another, with a progress bar each.

    Raises:
        UserError: too many requests without an answer; all that was earned is on disk.
    """
    limit = worker.rules.settings.models.max_unanswered
    for stage in stages:
        waiting, total = _waiting(worker.store, numbers, stage)
        if not waiting:
            continue
        tally = Tally()
        bar = progress(sum(waiting.values()), desc=f"{stage:>8}", unit="record")
        with bar, ThreadPoolExecutor(worker.rules.settings.engine.in_flight) as pool:
            futures = [pool.submit(worker.run, number, stage) for number in waiting]
            try:
                for future in as_completed(futures):
                    result = future.result()
                    tally.add(result)
                    bar.update(result.done)
                    stop_if_silent(stage, result, tally, total, limit)
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
        settle_unanswered(worker.store, numbers, {stage: tally}, limit)


def _waiting(store: Store, numbers: Sequence[int], stage: str) -> tuple[dict[int, int], int]:
    """Shard -> how many of its annotations wait for `stage`; and how many have come as far, in all."""
    counts, total = {}, 0
    for number in numbers:
        waits = [pending_at(annotation, stage) for annotation, _ in reached(store, [number], stage)]
        total += len(waits)
        if any(waits):
            counts[number] = sum(waits)
    return counts, total


def stop_if_silent(stage: str, latest: Tally, tally: Tally, total: int, limit: float) -> None:
    """Ends a run early whose servers are gone: every further shard would wait until its deadline.

    latest: of one shard; tally: of the stage so far; total: records of the stage.

    Raises:
        UserError: nothing in the latest shard was answered, or more is unanswered than the whole stage may have.
    """
    silent = latest.asked >= _SILENT and latest.unanswered == latest.asked and limit < 1
    if silent or tally.unanswered > limit * total:
        raise _unanswered(stage, tally, limit)


def settle_unanswered(store: Store, numbers: Sequence[int], tallies: Mapping[str, Tally], limit: float) -> None:
    """Few requests without an answer become dead letters; many are a fault of the servers and stop the run.

    Raises:
        UserError: more than the share `limit` of a stage's records have none, dead letters from before included.
    """
    for stage, tally in tallies.items():
        if not tally.unanswered:
            continue
        if not are_few(tally.unanswered, reached(store, numbers, stage), limit):
            raise _unanswered(stage, tally, limit)
        for number in numbers:
            give_up(store, number, stage)


def _unanswered(stage: str, tally: Tally, limit: float) -> UserError:
    return UserError(
        f"{stage}: {tally.unanswered} of {tally.asked} records got no answer, more than config.models.max_unanswered="
        f"{limit:g} allows; the first: {tally.error}. All other work is kept: see to the server, then run the same"
        " command again"
    )


def revive(store: Store, numbers: Sequence[int]) -> int:
    """Puts dead letters back to where they died, for --retry_dead; returns how many."""

    def again(annotation: Annotation) -> Annotation:
        if annotation.status != "dead":
            return annotation
        return replace(annotation, status="pending", reason=None, detail="")

    return sum(store.update(number, again) for number in numbers)
