"""Load on a judge: many requests at once from random pictures, and how long each took."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image

from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.telemetry import progress
from cocoedit_jax.rewards.chat import (
    ChatClient,
    ChatReply,
    ChatRequest,
    Failure,
    encode_image,
    image_part,
    text_part,
    user_message,
)

_QUESTION = (
    'Instruction: "make the circle red". Image A is before, image B after the edit. How well does B follow the '
    "instruction and keep everything else of A? Answer with one digit from 0 (not at all) to 5 (perfectly)."
)
_WARM_UP_DEADLINE_S = 600.0  # a server's first batch may compile
WAIT_S = 10.0  # of a request's deadline, beside its attempt: for an endpoint that is left alone for a while
FAILURES_BEYOND = 4  # those under way may be lost with one server of several; so many more, and the judge is gone
_FULL = "status_429"  # said by a server that is well


@dataclass(frozen=True)
class Load:
    """`requests` of two pictures each of `size` x `size` pixels, `concurrency` at a time; `group` consecutive ones have
    the same source picture, as the samples of one group of a training run have.
    """

    requests: int = 200
    concurrency: int = 16
    size: int = 512
    group: int = 12
    image_format: str = "png"
    seed: int = 0


def make_requests(load: Load) -> list[ChatRequest]:
    """The load's requests, as a trainer sends them: one token with the log-probabilities of 20."""
    rng = np.random.default_rng(load.seed)

    def picture() -> dict[str, Any]:
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        smooth = np.asarray(coarse.resize((load.size, load.size), Image.Resampling.BICUBIC), np.int16)
        grain = rng.integers(-4, 5, smooth.shape, np.int16)  # so that files are as large as those of photographs
        pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
        return image_part(encode_image(pixels, load.image_format), load.image_format)

    requests = []
    source: dict[str, Any] = {}
    # No server must find a picture in its cache that a trainer would not have sent twice, so each edit is new; edits
    # beyond the first 256 repeat, to bound the memory this takes.
    edits = [picture() for _ in range(min(load.requests, 256))]
    for number in progress(range(load.requests), "make requests", "request"):
        if number % load.group == 0:
            source = picture() if number < 256 else requests[number % 256].messages[0]["content"][1]
        message = user_message(
            text_part("Image A, before:"),
            source,
            text_part("Image B, after:"),
            edits[number % len(edits)],
            text_part(_QUESTION),
        )
        affinity = f"bench-{number // load.group}"
        requests.append(ChatRequest([message], 1, logprobs=True, affinity=affinity, request_id=f"bench-{number}"))
    return requests


def find_model(client: ChatClient) -> str:
    """The model that all of the client's endpoints serve first. Raises UserError: they do not, or cannot be reached."""
    found = client.models(10.0)
    faults = [str(answer) for answer in found.values() if isinstance(answer, Failure)]
    if faults:
        raise UserError("--endpoint: " + "; ".join(faults))
    names = {url: answer for url, answer in found.items() if not isinstance(answer, Failure)}
    first = {answer[0] for answer in names.values() if answer}
    if len(first) != 1 or not all(names.values()):
        raise UserError(f"--endpoint: these models are served: {names}; choose one with --model")
    return first.pop()


def run_load(client: ChatClient, load: Load, requests: Sequence[ChatRequest], deadline_s: float) -> dict[str, Any]:
    """Sends `requests`, `load.concurrency` at a time, each as soon as an earlier one has ended, and measures.

    After `load.concurrency` + `FAILURES_BEYOND` failures in a row it stops, closes `client` and returns what was
    measured until then; a full queue (429) does not count.

    Args:
        deadline_s: for each request; with one attempt, its time and `WAIT_S`.

    Returns:
        JSON of the load and what came of it: `latency_ms` (p50, p90, p99, mean, max; of the requests that were
        answered), `requests_per_s`, `images_per_s`, `answered`, `failed` (cause -> number), `without_logprobs`,
        `stopped` (why before the end, else None; `seconds` then ends with the last answer).

    Raises:
        UserError: the first request, which is not counted, is refused, or none is answered.
    """
    (first,) = client.complete_all([requests[0]], _WARM_UP_DEADLINE_S)
    if first.failure is not None:
        raise UserError(f"--endpoint: {first.failure}")
    waiting = iter(requests)
    lock = threading.Lock()
    replies: list[ChatReply] = []
    bar = progress(len(requests), "judge", "request")
    most = load.concurrency + FAILURES_BEYOND
    row, stopped = 0, None
    start = last_answer = perf_counter()

    def take(reply: ChatReply) -> bool:
        """Whether it was the failure that ends the load."""
        nonlocal row, stopped, last_answer
        replies.append(reply)
        bar.update()
        if reply.failure is None:
            row, last_answer = 0, perf_counter()
        elif reply.failure.cause != _FULL:
            row += 1
        if row < most:
            return False
        answers = sum(one.ok for one in replies)
        stopped = f"{most} requests in a row failed, when {answers} of {len(requests)} had been answered"
        stopped += f"; the last: {reply.failure}"
        return True

    def work() -> None:
        while True:
            with lock:
                request = None if stopped else next(waiting, None)
            if request is None:
                return
            (reply,) = client.complete_all([request], deadline_s)
            with lock:
                last = not stopped and take(reply)
            if last:
                client.close()  # ends those that are under way

    with ThreadPoolExecutor(load.concurrency) as pool:
        for worker in [pool.submit(work) for _ in range(load.concurrency)]:
            worker.result()
    seconds = (last_answer if stopped else perf_counter()) - start
    bar.close()
    answered = [reply for reply in replies if reply.ok]
    failed = Counter(reply.failure.cause or reply.failure.reason for reply in replies if reply.failure)
    if not answered:
        failure = next(reply.failure for reply in replies if reply.failure)
        raise UserError(f"--endpoint: none of {len(replies)} requests was answered; one of them: {failure}")
    latency = 1000 * np.asarray([reply.seconds for reply in answered])
    numbers = dict(zip(("p50", "p90", "p99"), np.percentile(latency, [50, 90, 99]), strict=True))
    numbers |= {"mean": latency.mean(), "max": latency.max()}
    return {
        "endpoints": client.endpoints,
        "model": client.model,
        "requests": load.requests,
        "concurrency": load.concurrency,
        "image_px": load.size,
        "image_format": load.image_format,
        "group": load.group,
        "seconds": seconds,
        "answered": len(answered),
        "failed": dict(failed),
        "stopped": stopped,
        "without_logprobs": sum(reply.logprobs is None for reply in answered),
        "requests_per_s": len(answered) / seconds,
        "images_per_s": 2 * len(answered) / seconds,
        "latency_ms": {name: float(value) for name, value in numbers.items()},
    }


def describe(result: dict[str, Any]) -> str:
    """The result of `run_load` for people."""
    latency = result["latency_ms"]
    failed = ", ".join(f"{number} x {cause}" for cause, number in sorted(result["failed"].items())) or "none"
    lines = [
        f"{result['model']} at {', '.join(result['endpoints'])}",
        f"{result['requests']} requests of 2 pictures of {result['image_px']} px ({result['image_format']}), "
        f"{result['concurrency']} at a time: {result['seconds']:.1f} s, failed: {failed}",
        f"latency  p50 {latency['p50']:.0f} ms  p90 {latency['p90']:.0f} ms  p99 {latency['p99']:.0f} ms  "
        f"max {latency['max']:.0f} ms",
        f"{result['requests_per_s']:.1f} requests/s, {result['images_per_s']:.1f} images/s",
    ]
    if result["without_logprobs"]:
        lines.append(
            f"warning: {result['without_logprobs']} replies had no log-probabilities; this server cannot be a judge"
        )
    return "\n".join(lines)
