"""What the processes of one run tell each other: one process on each host, all running the same program.

Numbers that the host holds go as JSON through the store of JAX's coordination service: they stay exact, they need no
device, and who waits for them learns when another process has failed. In a single process, all of it is a plain call.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed  # its client is the only way to the store

from cocoedit_jax.errors import UserError

BEAT_S = 2.0  # seconds between signs of life
LOST_S = 90.0  # without one for so long, a process counts as lost; JAX ends all after 100 s
SUSPECT_S = 15.0  # the same after an exchange between devices has failed, as it does when the other side is gone
GRACE_S = 15.0  # from another process's failure to the end of this one, whatever it is doing; twice for process 0
_SPACE = "cocoedit_jax"
_SLICE_MS = 1000  # of waiting, between looks at whether others have failed


class ProcessFailed(UserError):
    """Another process of the run has failed or is gone; the message names it. Nothing can be exchanged any more."""


class Agreed(UserError):
    """Raised in all processes alike, which are still in step: each can save its part, and ends by itself."""


def index() -> int:
    """Of this process, from 0."""
    return jax.process_index()


def count() -> int:
    return jax.process_count()


def is_first() -> bool:
    """Whether this process is the one that writes files and says what happens."""
    return index() == 0


def say(text: str) -> None:
    """Prints ``text`` once, not in every process."""
    if is_first():
        print(text, flush=True)


def _client() -> Any:
    return distributed.global_state.client


# --- exchanges -------------------------------------------------------------------------------------------------------

_number = 0  # of exchanges begun; equal in all processes that are at the same place


def gather(name: str, work: Callable[[], Any], *, blame: bool = True) -> list[Any]:
    """What ``work`` returns in every process, in their order, everywhere. All must call it, in the same order.

    Args:
        name: of the place in the program; a process at another one is an error.
        work: returns what JSON can hold; NaN and infinite numbers may be among it.
        blame: whether an error's message names the process; where all say the same, it never does.

    Raises:
        Agreed: in all processes, when ``work`` raised a UserError in any of them.
        ProcessFailed: another process has failed elsewhere, or is gone.
    """
    if count() == 1:
        return [work()]  # whose errors are agreed on as they are
    global _number
    _number += 1
    mine: dict[str, Any] = {"name": name}
    try:
        mine["value"] = work()
    except ProcessFailed:
        raise
    except UserError as error:
        mine["error"] = str(error)
    client, place = _client(), f"{_SPACE}/gather/{_number}"
    client.key_value_set(f"{place}/{index()}", json.dumps(mine))
    replies = [json.loads(_wait(f"{place}/{process}")) for process in range(count())]
    if _number > 1:  # all have begun this one, so all have read the one before
        client.key_value_delete(f"{_SPACE}/gather/{_number - 1}/{index()}")
    names = {reply["name"] for reply in replies}
    if len(names) > 1:
        raise RuntimeError(f"processes are not in step: {[reply['name'] for reply in replies]}")
    errors = {process: reply["error"] for process, reply in enumerate(replies) if "error" in reply}
    if errors:
        texts = list(errors.values())
        same = len(texts) == count() and len(set(texts)) == 1
        named = [f"process {process}: {text}" if blame else text for process, text in errors.items()]
        raise Agreed(texts[0] if same else "\n".join(named))
    return [reply["value"] for reply in replies]


def _wait(key: str) -> str:
    """The value of ``key``, once it is there. Raises ProcessFailed."""
    while True:
        try:
            return _client().blocking_key_value_get(key, _SLICE_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise ProcessFailed(f"process 0, which all others depend on, cannot be reached ({error})") from error
        if _watch is not None and _watch.failure:
            raise ProcessFailed(_watch.failure)


def from_first(name: str, work: Callable[[], Any]) -> Any:
    """What ``work`` returns in process 0, where alone it is called; otherwise as ``gather``."""
    return gather(name, lambda: work() if is_first() else None, blame=False)[0]


# --- failures --------------------------------------------------------------------------------------------------------


class _Watch(threading.Thread):
    """Shows the others that this process lives, and learns when one of them fails or is gone.

    If that does not end this process in ``GRACE_S`` seconds, because it waits for an exchange that will never be, it
    is ended here; so it is when it has failed itself and does not come to its end.
    """

    def __init__(self) -> None:
        super().__init__(name="processes", daemon=True)
        self.failure = ""
        self.suspicious = self.leaving = False
        self._done = threading.Event()
        self._count = 0
        self._beats: dict[str, tuple[str, float]] = {}  # process -> last sign of life, and when it was first seen
        self._beat()  # so that it is missed, even if it ends at once

    def _beat(self) -> None:
        self._count += 1
        _client().key_value_set(f"{_SPACE}/alive/{index()}", str(self._count), allow_overwrite=True)

    def run(self) -> None:
        failed_at, grace = 0.0, GRACE_S * (2 if is_first() else 1)  # the others are cut off when process 0 ends
        while not self._done.wait(BEAT_S):
            try:
                self._beat()
                self.failure = self.failure or self._find_failure()
            except jax.errors.JaxRuntimeError as error:
                self.failure = self.failure or f"process 0, which all others depend on, cannot be reached ({error})"
            if self.failure or self.leaving:
                failed_at = failed_at or time.monotonic()
                if time.monotonic() - failed_at > grace:
                    _end_now("" if self.leaving else self.failure)

    def _find_failure(self) -> str:
        told = _read_all(f"{_SPACE}/failed")
        told.pop(str(index()), None)
        if told:
            return "\n".join(f"process {process}: {text}" for process, text in sorted(told.items()))
        if missed := _read_all(f"{_SPACE}/missed"):
            return min(missed.values())
        now, left = time.monotonic(), _read_all(f"{_SPACE}/left")
        for process, beat in _read_all(f"{_SPACE}/alive").items():
            if self._beats.get(process, ("", now))[0] != beat:
                self._beats[process] = beat, now
        silent = {process: now - seen for process, (_, seen) in self._beats.items() if process not in left}
        limit = SUSPECT_S if self.suspicious else LOST_S
        gone = [process for process, seconds in silent.items() if seconds > limit]
        if not gone:
            return ""
        text = f"process {', '.join(sorted(gone))} is gone: no sign of life for {limit:g} s"
        # At once to those that have no suspicion yet: they must learn it before the store ends with process 0.
        _client().key_value_set(f"{_SPACE}/missed/{index()}", text, allow_overwrite=True)
        return text

    def look_for(self, seconds: float) -> str:
        """The failure of another process, waiting for news of it."""
        self.suspicious = True
        end = time.monotonic() + seconds
        while not self.failure and time.monotonic() < end:
            time.sleep(0.1)
        return self.failure

    def stop(self) -> None:
        self._done.set()
        self.join()


_watch: _Watch | None = None
_told_others = False


def _read_all(folder: str) -> dict[str, str]:
    return {key.rpartition("/")[2]: value for key, value in _client().key_value_dir_get(folder + "/")}


def _end_now(message: str) -> None:
    if message:  # which has not been said
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    with contextlib.suppress(Exception):
        _client().key_value_set(f"{_SPACE}/left/{index()}", "", allow_overwrite=True)
    os._exit(1)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Runs its body in all processes, and ends all of them when one fails: with its message, and exit code 1.

    Raises:
        ProcessFailed: in those that did not fail themselves, unless they are ended where they are.
    """
    global _watch, _told_others
    if count() == 1:
        yield
        return
    _watch, _told_others = _Watch(), False
    watch = _watch
    watch.start()
    try:
        yield
        gather("end", lambda: None)
    except Agreed:
        watch.stop()
        raise
    except BaseException as error:
        try:
            publish(error)
        finally:
            _leave()
            watch.leaving = True
        raise
    watch.stop()


def publish(error: BaseException) -> None:
    """Tells the other processes that this one ends with ``error``; to be called before anything that may wait for them.

    Raises:
        ProcessFailed: it is another one that failed, and ``error`` comes from that.
    """
    global _told_others
    if _watch is None or _told_others or isinstance(error, Agreed | ProcessFailed):
        return
    # An exchange between devices fails here when the other side is gone. The blame must not be ours then.
    if isinstance(error, RuntimeError) and (failure := _watch.look_for(SUSPECT_S + 3 * BEAT_S)):
        raise ProcessFailed(failure) from error
    _told_others = True
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(f"{_SPACE}/failed/{index()}", text, allow_overwrite=True)


def _leave() -> None:
    """Lets the program end without waiting for the others at JAX's own barrier, which not all will come to."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(f"{_SPACE}/left/{index()}", "", allow_overwrite=True)
        end = time.monotonic() + GRACE_S + 5 * BEAT_S
        # Process 0 holds the store: the others are cut off when it ends, so it is the last.
        while is_first() and time.monotonic() < end and len(_read_all(f"{_SPACE}/left")) < count():
            time.sleep(0.2)

    def end_here() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    atexit.register(end_here)
