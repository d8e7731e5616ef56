"""Signals that end a run without losing what it has earned."""

import signal
import threading
from types import FrameType
from typing import Any

from cocoedit_jax.sharding import processes


class Stopped(Exception):
    """A signal came while something ran that a continued run does again."""


class Stop:
    """Turns SIGINT and SIGTERM into a flag that the loop reads between steps; a second signal acts at once.

    Attributes:
        requested: whether any process had got a signal when ``agree`` was last called; the same in all of them.
    """

    def __init__(self) -> None:
        self.requested = False
        self._signalled = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        print(f"\n{signal.Signals(number).name}: stopping soon; what is done is kept. Once more: at once", flush=True)
        signal.signal(number, self._previous[number])

    def agree(self) -> bool:
        """``requested``, brought up to date; all processes must call it."""
        self.requested = any(processes.gather("stop", lambda: self._signalled))
        return self.requested

    def check(self) -> None:
        """Raises Stopped if a signal has come to any process, all of which must call it; called between parts of work
        whose result is not kept.
        """
        if self.agree():
            raise Stopped

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
