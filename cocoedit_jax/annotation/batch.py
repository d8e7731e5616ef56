"""Stages by batch file: OpenAI's batch JSONL, as `vllm run-batch` and hosted services take and give it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cocoedit_jax.annotation import boxes
from cocoedit_jax.annotation.engine import box_probe, named_convention, plan
from cocoedit_jax.annotation.stages import MODEL_STAGES, QUESTIONS, STAGES, Rules, pending_at
from cocoedit_jax.annotation.store import Store, write_whole
from cocoedit_jax.annotation.work import (
    NO_ANSWER,
    Tally,
    are_few,
    failure_of,
    prepare,
    reached,
    request_id,
    settle,
    without_logprobs,
)
from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.telemetry import progress
from cocoedit_jax.rewards.chat_protocol import (
    FATAL_STATUS,
    RETRY_STATUS,
    ChatReply,
    ChatRequest,
    Failure,
    Garbled,
    explain_status,
    parse_completion,
    shown,
)

BATCHES = "batches"
_PROBE = "box|probe|probe"


def convention_for_batches(rules_settings: Any) -> str:
    """The box convention without a server to ask: the test picture travels in the batch of `box`. Raises UserError."""
    convention = named_convention(rules_settings)
    if convention is None:
        raise UserError(
            f"config.box.convention='auto': nothing is known of {rules_settings.models.name!r}; set it for batches"
        )
    return convention


def emit(store: Store, rules: Rules, stage: str, numbers: Sequence[int]) -> list[Path]:
    """Writes the requests of `stage` to DIR/batches/STAGE-FIRST-PIECE.jsonl; returns the files, whole or not there.

    Raises:
        UserError: records wait for an earlier stage, or none for this one.
    """
    early = STAGES[: STAGES.index(stage)]
    behind = {name: 0 for name in early}
    folder = store.root / BATCHES
    folder.mkdir(exist_ok=True)
    prefix = f"{stage}-{numbers[0] if numbers else 0:06d}"
    for old in folder.glob(f"{prefix}-*.jsonl"):
        if re.fullmatch(r"\d{5}", old.stem.removeprefix(f"{prefix}-")):  # replies may lie beside, under names like it
            old.unlink()
    mark, limits = fingerprint(rules), rules.settings.engine
    files: list[Path] = []
    lines: list[bytes] = []
    held = 0
    if stage == "box" and rules.settings.box.probe:
        lines.append(_line(f"{_PROBE}|{mark}", box_probe(rules.settings, rules.prompts), rules))
    probes = len(lines)

    def flush() -> None:
        nonlocal held
        path = folder / f"{prefix}-{len(files):05d}.jsonl"
        write_whole(path, b"".join(lines))
        files.append(path)
        lines.clear()
        held = 0

    for number in progress(numbers, desc=f"emit {stage}", unit="shard"):
        annotations = store.read(number)
        for name in early:
            behind[name] += sum(pending_at(annotation, name) for annotation in annotations)
        todo = [annotation for annotation in annotations if pending_at(annotation, stage)]
        after, requests = prepare(stage, todo, store, rules)
        changed = _without_requests(stage, after, requests, rules)
        if changed:
            by_id = {annotation.item.id: annotation for annotation in changed}
            store.write(number, [by_id.get(annotation.item.id, annotation) for annotation in annotations])
        for name, request in requests.items():
            line = _line(f"{name}|{mark}", request, rules)
            if lines and held + len(line) > limits.batch_mib * 2**20:
                flush()
            lines.append(line)
            held += len(line)
            if len(lines) >= limits.batch_requests:
                flush()
    waiting = {name: count for name, count in behind.items() if count}
    if waiting:
        for path in files:
            path.unlink()
        raise UserError(
            f"--emit_batch={stage}: {', '.join(f'{n} records wait for {name}' for name, n in waiting.items())}; that"
            " comes first"
        )
    if len(lines) > (0 if files else probes):
        flush()
    return files


def _without_requests(
    stage: str, annotations: Sequence[Any], requests: Mapping[str, ChatRequest], rules: Rules
) -> list[Any]:
    """Annotations that need no model in this stage, taken through it; and those that died on the way."""
    replies = {name: ChatReply(name, failure=Failure("deadline", "in a batch")) for name in requests}
    after, _ = settle(stage, annotations, replies, rules)
    return [new for new in after if new.status != "pending" or new.stage == stage]


def fingerprint(rules: Rules) -> str:
    """Which settings and prompts a request was made with; part of its custom_id."""
    text = json.dumps(plan(rules.settings, rules.prompts), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _line(custom_id: str, request: ChatRequest, rules: Rules) -> bytes:
    body = request.body(rules.settings.models.name)
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
    return (json.dumps(line, ensure_ascii=True) + "\n").encode()


def accept(store: Store, rules: Rules, paths: Sequence[Path], numbers: Sequence[int]) -> Tally:
    """Takes the records on by the replies in `paths` (all of one stage). Records whose replies are missing stay where
    they are, to be emitted again. Those whose replies came back failed, whether refused or for the server's own fault,
    become dead letters, unless the stage then had more of these than the share `models.max_unanswered` of its records,
    or has no answer yet: that is a fault of the server, and they stay too. The same files may be given twice; nothing
    happens then.

    Raises:
        UserError: a file that is no batch output, of more than one stage, made with other settings, or whose answer
            about the test picture does not fit.
    """
    replies: dict[str, ChatReply] = {}
    mark = fingerprint(rules)
    for path in paths:
        for number, line in _read_lines(path):
            custom_id, reply = _reply(path, number, line)
            name, _, made_with = custom_id.rpartition("|")
            if name.count("|") != 2 or name.split("|")[0] not in MODEL_STAGES:
                raise UserError(f"{path} line {number}: custom_id {custom_id!r} is none of --emit_batch")
            if made_with != mark:
                raise UserError(f"{path} line {number}: was emitted with other settings or prompts than these")
            if reply.ok or name not in replies:
                replies[name] = reply
    stages = {name.split("|")[0] for name in replies}
    if len(stages) != 1:
        raise UserError(f"--accept_batch: replies of {sorted(stages) or 'no stage'}; expected those of one stage")
    (stage,) = stages
    test = replies.pop(_PROBE, None)
    if test is not None and test.ok:
        boxes.settle_convention(
            rules.convention, rules.settings.models.name, test.text or "", rules.settings.models.cell
        )
    if stage == "score" and without_logprobs(replies.values()):
        raise UserError("--accept_batch: the replies have no log-probabilities, which scores are made of")
    bury = _failed_within(rules.settings.models.max_unanswered, store, numbers, stage, replies)
    total = Tally()
    for number in progress(numbers, desc=f"accept {stage}", unit="shard"):
        annotations = store.read(number)
        todo = [annotation for annotation in annotations if pending_at(annotation, stage)]
        if not todo:
            continue
        none = Failure("deadline", "no reply in the batch")
        names = [request_id(stage, question, a.item.id) for a in todo for question in QUESTIONS[stage]]
        mine = {name: replies.get(name, ChatReply(name, failure=none)) for name in names}
        after, tally = settle(stage, todo, mine, rules)
        by_id = {annotation.item.id: annotation for annotation in after}
        for name in bury & by_id.keys():
            by_id[name] = by_id[name].dead(by_id[name].reason or "no_reply", by_id[name].detail)
            tally.done, tally.unanswered = tally.done + 1, tally.unanswered - 1
        store.write(number, [by_id.get(annotation.item.id, annotation) for annotation in annotations])
        total.add(tally)
    return total


def _failed_within(
    limit: float, store: Store, numbers: Sequence[int], stage: str, replies: Mapping[str, ChatReply]
) -> set[str]:
    """Ids of the records all of whose replies are there, some of them failed. None where these are not few, and where
    the stage has no answer yet.
    """
    failed: set[str] = set()
    answered, came = False, list(reached(store, numbers, stage))
    for annotation, through in came:
        if through:
            answered = True
        elif annotation.status != "pending":  # ended in this stage
            answered |= annotation.reason not in (*NO_ANSWER, "unreadable_image")
        else:
            mine = [replies.get(request_id(stage, question, annotation.item.id)) for question in QUESTIONS[stage]]
            if any(reply is not None and failure_of(stage, reply) is None for reply in mine):
                answered = True
            if None not in mine and any(reply is not None and failure_of(stage, reply) for reply in mine):
                failed.add(annotation.item.id)
    return failed if answered and are_few(len(failed), came, limit) else set()


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    if not path.is_file():
        raise UserError(f"--accept_batch: no file {path}")
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                yield number, json.loads(text)
            except ValueError as error:
                raise UserError(f"{path} line {number}: no JSON ({error}); is the file complete?") from error


def _reply(path: Path, number: int, line: Any) -> tuple[str, ChatReply]:
    if not isinstance(line, dict) or not isinstance(line.get("custom_id"), str):
        raise UserError(f"{path} line {number}: no custom_id; expected the output of vllm run-batch")
    name, response = line["custom_id"], line.get("response")
    if "response" not in line:
        raise UserError(f"{path} line {number}: no response; is this the file of requests instead of the replies?")
    if not isinstance(response, dict):
        return name, ChatReply(name, failure=Failure("attempts", f"no reply: {shown(json.dumps(line.get('error')))}"))
    status, body = response.get("status_code", 200), response.get("body")
    if not isinstance(status, int):
        raise UserError(f"{path} line {number}: status_code {status!r}, expected a number as 200")
    if status != 200:
        fatal = status not in RETRY_STATUS and status < 500
        said = line.get("error") if body is None else body  # vllm run-batch tells it beside the response
        message = explain_status(status, json.dumps(said).encode())
        reason = FATAL_STATUS.get(status, f"status_{status}")
        return name, ChatReply(name, failure=Failure(reason, message, fatal=fatal))
    try:
        return name, ChatReply(name, **parse_completion(json.dumps(body).encode()))
    except Garbled as error:
        return name, ChatReply(name, failure=Failure("attempts", str(error), "garbled"))
