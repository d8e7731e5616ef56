"""OpenAI chat completions as values: messages, requests, and replies or typed failures. No network here."""

import base64
import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import numpy as np
from PIL import Image

from cocoedit_jax.reporting.pictures import to_uint8

# Status -> why a request with it can never succeed as it is. Nothing of these is tried again.
FATAL_STATUS = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    413: "too_large",
    422: "unprocessable",
}
RETRY_STATUS = (408, 409, 429)  # and every 5xx
MIN_JPEG_QUALITY = 95  # stronger compression hides the fine detail that a judge looks for
_SAID = 500  # letters of a server's own words that a message repeats


@dataclass(frozen=True)
class ChatRequest:
    """One chat completion.

    ``affinity``: requests with the same key go to the same endpoint while it is well, so that it can reuse what it
    computed for a shared prefix (the same source image). ``extra``: further fields of the body, as
    ``logprob_token_ids`` or ``response_format``. ``endpoint``: the only endpoint to ask; empty: any.
    """

    messages: Sequence[Mapping[str, Any]]
    max_tokens: int = 1
    temperature: float = 0.0
    logprobs: bool = False
    top_logprobs: int = 20
    affinity: str = ""
    request_id: str = ""
    endpoint: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def body(self, model: str) -> dict[str, Any]:
        """The JSON body for ``model``."""
        body: dict[str, Any] = {"model": model, "temperature": self.temperature}
        body["max_completion_tokens"] = self.max_tokens
        if self.logprobs:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return body | dict(self.extra) | {"messages": list(self.messages)}


@dataclass(frozen=True)
class Failure:
    """Why a request has no reply.

    ``reason``: one of ``FATAL_STATUS``'s values or ``refused_STATUS`` (fatal), ``deadline``, ``attempts`` (given up
    after the most attempts), ``cancelled``. ``cause``: what the last attempt of the latter three died of:
    ``connect``, ``timeout``, ``status_N``, ``garbled``, or empty. ``message`` is for people, and names the field that
    a server objected to where it says so.
    """

    reason: str
    message: str
    cause: str = ""
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its natural-log probability; ``raw`` are its UTF-8 bytes where the server gives them."""

    token: str
    logprob: float
    raw: bytes | None = None


@dataclass(frozen=True)
class ChatReply:
    """A completion, or the failure in its place. ``text`` and ``failure``: exactly one is None.

    ``logprobs``: for every generated token the candidates at its place; None where the server sent none.
    """

    request_id: str
    text: str | None = None
    logprobs: tuple[tuple[TokenLogprob, ...], ...] | None = None
    finish_reason: str | None = None
    failure: Failure | None = None
    endpoint: str = ""
    attempts: int = 0
    seconds: float = 0.0  # from handing the request in to the end, waiting included

    @property
    def ok(self) -> bool:
        return self.failure is None


class Garbled(ValueError):
    """A reply with status 200 that is no chat completion."""


def text_part(text: str) -> dict[str, Any]:
    """A text part of a user message."""
    return {"type": "text", "text": text}


def encode_image(image: np.ndarray | Image.Image, format: str = "png", quality: int = MIN_JPEG_QUALITY) -> bytes:
    """An image file of ``image``: ``[H, W, 3]``, uint8 or float in [0, 1], or a PIL image.

    Args:
        format: png (exact) or jpeg (without colour subsampling).
        quality: of a JPEG, 95 to 100.

    Raises:
        ValueError: another format, quality or shape, or a pixel that is not finite.
    """
    if format not in ("png", "jpeg"):
        raise ValueError(f"image format {format!r}, expected 'png' or 'jpeg'")
    if format == "jpeg" and not MIN_JPEG_QUALITY <= quality <= 100:
        raise ValueError(f"JPEG quality {quality!r}, expected {MIN_JPEG_QUALITY} to 100")
    if not isinstance(image, Image.Image):
        pixels = np.asarray(image)
        if pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise ValueError(f"image of shape {pixels.shape}, expected (height, width, 3)")
        if pixels.dtype != np.uint8 and not np.isfinite(pixels).all():
            raise ValueError("the image holds NaN or infinite values")
        image = Image.fromarray(to_uint8(pixels))
    buffer = io.BytesIO()
    if format == "png":
        image.save(buffer, "PNG", compress_level=1)  # lossless either way; the step waits for it
    else:
        image.convert("RGB").save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def image_part(
    image: np.ndarray | Image.Image | bytes, format: str = "png", quality: int = MIN_JPEG_QUALITY
) -> dict[str, Any]:
    """An image part of a user message, as a data URL. ``image`` as in ``encode_image``, or the bytes of a file of that
    format, which are sent as they are. Raises ValueError as ``encode_image``.
    """
    data = image if isinstance(image, bytes) else encode_image(image, format, quality)
    url = f"data:image/{format};base64,{base64.b64encode(data).decode('ascii')}"
    return {"type": "image_url", "image_url": {"url": url}}


def user_message(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """One user message of parts in this order."""
    return {"role": "user", "content": list(parts)}


def parse_completion(raw: bytes) -> dict[str, Any]:
    """``text``, ``logprobs`` and ``finish_reason`` of a chat completion with one choice.

    Raises:
        Garbled: the body is something else: cut off, no JSON, another number of choices, wrong types.
    """
    try:
        body = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Garbled(f"the reply is no JSON ({error}): {shown(raw)}") from error
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        found = f"{len(choices)} choices" if isinstance(choices, list) else "no choices"
        raise Garbled(f"the reply has {found}, expected 1: {shown(raw)}")
    message = choices[0].get("message")
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(message, dict) or not isinstance(text, str | None):
        raise Garbled(f"the reply has no message: {shown(raw)}")
    reason = choices[0].get("finish_reason")
    return {
        "text": text or "",
        "logprobs": _logprobs(choices[0].get("logprobs"), raw),
        "finish_reason": reason if isinstance(reason, str) else None,
    }


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _logprobs(node: Any, raw: bytes) -> tuple[tuple[TokenLogprob, ...], ...] | None:
    content = node.get("content") if isinstance(node, dict) else None
    if not content:  # null, absent or empty: the server did not do what it was asked
        return None
    try:
        return tuple(tuple(_candidate(c) for c in place.get("top_logprobs") or [place]) for place in content)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise Garbled(f"the logprobs of the reply are malformed ({error!r}): {shown(raw)}") from error


def _candidate(node: Mapping[str, Any]) -> TokenLogprob:
    token, logprob, raw = node["token"], node["logprob"], node.get("bytes")
    if not isinstance(token, str) or isinstance(logprob, bool) or not math.isfinite(logprob):
        raise ValueError(f"token {token!r}, logprob {logprob!r}")
    if raw is not None and not isinstance(raw, list):  # bytes(10**9) would be a gigabyte of zeros
        raise ValueError(f"token {token!r}, bytes {raw!r}")
    # Rounding may put a certain token a little above 0.
    if logprob > 1e-3:
        raise ValueError(f"token {token!r} has the logprob {logprob!r}")
    return TokenLogprob(token, min(float(logprob), 0.0), None if raw is None else bytes(raw))


def shown(raw: bytes | str, limit: int = _SAID) -> str:
    """The start of what a server sent, on one line, for a message or log."""
    text = raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw
    text = " ".join("".join(c if c.isprintable() else " " for c in text[: 2 * limit]).split())
    return text if len(text) <= limit else text[:limit] + "..."


def explain_status(status: int, raw: bytes) -> str:
    """What a refusing server says, with the field it objects to: OpenAI's, vLLM's and FastAPI's error bodies."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return f"status {status}, {shown(raw) or 'without a word'}"
    detail = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(detail, dict) and isinstance(detail.get("detail"), list | str):
        detail = detail["detail"]
    fields, words = [], []
    for entry in detail if isinstance(detail, list) else [detail]:
        if not isinstance(entry, dict):
            words.append(str(entry))
            continue
        place, path = entry.get("param"), entry.get("loc")
        if not isinstance(place, str):
            place = ".".join(str(part) for part in path if part != "body") if isinstance(path, list) else ""
        if place:
            fields.append(place)
        words.append(str(entry.get("message") or entry.get("msg") or entry))
    named = f"field {', '.join(map(repr, dict.fromkeys(fields)))}: " if fields else ""
    return f"status {status}, {named}{shown('; '.join(words))}"


def retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header asks for: a number, or a date."""
    if not value:
        return 0.0
    try:
        return max(0.0, min(float(value), 86400.0))
    except ValueError:
        pass
    try:
        return max(0.0, min(parsedate_to_datetime(value).timestamp() - time.time(), 86400.0))
    except (TypeError, ValueError, OverflowError):
        return 0.0
