"""Dynamic micro-batching: requests that wait at the same time are computed together, in one thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from torch_bridge.judge_server.chat_model import Completion, Prompt, Sampling

_LOG = logging.getLogger(__name__)
_FAILURES_TO_BE_ILL = 3

Compute = Callable[[Sequence[Prompt], Sequence[Sampling]], list[Completion]]


class QueueFull(Exception):
    """`retry_after`: seconds in which the queue will about have emptied."""

    def __init__(self, retry_after: int):
        super().__init__("the queue is full")
        self.retry_after = retry_after


@dataclass(frozen=True)
class BatchLimits:
    """A batch starts when it has `size` requests or its first has waited `wait_seconds`; `tokens` bounds its memory:
    requests times the longest prompt. At most `queue` requests are being received, waiting or computed, and those that
    wait have `queue_tokens` in all (about 19 kB each for pictures).
    """

    size: int = 16
    wait_seconds: float = 0.01
    tokens: int = 2**16
    queue: int = 256
    queue_tokens: int = 2**18


@dataclass
class _Waiting:
    prompt: Prompt
    sampling: Sampling
    future: asyncio.Future[Completion]
    since: float = field(default_factory=time.monotonic)

    @property
    def one_token(self) -> bool:
        return self.sampling.max_tokens == 1


class Batcher:
    """Gathers requests of one kind (one token, or longer texts) into batches for `compute`.

    A batch that fails is computed again in halves, down to single requests, so one that cannot be computed, or a batch
    that does not fit into memory, does not fail the others.
    """

    def __init__(
        self,
        compute: Compute,
        limits: BatchLimits,
        thread: ThreadPoolExecutor,
        observe: Callable[[int, float], None] = lambda size, seconds: None,
    ):
        self._compute, self._limits, self._thread, self._observe = compute, limits, thread, observe
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._admitted = 0
        self._seconds_each = 0.1
        self._failures = 0
        self._batch_since: float | None = None
        self._computing: Future[list[Completion]] | None = None

    @property
    def depth(self) -> int:
        """Requests that wait to be computed."""
        return len(self._waiting)

    @property
    def ill(self) -> bool:
        """The last batches all failed."""
        return self._failures >= _FAILURES_TO_BE_ILL

    @property
    def batch_seconds(self) -> float:
        """For how long the present batch has been computing; 0 if none is."""
        return time.monotonic() - self._batch_since if self._batch_since is not None else 0.0

    @property
    def computing(self) -> bool:
        """The model's thread is at work, which it may still be when the work is not waited for any more."""
        return self._computing is not None and not self._computing.done()

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue, to be taken before anything of a request is read. Raises QueueFull."""
        if self._admitted >= self._limits.queue:
            raise self._full()
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    def _full(self) -> QueueFull:
        return QueueFull(min(30, max(1, round(self._admitted * self._seconds_each))))

    async def submit(self, prompt: Prompt, sampling: Sampling) -> Completion:
        """The completion; cancelling the caller takes the request out of the queue. Raises QueueFull, or what computing
        it raised.
        """
        tokens = prompt.tokens + sum(waiting.prompt.tokens for waiting in self._waiting)
        if self._waiting and tokens > self._limits.queue_tokens:
            raise self._full()
        waiting = _Waiting(prompt, sampling, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._arrived.set()
        try:
            return await waiting.future
        finally:
            with contextlib.suppress(ValueError):
                self._waiting.remove(waiting)

    async def run(self) -> None:
        """Computes batches until cancelled."""
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            await self._gather()
            if batch := self._take():
                await self._complete(batch)

    async def _gather(self) -> None:
        """Waits until a batch is full or its first request has waited long enough."""
        while self._waiting and len(self._select()) < self._limits.size:
            left = self._waiting[0].since + self._limits.wait_seconds - time.monotonic()
            if left <= 0:
                return
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)

    def _select(self) -> list[_Waiting]:
        """The first request and those of its kind after it that fit beside it."""
        chosen: list[_Waiting] = []
        longest = 0
        for waiting in self._waiting:
            if chosen and waiting.one_token != chosen[0].one_token:
                continue
            length = max(longest, waiting.prompt.tokens + waiting.sampling.max_tokens)
            if len(chosen) == self._limits.size or (chosen and length * (len(chosen) + 1) > self._limits.tokens):
                break
            chosen.append(waiting)
            longest = length
        return chosen

    def _take(self) -> list[_Waiting]:
        chosen = self._select()
        taken = {id(waiting) for waiting in chosen}
        self._waiting = deque(waiting for waiting in self._waiting if id(waiting) not in taken)
        return [waiting for waiting in chosen if not waiting.future.done()]

    async def _complete(self, batch: list[_Waiting]) -> None:
        self._batch_since = start = time.monotonic()
        try:
            prompts, samplings = [w.prompt for w in batch], [w.sampling for w in batch]
            self._computing = self._thread.submit(self._compute, prompts, samplings)
            completions = await asyncio.wrap_future(self._computing)
            if len(completions) != len(batch):
                raise RuntimeError(f"{len(completions)} completions for {len(batch)} prompts")
        except Exception as error:
            if len(batch) > 1:
                _LOG.warning("a batch of %d failed (%s); trying its halves", len(batch), error)
                for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                    if wanted := [waiting for waiting in half if not waiting.future.done()]:
                        await self._complete(wanted)
                return
            self._failures += 1
            _LOG.error("a request failed", exc_info=error)
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(error)
            return
        finally:
            self._batch_since = None
        seconds = time.monotonic() - start
        self._failures = 0
        self._seconds_each = 0.8 * self._seconds_each + 0.2 * seconds / max(1, len(batch))
        self._observe(len(batch), seconds)
        for waiting, completion in zip(batch, completions, strict=True):
            if not waiting.future.done():
                waiting.future.set_result(completion)
