"""OpenAI chat completions, the part of them that judging and annotating need: requests read, replies written.

Fields that would change the answer and are not served are refused by name; none is silently ignored.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from torch_bridge.judge_server.chat_model import Completion, Message, Sampling
from torch_bridge.judge_server.pictures import PictureError, decode_data_url

LEAST_LOGPROB = -9999.0  # JSON has no minus infinity; vLLM writes this too
_SHOWN_FAULTS = 5
_SAID = {
    "stream": "expected false; replies are not streamed",
    "n": "expected 1; there is one choice",
    "temperature": "expected 0; decoding is greedy",
}  # field -> what the words of the check do not say
_MAX_PUNCTUATION = 200_000  # quotes, commas and opening brackets; a request of the most text and parts has fewer


@dataclass(frozen=True)
class Limits:
    """What one request may cost; everything beyond is refused before it is decoded or computed."""

    body_bytes: int = 24 * 2**20
    image_bytes: int = 12 * 2**20
    image_pixels: int = 2**22
    images: int = 8
    text_chars: int = 2**15
    prompt_tokens: int = 2**14
    new_tokens: int = 512


class ApiError(Exception):
    """A refusal, in OpenAI's format. `param`: the field; `retry_after`: seconds after which to try again."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status in (401, 429):
            kind = {401: "authentication_error", 429: "rate_limit_error"}[self.status]
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)


class _ImageUrl(_Strict):
    url: str
    detail: Literal["auto", "high"] | None = None


class _TextPart(_Strict):
    type: Literal["text"]
    text: str


class _ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: _ImageUrl


def _part_kind(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, Mapping) else None
    return {"text": "<text>", "image_url": "<image>"}.get(kind) if isinstance(kind, str) else None


def _content_kind(value: Any) -> str | None:
    return {str: "<string>", list: "<parts>"}.get(type(value))


_PART = Annotated[
    Annotated[_TextPart, Tag("<text>")] | Annotated[_ImagePart, Tag("<image>")],
    Discriminator(
        _part_kind,
        custom_error_type="part",
        custom_error_message='expected an object of "type" "text" or "image_url"',
    ),
]
_CONTENT = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[_PART], Field(min_length=1, max_length=64), Tag("<parts>")],
    Discriminator(
        _content_kind, custom_error_type="content", custom_error_message="expected a string or a list of parts"
    ),
]


class _Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: _CONTENT


class _ResponseFormat(_Strict):
    type: Literal["text"]


class ChatRequest(_Strict):
    """The body of a request. What is only accepted at one value is there because clients send it."""

    model: str
    messages: Annotated[list[_Message], Field(min_length=1, max_length=64)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None  # the old name of the same
    temperature: Annotated[float, Field(ge=0, le=0)] | None = None  # decoding is greedy
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    logprob_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=128)] | None = None  # vLLM's
    return_tokens_as_token_ids: bool | None = None  # vLLM's
    n: Literal[1] | None = None
    stream: Literal[False] | None = None
    response_format: _ResponseFormat | None = None
    stop: Annotated[list[str], Field(max_length=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    # Without influence on greedy decoding.
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    user: str | None = None


def parse_request(body: bytes) -> ChatRequest:
    """Raises ApiError (400), naming every field that does not fit (the first few of many)."""
    # Megabytes of tiny values would become gigabytes of objects; pictures have no punctuation.
    if sum(body.count(sign) for sign in (b'"', b",", b"[", b"{")) > _MAX_PUNCTUATION:
        raise ApiError(400, "body: too many values", param="body")
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
    known = {"extra_forbidden": "this server does not know this field", "missing": "expected, but missing"}
    lines = [
        f"{_field(fault['loc'])}: {_SAID.get(_field(fault['loc']), known.get(fault['type'], fault['msg']))}"
        for fault in faults[:_SHOWN_FAULTS]
    ]
    if len(faults) > _SHOWN_FAULTS:
        lines.append(f"and {len(faults) - _SHOWN_FAULTS} more")
    raise ApiError(400, "; ".join(lines), param=_field(faults[0]["loc"]))


def _field(place: Sequence[str | int]) -> str:
    """`messages[0].content[2].text` for a place in the body."""
    out = ""
    for step in place:
        if isinstance(step, int):
            out += f"[{step}]"
        elif not step.startswith("<"):  # a tag of ours
            out += f".{step[:64]}" if out else step[:64]
    return out or "body"


@dataclass(frozen=True)
class ChatJob:
    """A request that is in order: what the model gets, and how the reply is to be written."""

    messages: tuple[Message, ...]
    sampling: Sampling
    tokens_as_ids: bool = False


def read_job(request: ChatRequest, model: str, vocabulary_size: int, limits: Limits) -> ChatJob:
    """Checks `request` against `limits` and decodes its pictures.

    Raises:
        ApiError: 404 for another model, else 400 naming all fields that do not fit.
    """
    if request.model != model:
        raise ApiError(
            404, f"model: {request.model[:100]!r} given, expected {model!r}", param="model", code="model_not_found"
        )
    faults: list[tuple[str, str]] = []
    for field in ("top_logprobs", "logprob_token_ids"):
        if getattr(request, field) is not None and not request.logprobs:
            faults.append((field, "needs logprobs=true"))
    out_of_range = [number for number in request.logprob_token_ids or () if number >= vocabulary_size]
    if out_of_range:
        faults.append(("logprob_token_ids", f"{out_of_range[0]} given, expected ids below {vocabulary_size}"))
    both = (request.max_completion_tokens, request.max_tokens)
    if None not in both and both[0] != both[1]:
        faults.append(("max_tokens", f"{both[1]} given beside max_completion_tokens {both[0]}"))
    wanted = next((number for number in both if number is not None), limits.new_tokens)
    if wanted > limits.new_tokens:
        field = "max_tokens" if both[0] is None else "max_completion_tokens"
        faults.append((field, f"{wanted} given, expected at most {limits.new_tokens}"))
    messages = _messages(request, limits, lambda field, fault: faults.append((field, fault)))
    if faults:
        text = "; ".join(f"{field}: {fault}" for field, fault in faults[:_SHOWN_FAULTS])
        raise ApiError(400, text, param=faults[0][0])
    ids = tuple(dict.fromkeys(request.logprob_token_ids or ()))
    sampling = Sampling(wanted, (request.top_logprobs or 0) if request.logprobs else None, ids)
    return ChatJob(messages, sampling, bool(request.return_tokens_as_token_ids))


def _messages(request: ChatRequest, limits: Limits, add: Callable[[str, str], None]) -> tuple[Message, ...]:
    """The messages with decoded pictures; `add` gets field and fault of what is refused."""
    parts_of = [m.content if isinstance(m.content, list) else [m.content] for m in request.messages]
    pictures = sum(isinstance(part, _ImagePart) for parts in parts_of for part in parts)
    letters = sum(len(_text(part)) for parts in parts_of for part in parts)
    if pictures > limits.images:
        add("messages", f"{pictures} pictures, expected at most {limits.images}")
    if letters > limits.text_chars:
        add("messages", f"{letters} characters of text, expected at most {limits.text_chars}")
    if request.messages[-1].role != "user":
        add("messages", f"the last is of {request.messages[-1].role!r}, expected 'user'")
    if pictures > limits.images or letters > limits.text_chars:
        return ()
    messages = []
    for number, (message, parts) in enumerate(zip(request.messages, parts_of, strict=True)):
        read: list[str | Image.Image] = []
        for place, part in enumerate(parts):
            if not isinstance(part, _ImagePart):
                read.append(_text(part))
                continue
            field = f"messages[{number}].content[{place}].image_url"
            if message.role != "user":
                add(field, f"a picture in a message of {message.role!r}, expected only those of 'user'")
                continue
            try:
                read.append(decode_data_url(part.image_url.url, limits.image_bytes, limits.image_pixels))
            except PictureError as error:
                add(f"{field}.url", str(error))
        messages.append(Message(message.role, tuple(read)))
    return tuple(messages)


def _text(part: str | _TextPart | _ImagePart) -> str:
    return part if isinstance(part, str) else part.text if isinstance(part, _TextPart) else ""


def write_reply(
    job: ChatJob, completion: Completion, prompt_tokens: int, model: str, token: Callable[[int], str]
) -> dict[str, Any]:
    """The body of a reply, in the shape of vLLM's."""
    logprobs = None
    if job.sampling.top_logprobs is not None:

        def entry(token_id: int, logprob: float) -> dict[str, Any]:
            text = token(token_id)
            shown = f"token_id:{token_id}" if job.tokens_as_ids else text
            return {"token": shown, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(text.encode("utf-8"))}

        places = [
            entry(choice.token_id, choice.logprob)
            | {"top_logprobs": [entry(token_id, logprob) for token_id, logprob in choice.candidates]}
            for choice in completion.choices
        ]
        logprobs = {"content": places, "refusal": None}
    generated = len(completion.choices)
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": completion.text, "refusal": None},
                "logprobs": logprobs,
                "finish_reason": completion.finish_reason,
            }
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": prompt_tokens + generated,
        },
    }


def list_models(model: str, root: str, created: int, max_tokens: int) -> dict[str, Any]:
    """The body of /v1/models; `root` and `max_model_len` as vLLM has them."""
    entry = {"id": model, "object": "model", "created": created, "owned_by": "cocoedit-jax"}
    return {"object": "list", "data": [entry | {"root": root or model, "max_model_len": max_tokens}]}


def with_limits(**changes: int | None) -> Limits:
    """`Limits` with those changed that are not None."""
    return dataclasses.replace(Limits(), **{name: value for name, value in changes.items() if value is not None})
