"""Threads that read requests and decode their pictures, with an eye on those that do not come back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

_T = TypeVar("_T")


class GivenUp(Exception):
    """The time is over; the work does not begin any more, or goes on in its thread for nobody."""


class Decoders:
    """A thread cannot be interrupted, so what is given up while it is at work keeps its thread until it ends."""

    def __init__(self, threads: int):
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "decode")
        self._lock = threading.Lock()
        self._working: set[_Work] = set()

    @property
    def busy(self) -> bool:
        """A thread is at work, which it may still be when the work is not waited for any more."""
        return bool(self._working)

    @property
    def given_up(self) -> int:
        """Threads at work for nobody."""
        with self._lock:
            return sum(work.given_up for work in self._working)

    @property
    def all_given_up(self) -> bool:
        """No thread is left for those who wait."""
        return self.given_up == self._threads

    @property
    def stuck_seconds(self) -> float:
        """For how long all threads have been at work for nobody, counted from when the last of them began; else 0."""
        with self._lock:
            if sum(work.given_up for work in self._working) < self._threads:
                return 0.0
            return time.monotonic() - max(work.since for work in self._working)

    async def run(self, function: Callable[[bytes], _T], body: bytes, deadline: float) -> _T:
        """`function(body)` in a thread. Raises GivenUp at `deadline` (of time.monotonic), or what `function` raises."""
        work = _Work(self, function, body)
        waiting = asyncio.wrap_future(self._pool.submit(work))
        try:
            await asyncio.wait((waiting,), timeout=max(0.0, deadline - time.monotonic()))
            if not waiting.done():
                raise GivenUp
            return waiting.result()
        finally:
            if not waiting.done():  # the time is over, or the server ends
                work.give_up()
                waiting.cancel()

    def shutdown(self) -> None:
        """Starts nothing more; does not wait."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def begin(self, work: _Work) -> None:
        with self._lock:
            work.since = time.monotonic()
            self._working.add(work)

    def end(self, work: _Work) -> None:
        with self._lock:
            self._working.discard(work)


class _Work(Generic[_T]):
    def __init__(self, decoders: Decoders, function: Callable[[bytes], _T], body: bytes):
        self._decoders, self._function = decoders, function
        self._body: bytes | None = body
        self.given_up = False
        self.since = 0.0

    def __call__(self) -> _T:
        self._decoders.begin(self)
        try:
            body, self._body = self._body, None
            if body is None:
                raise GivenUp
            return self._function(body)
        finally:
            self._decoders.end(self)

    def give_up(self) -> None:
        """Also lets go of the body: the pool keeps what it has not begun until a thread is free."""
        self.given_up, self._body = True, None
