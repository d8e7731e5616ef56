"""A client of OpenAI chat completions for synchronous code: many requests at once, several servers, faults expected.

    client = ChatClient(["http://127.0.0.1:8000/v1"], model="Qwen/Qwen2.5-VL-7B-Instruct", concurrency=32)
    request = ChatRequest([user_message(image_part(pixels), text_part("What is this?"))], max_tokens=64)
    (reply,) = client.complete_all([request], deadline_s=120)
    print(reply.text if reply.ok else reply.failure)

A request ends as a reply or as a typed failure, never as an exception. What may pass is tried again until the deadline:
no connection, timeout, status 408, 409, 429 and 5xx, and garbled replies. What cannot pass (400, 401, 403, 404, 413,
422) is fatal at once. Proxies and other settings of the environment are not used.
"""

import asyncio
import itertools
import json
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import httpx2 as httpx

from cocoedit_jax.errors import UserError
from cocoedit_jax.rewards.api_key import Secret, read_key
from cocoedit_jax.rewards.chat_protocol import (
    FATAL_STATUS,
    RETRY_STATUS,
    ChatReply,
    ChatRequest,
    Failure,
    Garbled,
    TokenLogprob,
    encode_image,
    explain_status,
    image_part,
    parse_completion,
    retry_after,
    shown,
    text_part,
    user_message,
)
from cocoedit_jax.rewards.endpoints import Endpoint, EndpointPool

__all__ = [
    "ChatClient", "ChatReply", "ChatRequest", "Failure", "TokenLogprob", "encode_image", "image_part", "read_key",
    "text_part", "user_message",
]  # fmt: skip

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
_POLL = 0.25  # seconds between looks at endpoints that are left alone


class ChatClient:
    """Sends chat completions to the servers at ``endpoints`` and keeps trying. Thread-safe.

    Args:
        endpoints: base URLs as OpenAI's clients take them, ``http://host:8000/v1`` (``/v1`` may be left out).
        model: the name to ask for; may be set later (``client.model``).
        concurrency: most requests under way at once, over all endpoints.
        timeout_s: seconds for one attempt, from connecting to the last byte.
        connect_timeout_s: seconds for its connection alone.
        max_attempts: of one request; None: until the deadline.
        garbled_attempts: of one request that end in a garbled reply: with temperature 0 the next one is likely to be
            garbled too.
        backoff_s: (first, longest) upper bound of the random wait before the next attempt, which doubles each time.
        breaker: (bad attempts in a row, seconds) after which an endpoint is left alone, and for how long.
        key_env, key_file: where the API key is read from, now; it is kept out of logs, messages and ``repr``.
        max_reply_bytes: of one reply; a longer one counts as garbled.

    Raises:
        UserError: an argument that cannot be used.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        model: str = "",
        *,
        concurrency: int = 32,
        timeout_s: float = 60.0,
        connect_timeout_s: float = 5.0,
        max_attempts: int | None = None,
        garbled_attempts: int = 4,
        backoff_s: tuple[float, float] = (0.5, 20.0),
        breaker: tuple[int, float] = (8, 5.0),
        key_env: str = "",
        key_file: str = "",
        max_reply_bytes: int = 1 << 20,
    ):
        numbers = {"timeout_s": timeout_s, "connect_timeout_s": connect_timeout_s, "breaker[1]": breaker[1]}
        numbers |= {"backoff_s[0]": backoff_s[0], "backoff_s[1]": backoff_s[1]}
        whole = {"concurrency": concurrency, "garbled_attempts": garbled_attempts, "breaker[0]": breaker[0]}
        whole |= {"max_attempts": max_attempts or 1, "max_reply_bytes": max_reply_bytes}
        problems = [f"{n}={v!r}; expected a number above 0" for n, v in numbers.items() if not 0 < v < float("inf")]
        problems += [f"{n}={v!r}; expected a whole number above 0" for n, v in whole.items() if int(v) != v or v < 1]
        if problems:
            raise UserError("\n".join(problems))
        self.model = model
        self.counters: Counter[str] = Counter()  # requests, attempts, retry_CAUSE, breaker_opened
        self.roots: dict[str, set[str]] = {}  # name of a model -> what servers say it was loaded from; from `models`
        self._make_pool = lambda: EndpointPool(endpoints, *breaker)
        self._pool = self._make_pool()
        self._secret = Secret(read_key(key_env, key_file))
        self._concurrency, self._timeout, self._connect_timeout = concurrency, timeout_s, connect_timeout_s
        self._max_attempts, self._garbled_attempts = max_attempts, garbled_attempts
        self._backoff, self._max_reply_bytes = backoff_s, max_reply_bytes
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._thread: _LoopThread | None = None

    def __repr__(self) -> str:
        return f"ChatClient({self.endpoints}, model={self.model!r}, key={self._secret!r})"

    def __enter__(self) -> "ChatClient":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def endpoints(self) -> list[str]:
        return list(self._pool.endpoints)

    def complete_all(
        self,
        requests: Sequence[ChatRequest],
        deadline_s: float | None = None,
        *,
        on_reply: Callable[[ChatReply], object] = lambda reply: None,
        stop_on_fatal: bool = False,
    ) -> list[ChatReply]:
        """One reply or failure for every request, in the same order.

        Args:
            deadline_s: seconds from now after which whatever is missing fails with ``deadline``; None: no deadline, so
                give the client ``max_attempts``.
            on_reply: called with every result as it comes, in the client's own thread; it must be quick.
            stop_on_fatal: after a fatal failure the requests that are left fail with ``cancelled``.
        """
        if not requests:
            return []
        end = None if deadline_s is None else time.monotonic() + deadline_s
        return self._run(lambda loop: self._complete_all(loop, requests, end, on_reply, stop_on_fatal))

    def models(self, deadline_s: float = 30.0) -> dict[str, list[str] | Failure]:
        """For every endpoint the names of the models it serves (``/models``), or why it does not say."""
        end = time.monotonic() + deadline_s

        async def ask(loop: "_LoopThread") -> dict[str, list[str] | Failure]:
            found = await asyncio.gather(*(self._models(loop, url, end) for url in self.endpoints))
            return dict(zip(self.endpoints, found, strict=True))

        return self._run(ask)

    def close(self) -> None:
        """Ends the client's thread; what is under way fails with ``cancelled``. A later call starts it again."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.stop()

    # --- inside the event loop ----------------------------------------------------------------------------------------

    def _run(self, work: Callable[["_LoopThread"], Coroutine[Any, Any, _T]]) -> _T:
        with self._lock:
            if self._thread is None:
                self._pool = self._make_pool()
                self._thread = _LoopThread(self._concurrency, self._http_options())
            thread = self._thread
        return thread.run(lambda: work(thread))

    def _http_options(self) -> dict[str, Any]:
        # Compressed replies could expand beyond the limit before it is checked.
        headers = {"Accept-Encoding": "identity", "User-Agent": "cocoedit-jax"}
        if self._secret.value:
            headers["Authorization"] = f"Bearer {self._secret.value}"
        return {
            "headers": headers,
            "timeout": httpx.Timeout(self._timeout, connect=self._connect_timeout, pool=None),
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=self._concurrency),
            "trust_env": False,
            "follow_redirects": False,
        }

    async def _complete_all(
        self, loop: "_LoopThread", requests: Sequence[ChatRequest], end: float | None, on_reply: Any, stop: bool
    ) -> list[ChatReply]:
        async def one(request: ChatRequest) -> ChatReply:
            reply = await self._complete(loop, request, end)
            if stop and reply.failure is not None and reply.failure.fatal:
                for task in tasks:
                    if task is not asyncio.current_task():
                        task.cancel()
            on_reply(reply)
            return reply

        tasks = [asyncio.create_task(one(request)) for request in requests]
        loop.tasks.update(tasks)
        try:
            done = await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            loop.tasks.difference_update(tasks)
        replies: list[ChatReply] = []
        for request, reply in zip(requests, done, strict=True):
            if isinstance(reply, asyncio.CancelledError):  # before it had begun
                reply = ChatReply(request.request_id, failure=Failure("cancelled", "told to stop before it was sent"))
            if isinstance(reply, BaseException):
                raise reply
            replies.append(reply)
        return replies

    async def _complete(self, loop: "_LoopThread", request: ChatRequest, end: float | None) -> ChatReply:
        """Attempts until one gives a reply or a reason to stop; being cancelled is one."""
        start, state = time.monotonic(), _Progress()
        identity = request.request_id or f"cocoedit-{os.getpid()}-{next(self._numbers)}"
        self.counters["requests"] += 1
        outcome: dict[str, Any] | Failure
        try:
            async with asyncio.timeout_at(end):  # the loop's clock is time.monotonic
                outcome = await self._attempts(loop, request, identity, state)
        except TimeoutError:
            cause = state.cause or ("timeout" if state.attempts else "")
            message = f"no reply by the deadline, in {state.attempts} attempts; the last: {state.said}"
            outcome = Failure("deadline", message, cause)
        except asyncio.CancelledError:
            outcome = Failure("cancelled", f"told to stop; the last attempt: {state.said}", state.cause)
        seconds = time.monotonic() - start
        if isinstance(outcome, Failure):
            outcome = replace(outcome, message=self._secret.hide(outcome.message))
            return ChatReply(identity, failure=outcome, endpoint=state.url, attempts=state.attempts, seconds=seconds)
        return ChatReply(identity, **outcome, endpoint=state.url, attempts=state.attempts, seconds=seconds)

    async def _attempts(
        self, loop: "_LoopThread", request: ChatRequest, identity: str, state: "_Progress"
    ) -> dict[str, Any] | Failure:
        garbled = 0
        while True:
            async with loop.slots:
                # Holding the slot while every endpoint is left alone costs nothing: nobody else could use it.
                endpoint, wait = self._pool.choose(request.affinity, request.endpoint)
                while endpoint is None:
                    await asyncio.sleep(min(wait, _POLL) + 0.01)
                    endpoint, wait = self._pool.choose(request.affinity, request.endpoint)
                state.attempts += 1
                state.url = endpoint.url
                # Older vLLM refuses a name of which it still computes an attempt that timed out, with 400.
                name = identity if state.attempts == 1 else f"{identity}-try{state.attempts}"
                outcome = await self._attempt(loop, endpoint, name, request)
            if isinstance(outcome, dict) or outcome.fatal:
                return outcome
            state.cause, state.said = outcome.reason, outcome.message
            garbled += state.cause == "garbled"
            self.counters[f"retry_{state.cause}"] += 1
            _LOG.info("%s: %s", identity, self._secret.hide(state.said))
            if state.attempts == self._max_attempts or garbled >= self._garbled_attempts:
                message = f"given up after {state.attempts} attempts; the last: {state.said}"
                return Failure("attempts", message, state.cause)
            first, longest = self._backoff
            await asyncio.sleep(random.uniform(0, min(longest, first * 2 ** min(state.attempts - 1, 30))))

    async def _attempt(
        self, loop: "_LoopThread", endpoint: Endpoint, identity: str, request: ChatRequest
    ) -> dict[str, Any] | Failure:
        """The parsed completion, or the failure of this attempt, whose ``reason`` is then the cause."""
        self.counters["attempts"] += 1
        endpoint.begin()
        healthy: bool | None = None  # being cancelled says nothing of the server
        pause = 0.0
        try:
            content = json.dumps(request.body(self.model), allow_nan=False).encode()
            headers = {"X-Request-Id": identity, "Content-Type": "application/json"}
            url = f"{endpoint.url}/chat/completions"
            status, fields, raw = await self._send(loop, "POST", url, content=content, headers=headers)
            healthy = status < 500  # a full queue or a refusal is no sign of ill health
            if status == 200:
                return parse_completion(raw)
            explained = f"{endpoint.url}: {explain_status(status, self._secret.hide_bytes(raw))}"
            if status in RETRY_STATUS or status >= 500:
                pause = retry_after(fields.get("retry-after"))
                return Failure(f"status_{status}", explained)
            return Failure(FATAL_STATUS.get(status, f"refused_{status}"), explained, fatal=True)
        except Garbled as error:
            healthy = False
            return Failure("garbled", f"{endpoint.url}: {error}")
        except (TimeoutError, httpx.TimeoutException):
            healthy = False
            return Failure("timeout", f"{endpoint.url}: no whole reply within {self._timeout:g} s")
        except httpx.RequestError as error:
            healthy = False
            return Failure("connect", f"{endpoint.url}: {type(error).__name__} {error}".rstrip())
        finally:
            if endpoint.end(healthy, pause):
                self.counters["breaker_opened"] += 1
                _LOG.warning("%s: left alone for a while after repeated failures", endpoint.url)

    async def _send(
        self, loop: "_LoopThread", method: str, url: str, **options: Any
    ) -> tuple[int, httpx.Headers, bytes]:
        # The client's own timeouts start anew with every byte; this one catches a reply that drips.
        async with asyncio.timeout(self._timeout), loop.http.stream(method, url, **options) as response:
            raw = bytearray()
            async for chunk in response.aiter_raw():
                raw += chunk
                if len(raw) > self._max_reply_bytes:
                    raise Garbled(f"the reply is longer than {self._max_reply_bytes} bytes: {shown(bytes(raw[:200]))}")
            return response.status_code, response.headers, bytes(raw)

    async def _models(self, loop: "_LoopThread", url: str, end: float) -> list[str] | Failure:
        failure = Failure("deadline", f"{url}/models: no answer")
        try:
            async with asyncio.timeout_at(end):
                for attempt in itertools.count():
                    outcome = await self._ask_models(loop, f"{url}/models")
                    if not isinstance(outcome, Failure) or outcome.fatal:
                        return outcome
                    failure = replace(outcome, reason="deadline", cause=outcome.reason)
                    await asyncio.sleep(min(self._backoff[1], self._backoff[0] * 2 ** min(attempt, 30)))
        except TimeoutError:
            pass
        return failure

    async def _ask_models(self, loop: "_LoopThread", url: str) -> list[str] | Failure:
        try:
            status, _, raw = await self._send(loop, "GET", url)
            if status == 200:
                entries = json.loads(raw)["data"]
                for entry in entries:
                    self.roots.setdefault(str(entry["id"]), set()).add(str(entry.get("root") or entry["id"]))
                return [str(entry["id"]) for entry in entries]
            said = f"{url}: {explain_status(status, self._secret.hide_bytes(raw))}"
            if status in RETRY_STATUS or status >= 500:
                return Failure(f"status_{status}", said)
            return Failure(FATAL_STATUS.get(status, f"refused_{status}"), said, fatal=True)
        except (TimeoutError, httpx.TimeoutException):
            return Failure("timeout", f"{url}: no whole reply within {self._timeout:g} s")
        except httpx.RequestError as error:
            return Failure("connect", f"{url}: {type(error).__name__} {error}".rstrip())
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # Garbled is a ValueError
            return Failure("garbled", self._secret.hide(f"{url}: no list of models ({error!r})"), fatal=True)


@dataclass
class _Progress:
    """How far a request has come."""

    attempts: int = 0
    url: str = ""
    cause: str = ""
    said: str = "none was finished"


class _LoopThread:
    """An event loop in a thread of its own, with the HTTP client and the slots that live in it."""

    def __init__(self, concurrency: int, http_options: dict[str, Any]):
        self.tasks: set[asyncio.Task] = set()  # of requests; each ends with a reply even when it is cancelled
        self._loop = asyncio.new_event_loop()
        self.slots = asyncio.Semaphore(concurrency)
        self.http = httpx.AsyncClient(**http_options)
        self._thread = threading.Thread(target=self._loop.run_forever, name="chat-client", daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        future = asyncio.run_coroutine_threadsafe(work(), self._loop)
        try:
            return future.result()
        except BaseException:  # an interrupt in the calling thread
            future.cancel()
            raise

    def stop(self) -> None:
        async def finish() -> None:
            tasks = list(self.tasks)
            for task in tasks:
                task.cancel()
            # One that was cancelled before it started has no reply.
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.http.aclose()
            for _ in range(3):  # let those who wait for them take their replies, and sockets be closed
                await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(finish(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
