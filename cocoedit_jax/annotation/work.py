"""One stage over one shard: what every engine runs, here or on another machine."""

from __future__ import annotations

import dataclasses
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from PIL import Image

from cocoedit_jax.annotation import stages
from cocoedit_jax.annotation.record import Annotation
from cocoedit_jax.annotation.segmenters import Segmenter
from cocoedit_jax.annotation.stages import STAGES, Rules, Shown, ask, pending_at, take
from cocoedit_jax.annotation.store import Store, file_stem
from cocoedit_jax.data.images import DataFault, load_image
from cocoedit_jax.errors import UserError
from cocoedit_jax.rewards.chat import ChatReply, ChatRequest, Failure
from cocoedit_jax.rewards.judge_score import MIN_CANDIDATES, top_tokens

# Refusals that concern every request: the run stops at once.
_HOPELESS = ("unauthorized", "forbidden", "not_found")
NO_ANSWER = ("no_reply", "refused_request")  # of reasons.DEAD; a pending annotation has them when it was asked in vain
_PICTURES = ("box", "rewrite", "score")  # stages that show the picture to a model
_SEP = "|"


class Model(Protocol):
    """What the stages need of `rewards.chat.ChatClient`."""

    def complete_all(self, requests: Sequence[ChatRequest], deadline_s: float | None = None) -> list[ChatReply]: ...


@dataclass
class Tally:
    """What happened in a stage; adds up over shards."""

    done: int = 0
    asked: int = 0  # records with requests
    unanswered: int = 0  # of these, without a reply to each
    error: str = ""  # of the first of them

    def add(self, other: Tally) -> None:
        self.done, self.asked, self.unanswered = (
            self.done + other.done, self.asked + other.asked, self.unanswered + other.unanswered,
        )  # fmt: skip
        self.error = self.error or other.error


@dataclass
class Worker:
    """Runs stages on shards of `store`. Thread-safe; the segmenter is used by one thread at a time."""

    store: Store
    rules: Rules
    model: Model | None = None
    segmenter: Segmenter | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        # A picture that would take too much memory is a dead letter, not a warning. For the whole process: the filters
        # of warnings are not per thread.
        warnings.simplefilter("error", Image.DecompressionBombWarning)

    def run(self, number: int, stage: str) -> Tally:
        """Takes every annotation of shard `number` that waits for `stage` through it, and writes the shard.

        Annotations without an answer stay where they are; `detail` says why.

        Raises:
            UserError: the server refuses everything, or sends no log-probabilities. What was earned is written before.
        """
        annotations = self.store.read(number)
        places = [i for i, annotation in enumerate(annotations) if pending_at(annotation, stage)]
        if not places:
            return Tally()
        start = time.perf_counter()
        todo = [annotations[i] for i in places]
        after, tally = self._advance(stage, todo)
        seconds = (time.perf_counter() - start) / len(todo)
        for i, annotation in zip(places, after, strict=True):
            annotations[i] = replace(annotation, seconds={**annotation.seconds, stage: round(seconds, 4)})
        self.store.write(number, annotations)
        return tally

    def _advance(self, stage: str, todo: list[Annotation]) -> tuple[list[Annotation], Tally]:
        if stage == "load":
            return [stages.load(annotation) for annotation in todo], Tally(done=len(todo))
        if stage == "mask":
            return [self._segment(annotation) for annotation in todo], Tally(done=len(todo))
        assert self.model is not None, "a stage that asks a model"
        after, requests = prepare(stage, todo, self.store, self.rules)
        replies = self.model.complete_all(list(requests.values()), self.rules.settings.models.deadline_s)
        stop = next((r.failure for r in replies if r.failure is not None and r.failure.reason in _HOPELESS), None)
        if stop is not None:
            raise UserError(f"{stage}: {stop}")
        by_id = dict(zip(requests, replies, strict=True))
        if stage == "score" and without_logprobs(replies):
            raise UserError(
                "score: the server sends no log-probabilities (transformers serve leaves them out silently); scores are"
                " expectations over them: use vLLM or python -m launch.serve_judge"
            )
        return settle(stage, after, by_id, self.rules)

    def _segment(self, annotation: Annotation) -> Annotation:
        assert self.segmenter is not None, "mask needs a segmenter"
        try:
            image = load_image(Path(annotation.item.image))
        except DataFault as fault:
            return annotation.dead("unreadable_image", str(fault))
        with self._lock:
            after, mask = stages.segment(annotation, image, self.segmenter, self.rules.settings)
        return after if mask is None else replace(after, mask_file=self.store.write_mask(after, mask))


def request_id(stage: str, question: str, item_id: str) -> str:
    """ASCII without spaces, whatever the item's id: it travels in HTTP headers."""
    return _SEP.join((stage, question, file_stem(item_id)))


def prepare(
    stage: str, todo: Sequence[Annotation], store: Store, rules: Rules
) -> tuple[list[Annotation], dict[str, ChatRequest]]:
    """The requests of a stage by id, and the annotations: dead where the picture has become unreadable."""
    after: list[Annotation] = []
    requests: dict[str, ChatRequest] = {}
    for annotation in todo:
        shown = None
        if stage in _PICTURES:
            try:
                shown = Shown(load_image(Path(annotation.item.image)), store.read_mask(annotation))
            except DataFault as fault:
                after.append(annotation.dead("unreadable_image", str(fault)))
                continue
        after.append(annotation)
        for question, request in ask(stage, annotation, shown, rules).items():
            name = request_id(stage, question, annotation.item.id)
            requests[name] = dataclasses.replace(request, request_id=name)
    return after, requests


def settle(
    stage: str, annotations: Sequence[Annotation], replies: Mapping[str, ChatReply], rules: Rules
) -> tuple[list[Annotation], Tally]:
    """The annotations after a stage, by the replies there are. Those with a failed reply stay pending."""
    by_item: dict[str, dict[str, ChatReply]] = {}
    for name, reply in replies.items():
        _, question, key = name.split(_SEP)
        by_item.setdefault(key, {})[question] = reply
    tally, after = Tally(), []
    for annotation in annotations:
        mine = by_item.get(file_stem(annotation.item.id), {})
        failure = next((found for reply in mine.values() if (found := failure_of(stage, reply)) is not None), None)
        tally.asked += bool(mine)
        if annotation.status != "pending":
            tally.done += 1
            after.append(annotation)
        elif failure is not None:
            tally.unanswered += 1
            tally.error = tally.error or str(failure)
            reason = "refused_request" if failure.fatal else "no_reply"
            after.append(replace(annotation, reason=reason, detail=str(failure)))
        else:
            tally.done += 1
            after.append(take(stage, replace(annotation, reason=None, detail=""), mine, rules))
    return after, tally


def failure_of(stage: str, reply: ChatReply) -> Failure | None:
    """Why a reply is none: its own failure, or a score of which only the sampled digit came. That says nothing of the
    record, and another time the server sends all.
    """
    found = reply.logprobs[0] if stage == "score" and reply.ok and reply.logprobs else None
    if found is None or len(set(found)) >= MIN_CANDIDATES:
        return reply.failure
    return Failure(
        "few_candidates",
        f"{reply.endpoint or 'the server'} sent {top_tokens(found)} alone; vLLM does so while another client, such as a"
        " training run's judge, names the tokens that it wants: give the annotation a server of its own",
    )


def without_logprobs(replies: Iterable[ChatReply]) -> bool:
    """Whether there are answers, and none of them has log-probabilities: a fault of the server, not of the records."""
    answers = [reply for reply in replies if reply.ok]
    return bool(answers) and all(reply.logprobs is None for reply in answers)


def reached(store: Store, numbers: Sequence[int], stage: str) -> Iterator[tuple[Annotation, bool]]:
    """Records that have come as far as `stage`, each with whether it is through."""
    place = STAGES.index(stage)
    for annotation in (annotation for number in numbers for annotation in store.read(number)):
        comes_next = STAGES.index(annotation.stage) + 1 if annotation.stage else 0
        if comes_next > place or (comes_next == place and annotation.reason != "global_edit"):
            yield annotation, comes_next > place


def are_few(unanswered: int, came: Iterable[tuple[Annotation, bool]], limit: float) -> bool:
    """Whether the records that stay without an answer, and the dead letters that the stage has for that already, are no
    more than the share `limit` of `came`, its records (`reached`): of all, because the ones that fail again and again
    are the whole of what is asked last.
    """
    came = list(came)
    before = sum(not through and a.status == "dead" and a.reason in NO_ANSWER for a, through in came)
    return unanswered + before <= limit * len(came)


def give_up(store: Store, number: int, stage: str) -> int:
    """Makes dead letters of what stayed without an answer in `stage`; returns how many."""

    def bury(annotation: Annotation) -> Annotation:
        if pending_at(annotation, stage) and annotation.reason in NO_ANSWER:
            return annotation.dead(annotation.reason, annotation.detail)
        return annotation

    return store.update(number, bury)
