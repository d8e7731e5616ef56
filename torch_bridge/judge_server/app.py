"""The server's addresses: chat completions, models, health and metrics, behind a token and limits."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from torch_bridge.judge_server.batching import Batcher, BatchLimits, QueueFull
from torch_bridge.judge_server.chat_model import ChatModel, Completion, Prompt, PromptError
from torch_bridge.judge_server.decoding import Decoders, GivenUp
from torch_bridge.judge_server.metrics import Metrics
from torch_bridge.judge_server.protocol import (
    ApiError,
    ChatJob,
    Limits,
    list_models,
    parse_request,
    read_job,
    write_reply,
)

_LOG = logging.getLogger(__name__)
_OPEN_PATHS = ("/health", "/health/live", "/health/ready")  # a supervisor has no token
_DISCARD_SECONDS = 5.0
_CLIENT_GONE = 499  # for the metrics; nobody receives it


@dataclass(frozen=True)
class AppSettings:
    """`name`: the model's, as requests give it; `token`: what requests must bear, empty for none; `root`: what the
    model was loaded from, if that is not its name. Seconds: to receive a body; from then to the reply, decoding of
    pictures included; a batch, or decoding that nobody waits for in all `decode_threads`, may take before the server
    calls itself dead.
    """

    name: str
    token: str = ""
    limits: Limits = field(default_factory=Limits)
    batches: BatchLimits = field(default_factory=BatchLimits)
    body_seconds: float = 30.0
    request_seconds: float = 120.0
    stuck_seconds: float = 300.0
    root: str = ""
    decode_threads: int = field(default_factory=lambda: min(8, os.cpu_count() or 1))


class JudgeApp:
    """State of a server, and its ASGI application `asgi`.

    The model is loaded while the server is already alive but not ready; `on_load_error` is called if that fails.
    """

    def __init__(
        self,
        model: ChatModel,
        settings: AppSettings,
        metrics: Metrics | None = None,
        on_load_error: Callable[[BaseException], None] = lambda error: None,
        on_ready: Callable[[], None] = lambda: None,
    ):
        self.model, self.settings, self.metrics = model, settings, metrics or Metrics()
        self._on_load_error, self._on_ready = on_load_error, on_ready
        self._model_thread = ThreadPoolExecutor(1, "model")
        self.decoders = Decoders(settings.decode_threads)
        self.batcher = Batcher(model.complete, settings.batches, self._model_thread, self.metrics.observe_batch)
        self.metrics.queue_depth.set_function(lambda: self.batcher.depth)
        self.metrics.decoding_given_up.set_function(lambda: self.decoders.given_up)
        self.loaded = False
        self._created = int(time.time())
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/health", self._ready),  # where vLLM has it
            Route("/health/live", self._live),
            Route("/health/ready", self._ready),
            Route("/metrics", self._metrics),
        ]
        handlers = {ApiError: _on_api_error, HTTPException: _on_http_error, Exception: _on_error}
        handlers[ClientDisconnect] = _on_client_gone
        app = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=handlers)
        self.asgi: ASGIApp = _TokenGate(app, settings.token, settings.limits.body_bytes)

    @property
    def busy(self) -> bool:
        """A thread is loading, decoding or computing."""
        return not self.loaded or self.decoders.busy or self.batcher.computing

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        loading = asyncio.create_task(self._load())
        batching = asyncio.create_task(self.batcher.run())
        try:
            yield
        finally:
            for task in (loading, batching):
                task.cancel()
            await asyncio.gather(loading, batching, return_exceptions=True)
            self.decoders.shutdown()
            self._model_thread.shutdown(wait=False, cancel_futures=True)

    async def _load(self) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._model_thread, self.model.load)
        except Exception as error:
            self._on_load_error(error)
            return
        self.loaded = True
        self._on_ready()

    # --- what a supervisor asks ---------------------------------------------------------------------------------------

    async def _live(self, request: Request) -> Response:
        """Dead when a batch never ends, or decoding in all threads: only a new process helps then."""
        seconds = self.batcher.batch_seconds
        if seconds > self.settings.stuck_seconds:
            return JSONResponse({"status": "stuck", "batch_seconds": round(seconds)}, 503)
        seconds = self.decoders.stuck_seconds
        if seconds > self.settings.stuck_seconds:
            return JSONResponse({"status": "stuck", "decoding_seconds": round(seconds)}, 503)
        return JSONResponse({"status": "live"})

    async def _ready(self, request: Request) -> Response:
        if not self.loaded:
            return JSONResponse({"status": "loading"}, 503)
        if self.batcher.ill:
            return JSONResponse({"status": "failing"}, 503)
        if self.decoders.all_given_up:
            return JSONResponse({"status": "decoding"}, 503)
        return JSONResponse({"status": "ready"})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        longest = min(self.model.max_tokens, self.settings.limits.prompt_tokens + self.settings.limits.new_tokens)
        return JSONResponse(list_models(self.settings.name, self.settings.root, self._created, longest))

    # --- chat ---------------------------------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        start = time.monotonic()
        status = 500
        try:
            response = await self._answer(request)
            status = response.status_code
            return response
        except ApiError as error:
            status = error.status
            raise
        except (ClientDisconnect, asyncio.CancelledError):
            status = _CLIENT_GONE
            raise
        finally:
            self.metrics.requests.labels(str(status)).inc()
            self.metrics.request_seconds.observe(time.monotonic() - start)

    async def _answer(self, request: Request) -> Response:
        settings = self.settings
        body = _Body(request.receive, settings.limits.body_bytes)
        try:
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                # Also keeps web pages out: a browser sends this type to another site only if that site allows it.
                raise ApiError(415, "content-type: expected application/json", param="content-type")
            if not self.loaded:
                raise ApiError(503, "the model is still loading", code="loading", retry_after=2)
            if self.decoders.all_given_up:
                message = "all threads that decode pictures are held by requests that were given up"
                raise ApiError(503, message, code="decoding", retry_after=5)
            with self.batcher.place():
                raw = await body.read(request.headers.get("content-length", "0"), settings.body_seconds)
                deadline = time.monotonic() + settings.request_seconds
                job, prompt = await self._prepare(raw, deadline)
                completion = await self._complete(body, job, prompt, deadline)
        except QueueFull as error:
            await body.discard()
            raise ApiError(429, "the queue is full", code="queue_full", retry_after=error.retry_after) from error
        except ApiError as error:
            if error.status != 408:  # that client has had its time
                await body.discard()
            raise
        if job.sampling.max_tokens == 1:
            self.metrics.observe_mass(completion, self.model.digits)
        self.metrics.images.inc(sum(len(message.images) for message in job.messages))
        reply = write_reply(job, completion, prompt.tokens, settings.name, self.model.token)
        return JSONResponse(reply, headers=_request_id(request))

    async def _prepare(self, raw: bytes, deadline: float) -> tuple[ChatJob, Prompt]:
        """Reads and checks in a thread: decoding pictures would hold up all other connections."""
        limits = self.settings.limits

        def prepare(body: bytes) -> tuple[ChatJob, Prompt]:
            job = read_job(parse_request(body), self.settings.name, self.model.vocabulary_size, limits)
            try:
                prompt = self.model.prepare(job.messages)
            except PromptError as error:
                raise ApiError(400, f"messages: {error}", param="messages") from error
            longest = min(limits.prompt_tokens, self.model.max_tokens - job.sampling.max_tokens)
            if prompt.tokens > longest:
                message = f"messages: {prompt.tokens} tokens with those of pictures, expected at most {longest}"
                raise ApiError(400, message, param="messages", code="context_length_exceeded")
            return job, prompt

        try:
            return await self.decoders.run(prepare, raw, deadline)
        except GivenUp as error:
            seconds = self.settings.request_seconds
            raise ApiError(503, f"not decoded within {seconds:g} s", code="timeout", retry_after=5) from error

    async def _complete(self, body: _Body, job: ChatJob, prompt: Prompt, deadline: float) -> Completion:
        """The completion, unless the client goes away or the time is over: then it is not computed any more."""
        computing = asyncio.create_task(self.batcher.submit(prompt, job.sampling))
        leaving = asyncio.create_task(body.client_gone())
        try:
            await asyncio.wait(
                (computing, leaving),
                timeout=max(0.0, deadline - time.monotonic()),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if computing.done():
                try:
                    return computing.result()
                except QueueFull:
                    raise
                except MemoryError as error:
                    raise ApiError(503, "not enough memory for this request", code="memory", retry_after=5) from error
                except Exception as error:
                    raise ApiError(500, "the model failed; see the server's log", code="model") from error
            if leaving.done():
                raise ClientDisconnect
            seconds = self.settings.request_seconds
            raise ApiError(503, f"not computed within {seconds:g} s", code="timeout", retry_after=5)
        finally:
            for task in (computing, leaving):
                task.cancel()


class _Body:
    """The body of a request while it is being received, `most` bytes at most."""

    def __init__(self, receive: Receive, most: int):
        self._receive, self._most, self._whole = receive, most, False

    async def read(self, declared: str, seconds: float) -> bytes:
        """All of it. Raises ApiError: 413 if it is larger than allowed (nothing is kept), 408 if it comes too slowly.

        Args:
            declared: the content-length, "0" if the client does not give one.
        """
        too_large = ApiError(413, f"body: expected at most {self._most} bytes", param="body", code="too_large")
        if not declared.isdecimal() or len(declared) > 15 or int(declared) > self._most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(seconds):
                while not self._whole:
                    body += await self._chunk()
                    if len(body) > self._most:
                        raise too_large
        except TimeoutError as error:
            raise ApiError(408, f"body: not received within {seconds:g} s", param="body", code="timeout") from error
        return bytes(body)

    async def discard(self) -> None:
        """Receives and drops the rest of a refused body, within bounds: a client that is still sending would otherwise
        see a broken connection in the place of the refusal.
        """
        received = 0
        with contextlib.suppress(TimeoutError, ClientDisconnect):
            async with asyncio.timeout(_DISCARD_SECONDS):
                while not self._whole and received <= 2 * self._most:
                    received += len(await self._chunk())

    async def client_gone(self) -> None:
        """Returns when the client has closed the connection."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _chunk(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        self._whole = not message.get("more_body", False)
        return message.get("body", b"")


def _request_id(request: Request) -> dict[str, str]:
    """The client's own name for the request, back to it."""
    name = request.headers.get("x-request-id", "")[:128]
    return {"x-request-id": name} if name.isascii() and name.isprintable() and name else {}


def _error_response(error: ApiError, request: Request) -> Response:
    headers = _request_id(request) | {"connection": "close"}  # the body may not have been received
    if error.retry_after:
        headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.body, error.status, headers)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(error, request)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: no such address (404), another method (405)."""
    assert isinstance(error, HTTPException)
    return _error_response(ApiError(error.status_code, f"{request.url.path[:100]}: {error.detail}"), request)


async def _on_error(request: Request, error: Exception) -> Response:
    return _error_response(ApiError(500, "the server failed; see its log", code="server"), request)


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_GONE)


class _TokenGate:
    """Lets requests through that bear the token, before anything else of them is looked at."""

    def __init__(self, app: ASGIApp, token: str, body_bytes: int):
        self._app, self._token, self._body_bytes = app, token.encode(), body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._token or scope["path"] in _OPEN_PATHS:
            return await self._app(scope, receive, send)
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, given = header.partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._token):
            return await self._app(scope, receive, send)
        await _Body(receive, self._body_bytes).discard()
        error = ApiError(401, "authorization: expected 'Bearer TOKEN' with the server's token", param="authorization")
        await _error_response(error, Request(scope))(scope, receive, send)
