"""What a judge of edits is, and the judges by name.

A judge says how well an edited image follows its instruction. A judgement that could not be made has no score; it is
never replaced by a default number, because a made-up score trains the policy as much as a real one.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np

from cocoedit_jax.data.scene_judge import judge_batch
from cocoedit_jax.data.scene_spec import SceneSpec
from cocoedit_jax.errors import UserError


@dataclass(frozen=True)
class JudgeRequest:
    """One edit to be judged: `source` and `edited` [H, W, 3], uint8 or float in [0, 1]; `extra`: the record's own
    further fields.
    """

    source: np.ndarray
    edited: np.ndarray
    instruction: str
    record_id: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class JudgeScore:
    """`score` in [0, 1], or None with the reason in `error`."""

    score: float | None
    error: str | None = None

    def __post_init__(self) -> None:
        if (self.score is None) == (self.error is None):
            raise ValueError(f"JudgeScore: score {self.score!r} and error {self.error!r}, expected exactly one of them")
        if self.score is not None and not 0.0 <= self.score <= 1.0:  # also refuses NaN
            raise ValueError(f"JudgeScore: score {self.score!r}, expected a number in [0, 1]")

    @property
    def valid(self) -> bool:
        return self.score is not None


class Judge(Protocol):
    """Scores for a sequence of requests, in the same order and number. One bad request must not fail the others.

    A judge may also have some of these methods (``judge_hook``):

    - ``fault(extra) -> str | None``: why it cannot judge a record with these further fields. Such records are left out
      before training starts.
    - ``start()``: called when all else is known to be usable, before the model is loaded; raises UserError when the
      judge cannot be used.
    - ``check(step)``: called before optimizer step ``step``; raises UserError when the judge is not to be trusted.
    - ``pop_counters() -> dict[str, float]``: numbers for the log, counted since the last call; they appear as
      ``judge/NAME``. Names ``invalid/REASON`` and ``retry/CAUSE`` get charts of their own. Those of several processes
      are added; names in the attribute ``averaged`` are averaged by their ``scored``.
    - ``close()``: gives up calls that are under way; the judge may be called again.

    Calling a judge may raise UserError, for what neither time nor another request can mend: the run then saves its
    state and stops.
    """

    def __call__(self, requests: Sequence[JudgeRequest]) -> list[JudgeScore]: ...


_Factory = TypeVar("_Factory", bound=Callable[..., Judge])
JUDGES: dict[str, Callable[..., Judge]] = {}
_MODULES = ("cocoedit_jax.rewards.vlm_judge",)  # they import this one, to register the judges that they hold


def register_judge(name: str) -> Callable[[_Factory], _Factory]:
    """Decorator: make a judge (its class, or a function that returns one) available to `make_judge`."""

    def add(factory: _Factory) -> _Factory:
        if name in JUDGES:
            raise ValueError(f"judge {name!r} is registered already")
        JUDGES[name] = factory
        return factory

    return add


def make_judge(name: str, **options: Any) -> Judge:
    """The judge `name`, built with `options`; `MODULE:NAME` takes a class or function that is not registered.

    Raises:
        UserError: an unknown name or option.
    """
    for module in _MODULES:
        importlib.import_module(module)
    factory = _imported(name) if ":" in name else JUDGES.get(name)
    if factory is None:
        raise UserError(f"judge: {name!r} given, expected MODULE:NAME or one of {', '.join(sorted(JUDGES))}")
    try:
        return factory(**options)
    except TypeError as error:
        raise UserError(f"judge {name!r}: options {sorted(options)} do not fit ({error})") from error


def judge_options(section: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``make_judge`` from a configuration's section: its plain keys, and those of the subsection that
    has the judge's name. Subsections of other judges are left out.
    """
    plain = {key: value for key, value in section.items() if not isinstance(value, Mapping)}
    own = section.get(section["name"])
    return plain | (dict(own) if isinstance(own, Mapping) else {})


def judge_hook(judge: Judge, name: str) -> Callable[..., Any]:
    """An optional method of a judge (see ``Judge``), or a function that does nothing."""
    return getattr(judge, name, lambda *args: None)


def _imported(name: str) -> Callable[..., Judge]:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"judge: {name!r} given, but it cannot be imported ({error})") from error


def judge_scores(judge: Judge, requests: Sequence[JudgeRequest]) -> tuple[np.ndarray, np.ndarray]:
    """Scores float64 [n] (NaN where invalid) and validity bool [n]. Raises ValueError if the judge answers for another
    number of requests than it was given.
    """
    answers = judge(requests)
    if len(answers) != len(requests):
        raise ValueError(f"judge: {len(answers)} answers to {len(requests)} requests, expected one for each")
    scores = np.asarray([math.nan if answer.score is None else answer.score for answer in answers], np.float64)
    return scores, ~np.isnan(scores)


_NO_SCENE = "field 'scene' is missing; the judge 'scenes' works on data that prepare_data --source=scenes made"


@register_judge("scenes")
class SceneJudge:
    """Programmatic judge for procedural scenes; needs the scene description in `extra["scene"]`. See `scene_judge`."""

    def fault(self, extra: Mapping[str, Any]) -> str | None:
        return None if "scene" in extra else _NO_SCENE

    def __call__(self, requests: Sequence[JudgeRequest]) -> list[JudgeScore]:
        answers: list[JudgeScore | None] = [None] * len(requests)
        ready: dict[tuple[int, ...], list[tuple[int, SceneSpec, np.ndarray]]] = {}
        for number, request in enumerate(requests):
            try:
                spec, image = _scene_request(request)
            except ValueError as error:
                answers[number] = JudgeScore(None, f"record {request.record_id!r}: {error}")
                continue
            ready.setdefault(image.shape, []).append((number, spec, image))
        for members in ready.values():
            numbers, specs, images = zip(*members, strict=True)
            for number, score in zip(numbers, judge_batch(specs, np.stack(images)).score, strict=True):
                answers[number] = JudgeScore(float(np.clip(score, 0.0, 1.0)))
        return [answer for answer in answers if answer is not None]


def _scene_request(request: JudgeRequest) -> tuple[SceneSpec, np.ndarray]:
    if "scene" not in request.extra:
        raise ValueError(_NO_SCENE)
    spec = SceneSpec.from_json(request.extra["scene"])
    image = np.asarray(request.edited)
    if image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 3 or image.shape[0] % 2:
        raise ValueError(f"edited: shape {image.shape}, expected (size, size, 3) with an even size")
    if image.shape[0] < 16:
        raise ValueError(f"edited: {image.shape[0]} px, expected at least 16")
    if image.dtype == np.uint8:
        image = image.astype(np.float64) / 255.0
    image = image.astype(np.float64)
    if not np.isfinite(image).all():
        raise ValueError("edited: the image holds NaN or infinite values")
    return spec, np.clip(image, 0.0, 1.0)
