"""Judge "vlm": a vision-language model behind OpenAI's chat completions (vLLM, or python -m launch.serve_judge).

The score of an edit is the expected digit of a one-token answer. A score that could not be had is invalid with a reason
code, never a number: ``low_mass`` (the model did not answer with a digit), ``no_logprobs``, ``few_candidates``,
``deadline`` (no reply in time), ``attempts`` (garbled replies), ``cancelled``, ``bad_image``, ``bad_text``,
``missing_field``. A refusal that repeating cannot
mend (400, 401, 403, 404, 413, 422) stops the run.
"""

import hashlib
import logging
import re
import secrets
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cocoedit_jax.errors import UserError
from cocoedit_jax.rewards.chat import ChatClient, ChatReply, ChatRequest, encode_image
from cocoedit_jax.rewards.chat_protocol import MIN_JPEG_QUALITY
from cocoedit_jax.rewards.judge import JudgeRequest, JudgeScore, register_judge
from cocoedit_jax.rewards.judge_probe import (
    QWEN_DIGITS,
    canary_pairs,
    choose_model,
    hint,
    probe_logprobs,
    supports_token_ids,
)
from cocoedit_jax.rewards.judge_prompt import COMBINE, load_prompt
from cocoedit_jax.rewards.judge_score import MIN_CANDIDATES, digit_score, top_tokens
from cocoedit_jax.rewards.score_cache import ScoreCache

_LOG = logging.getLogger(__name__)
_KEPT_IMAGES = 64  # encoded images kept in memory: the edits of a group share their source
_LOGGED = 3  # invalid answers of a call that are logged in full
_SPECIAL = re.compile(r"<\|\w+\|>")


@dataclass(frozen=True)
class _Question:
    """One question about one edit, and the key under which its judgement is kept: the hash of all that it shows."""

    key: str
    request: ChatRequest


@register_judge("vlm")
class VlmJudge:
    """See the module. ``start`` must be called before the first judgement.

    Args:
        endpoints: base URLs of the servers, a sequence or separated by commas.
        model: name of the model; empty: the only one that the servers have.
        template: cocoedit, edit_r1, two_question, or a .json file of the same form (``judge_prompt``).
        concurrency: most requests under way at once, over all endpoints.
        timeout_s: seconds for one attempt.
        step_deadline_s: seconds after a batch of edits was drawn, when what is not judged becomes invalid.
        start_deadline_s: seconds for the servers to answer at the start.
        image_format: png (exact), or jpeg.
        jpeg_quality: 95 to 100.
        cache_dir: folder that keeps judgements over runs, by content; empty: they are kept while the run lasts.
        key_env, key_file: environment variable or file that holds the API key.
        canary_every: optimizer steps between checks with pictures whose order is known; 0: at the start only.
        canary_margin: by how much a good edit must score above none, and above the good one with images exchanged;
            negative: no such checks.
        min_mass: probability of the digits below which an answer is invalid.
        digit_token_ids: ids of the tokens 0 to 5, for servers that know ``logprob_token_ids``; empty: Qwen's are tried.

    Raises:
        UserError: naming every option that cannot be used.
    """

    def __init__(
        self,
        endpoints: str | Sequence[str] = "http://127.0.0.1:8000/v1",
        model: str = "",
        template: str = "cocoedit",
        concurrency: int = 32,
        timeout_s: float = 60.0,
        step_deadline_s: float = 600.0,
        start_deadline_s: float = 60.0,
        image_format: str = "png",
        jpeg_quality: int = MIN_JPEG_QUALITY,
        cache_dir: str = "",
        key_env: str = "",
        key_file: str = "",
        canary_every: int = 50,
        canary_margin: float = 0.05,
        min_mass: float = 0.5,
        digit_token_ids: Sequence[int] = (),
        **client_options: Any,
    ):
        problems = _problems(locals())
        if problems:
            raise UserError("\n".join(f"config.judge.vlm.{problem}" for problem in problems))
        urls = [url.strip() for url in endpoints.split(",")] if isinstance(endpoints, str) else list(endpoints)
        self._prompt = load_prompt(template)
        self._client = ChatClient(
            urls, model, concurrency=concurrency, timeout_s=timeout_s, key_env=key_env, key_file=key_file,
            **client_options,
        )  # fmt: skip
        self._cache = ScoreCache(cache_dir)
        self._model = self._model_key = model
        self._step_deadline, self._start_deadline, self._timeout = step_deadline_s, start_deadline_s, timeout_s
        self._format, self._quality = image_format, jpeg_quality
        self._canary_every, self._canary_margin, self._min_mass = canary_every, canary_margin, min_mass
        self._digits = tuple(digit_token_ids)
        self._extra: dict[str, Any] = {}
        self._images: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._sums: dict[str, float] = {}
        self._retries: Counter[str] = Counter()
        self._run, self._step, self._asked = secrets.token_hex(3), 0, 0
        self._started = False

    averaged = ("mass", "entropy")  # of ``pop_counters``: means

    # --- the hooks of a judge -----------------------------------------------------------------------------------------

    def fault(self, extra: Mapping[str, Any]) -> str | None:
        return self._prompt.fault(extra)

    def start(self) -> None:
        """Asks every server what it can do and has it judge the canaries.

        Raises:
            UserError: saying what to change.
        """
        self._cache.open()
        name = self._client.model = choose_model(self._client, self._model, self._start_deadline)
        # A name that a server was told to use for its model may have been another one's when the cache was filled.
        self._model_key = "\0".join([name, *sorted(self._client.roots[name] - {name})])
        messages = self._canary_messages(*canary_pairs()[0][1])[0]
        probe_logprobs(self._client, messages, self._start_deadline)
        digits = self._digits or QWEN_DIGITS
        if supports_token_ids(self._client, messages, digits, self._start_deadline):
            self._extra = {"logprob_token_ids": list(digits)}
        elif self._digits:
            raise UserError(
                f"config.judge.vlm.digit_token_ids={list(digits)}: {', '.join(self._client.endpoints)} do not answer "
                "with the digits 0 to 5 for them; leave the option empty to take the likeliest 20 tokens"
            )
        self._started = True
        self._check_canaries(self._start_deadline)
        self.pop_counters()

    def check(self, step: int) -> None:
        """Called before optimizer step ``step``; every ``canary_every`` steps it repeats the canaries.

        Raises:
            UserError: a server fails them, or none answers.
        """
        self._step = step
        if not self._started:
            self.start()
        elif self._canary_every and step % self._canary_every == 0:
            self._check_canaries(self._step_deadline)

    def pop_counters(self) -> dict[str, float]:
        """Since the last call: ``scored``, ``from_cache`` and ``invalid/REASON`` (samples, each under one of them),
        ``retry/CAUSE`` (attempts), and the means of ``mass`` and ``entropy`` (nats) over the answers.
        """
        with self._lock:
            counts, sums = dict(self._counts), dict(self._sums)
            self._counts.clear()
            self._sums.clear()
            now = Counter(self._client.counters)
            news, self._retries = now - self._retries, now
        found = {name: float(value) for name, value in counts.items()}
        found |= {f"retry/{k.removeprefix('retry_')}": float(v) for k, v in news.items() if k.startswith("retry_")}
        if sums.get("answers"):
            found |= {name: sums[name] / sums["answers"] for name in ("mass", "entropy")}
        return found

    def close(self) -> None:
        """Gives up what is under way; the judge can be used again."""
        self._client.close()
        self._cache.close()

    # --- judging ------------------------------------------------------------------------------------------------------

    def __call__(self, requests: Sequence[JudgeRequest]) -> list[JudgeScore]:
        """Scores in the order of ``requests``. Raises UserError for a refusal that repeating cannot mend."""
        if not self._started:
            self.start()
        asked: list[list[_Question] | str] = []  # of every sample, or the reason why it cannot be asked about
        for request in requests:
            try:
                asked.append(self._questions(request))
            except ValueError as error:
                asked.append(str(error))
        questions = {question.key: question for found in asked if not isinstance(found, str) for question in found}
        cached = {key: entry for key in questions if (entry := self._kept(key)) is not None}
        missing = [question for key, question in questions.items() if key not in cached]
        judged = cached | dict(zip((question.key for question in missing), self._ask(missing), strict=True))
        answers = []
        for request, found in zip(requests, asked, strict=True):
            outcomes = [found] if isinstance(found, str) else [judged[question.key] for question in found]
            reason = next((outcome for outcome in outcomes if isinstance(outcome, str)), None)
            if reason is None:
                scores = [outcome["score"] for outcome in outcomes if not isinstance(outcome, str)]
                answers.append(JudgeScore(float(np.clip(COMBINE[self._prompt.combine](scores), 0.0, 1.0))))
                known = not isinstance(found, str) and all(question.key in cached for question in found)
                self._count("from_cache" if known else "scored")
            else:
                answers.append(JudgeScore(None, f"record {request.record_id!r}: {reason}"))
                self._count(f"invalid/{reason.partition(':')[0]}")
        self._log_invalid([answer.error for answer in answers if answer.error])
        return answers

    def _questions(self, request: JudgeRequest) -> list[_Question]:
        """The requests of a sample. Raises ValueError, reason code first."""
        try:
            source, edited = self._encoded(request.source), self._encoded(request.edited)
        except ValueError as error:
            raise ValueError(f"bad_image: {error}") from error
        fault = self._prompt.fault(request.extra)
        if fault:
            raise ValueError(f"missing_field: {fault}")
        found = []
        for name in self._prompt.questions:
            text = self._prompt.ask(name, request.instruction, request.extra)
            if special := _SPECIAL.search(text):  # the server would refuse it, and a refusal stops the run
                raise ValueError(f"bad_text: {special[0]!r} is a model's own sign, not text")
            content = hashlib.sha256()
            for part in (self._model_key, self._prompt.digest, name, self._format, text, source, edited):
                data = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
                content.update(len(data).to_bytes(8, "big") + data)
            messages = self._prompt.messages(source, edited, text, self._format)
            asked = self._request(messages, affinity=request.record_id)
            found.append(_Question(content.hexdigest()[:32], asked))
        return found

    def _request(self, messages: list[dict[str, Any]], affinity: str = "", endpoint: str = "") -> ChatRequest:
        with self._lock:
            self._asked += 1
            identity = f"{self._run}-{self._step}-{self._asked}"
        return ChatRequest(
            messages, logprobs=True, affinity=affinity, request_id=identity, endpoint=endpoint, extra=self._extra
        )

    def _ask(self, questions: Sequence[_Question]) -> list[dict[str, float] | str]:
        """For every question its judgement, or the reason code and words why there is none."""
        keys = {question.request.request_id: question.key for question in questions}

        def keep(reply: ChatReply) -> None:  # at once, so that nothing is paid for twice if the run ends here
            outcome = self._judgement(reply)
            if not isinstance(outcome, str):
                self._cache.put(keys[reply.request_id], outcome)

        requests = [question.request for question in questions]
        replies = self._client.complete_all(requests, self._step_deadline, on_reply=keep, stop_on_fatal=True)
        for reply in replies:
            failure = reply.failure
            if failure is not None and failure.fatal:
                raise UserError(f"judge 'vlm': {failure.message}{hint(failure)} (request {reply.request_id})")
        outcomes = [self._judgement(reply) for reply in replies]
        with self._lock:
            for outcome in outcomes:
                if not isinstance(outcome, str):
                    for name, value in (("answers", 1.0), *outcome.items()):
                        self._sums[name] = self._sums.get(name, 0.0) + value
        return outcomes

    def _judgement(self, reply: ChatReply) -> dict[str, float] | str:
        if reply.failure is not None:
            return f"{reply.failure}{hint(reply.failure) if reply.failure.fatal else ''}"
        if reply.logprobs is None:
            return f"no_logprobs: {reply.endpoint} sent a reply without them"
        if len(set(reply.logprobs[0])) < MIN_CANDIDATES:
            return (
                f"few_candidates: {reply.endpoint} sent {top_tokens(reply.logprobs[0])} alone; vLLM does so while "
                "another client asks it in another way, with or without logprob_token_ids"
            )
        found = digit_score(reply.logprobs[0])
        if found.mass < self._min_mass:
            return (
                f"low_mass: {found.mass:.3f} on the digits 0 to 5, expected {self._min_mass:g}; likeliest tokens: "
                f"{top_tokens(reply.logprobs[0])}"
            )
        return {"score": found.score, "mass": found.mass, "entropy": found.entropy}

    def _kept(self, key: str) -> dict[str, float] | None:
        """The judgement in the cache, if a new one would count as well: a run before may have had another min_mass."""
        entry = self._cache.get(key)
        return entry if entry is not None and entry.get("mass", 0.0) >= self._min_mass else None

    def _encoded(self, image: np.ndarray) -> bytes:
        pixels = np.ascontiguousarray(image)
        name = hashlib.sha256(f"{pixels.dtype}{pixels.shape}".encode() + pixels.tobytes()).digest()
        with self._lock:
            if name in self._images:
                self._images.move_to_end(name)
                return self._images[name]
        data = encode_image(pixels, self._format, self._quality)
        with self._lock:
            self._images[name] = data
            while len(self._images) > _KEPT_IMAGES:
                self._images.popitem(last=False)
        return data

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    @staticmethod
    def _log_invalid(errors: list[str]) -> None:
        for error in errors[:_LOGGED]:
            _LOG.warning("no score: %s", error)
        if len(errors) > _LOGGED:
            _LOG.warning("no score for %d more edits of this batch", len(errors) - _LOGGED)

    # --- canaries -----------------------------------------------------------------------------------------------------

    def _canary_messages(self, before: np.ndarray, after: np.ndarray, words: str) -> list[list[dict[str, Any]]]:
        """The messages of every question; further fields of a record say what the instruction says."""
        images, extra = (self._encoded(before), self._encoded(after)), dict.fromkeys(self._prompt.fields, words)
        questions = [self._prompt.ask(name, words, extra) for name in self._prompt.questions]
        return [self._prompt.messages(*images, text, self._format) for text in questions]

    def _check_canaries(self, deadline_s: float) -> None:
        if self._canary_margin < 0:
            return
        urls = self._client.endpoints
        if len(urls) > 1:  # one server that is down does not hold up the others
            deadline_s = min(deadline_s, 2 * self._timeout)
        asked = [(url, kind, self._canary_messages(*pair)) for url in urls for kind, pair in canary_pairs()]
        requests = [self._request(each, endpoint=url) for url, _, messages in asked for each in messages]
        outcomes = iter([self._judgement(reply) for reply in self._client.complete_all(requests, deadline_s)])
        scores: dict[str, dict[str, list[float]]] = {url: {"good": [], "bad": [], "swapped": []} for url in urls}
        reasons: dict[str, str] = {}
        for url, kind, messages in asked:
            answers = [next(outcomes) for _ in messages]
            values = [answer["score"] for answer in answers if not isinstance(answer, str)]
            if len(values) == len(answers):
                scores[url][kind].append(COMBINE[self._prompt.combine](values))
            else:
                reasons[url] = next(answer for answer in answers if isinstance(answer, str))
        # One answer that is missing is bad luck; a kind without any is a server that does not judge.
        silent = [url for url, found in scores.items() if not all(found.values())]
        problems = [self._canary_problem(url, scores[url]) for url in urls if url not in silent]
        problems = [problem for problem in problems if problem]
        if problems or len(silent) == len(urls):
            problems += [f"{url} did not judge the test pictures ({reasons[url]})" for url in silent]
            raise UserError("\n".join(f"judge 'vlm': {problem}" for problem in problems))
        for url in silent:
            _LOG.warning("%s did not judge the test pictures (%s)", url, reasons[url])

    def _canary_problem(self, url: str, scores: Mapping[str, list[float]]) -> str | None:
        mean = {kind: float(np.mean(values)) for kind, values in scores.items()}
        if mean["good"] >= max(mean["bad"], mean["swapped"]) + self._canary_margin:
            return None
        found = ", ".join(f"{kind} {value:.3f}" for kind, value in mean.items())
        return (
            f"{url} cannot tell test pictures apart: mean scores are {found}; expected good to be at least "
            f"{self._canary_margin:g} above the others. Swapped as high as good means that images arrive in the wrong "
            "order; all alike, that the model does not see them or is too weak to judge"
        )


def _problems(options: Mapping[str, Any]) -> list[str]:
    """What is wrong with the options that the client does not check."""

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)

    ids = options["digit_token_ids"]
    checks = {
        "image_format": (options["image_format"] in ("png", "jpeg"), "png or jpeg"),
        "jpeg_quality": (number(options["jpeg_quality"]) and MIN_JPEG_QUALITY <= options["jpeg_quality"] <= 100,
                         f"{MIN_JPEG_QUALITY} to 100"),
        "canary_every": (type(options["canary_every"]) is int and options["canary_every"] >= 0,
                         "a whole number, at least 0"),
        "canary_margin": (number(options["canary_margin"]), "a number"),
        "min_mass": (number(options["min_mass"]) and 0 < options["min_mass"] <= 1, "a number above 0, at most 1"),
        "digit_token_ids": (len(ids) in (0, 6) and all(type(i) is int and i >= 0 for i in ids), "six ids, or none"),
    }  # fmt: skip
    for name in ("timeout_s", "step_deadline_s", "start_deadline_s"):
        checks[name] = (number(options[name]) and options[name] > 0, "a number of seconds above 0")
    return [f"{name}={options[name]!r}; expected {said}" for name, (usable, said) in checks.items() if not usable]
