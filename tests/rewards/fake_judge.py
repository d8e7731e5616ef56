"""A judge's server that fails on command, over real sockets; the standard library alone. Also a process of its own:

python -m tests.rewards.fake_judge PORT '["500", "hang"]'
"""

import hashlib
import json
import math
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cocoedit_jax.rewards.chat_protocol import image_part
from cocoedit_jax.rewards.judge_probe import canary_pairs

MODEL = "fake-vl"
TRANSIENT = (
    "500", "503", "408", "409", "429", "hang", "drip", "drop", "half", "garbage", "cut", "two_choices", "no_choices",
)  # fmt: skip
STATUS_BODY = {
    400: {"object": "error", "message": "too many images", "type": "BadRequestError", "param": "messages", "code": 400},
    401: {"error": {"message": "Incorrect API key provided: {key}", "type": "invalid_request_error", "param": None}},
    403: {"error": {"message": "no access to the model", "type": "permission", "param": "model", "code": None}},
    404: {"error": {"message": "The model `x` does not exist.", "type": "NotFoundError", "param": "model"}},
    413: "Request Entity Too Large",
    422: {"detail": [{"loc": ["body", "top_logprobs"], "msg": "Input should be at most 5", "type": "less_than_equal"}]},
}


def parts_of(body: dict[str, Any]) -> tuple[str, str, str]:
    """The data URLs of source and edited image, and the question."""
    content = body["messages"][0]["content"]
    return content[1]["image_url"]["url"], content[3]["image_url"]["url"], content[4]["text"]


def _canaries() -> dict[tuple[str, str], float]:
    url = lambda image: image_part(image)["image_url"]["url"]  # noqa: E731
    value = {"good": 0.9, "bad": 0.1, "swapped": 0.2}
    return {(url(before), url(after)): value[kind] for kind, (before, after, _) in canary_pairs()}


CANARIES = _canaries()


def true_score(body: dict[str, Any]) -> float:
    """What a faultless server scores: known for the canaries, else a hash of pictures and question."""
    source, edited, text = parts_of(body)
    known = CANARIES.get((source, edited))
    if known is not None:
        return known
    digest = hashlib.sha256("\0".join((source, edited, text)).encode()).digest()
    return int.from_bytes(digest[:4], "big") / (2**32 - 1)


def completion(score: float, mass: float = 0.97, **changes: Any) -> dict[str, Any]:
    """A reply as vLLM writes it, with 20 candidates of which the digits have ``mass`` and the expectation ``score``."""
    low = min(int(5 * score), 4)
    digits = {low: 1 - (5 * score - low), low + 1: 5 * score - low}
    p = {str(digit): mass * digits.get(digit, 0.0) for digit in range(6)}
    p |= {chr(ord("A") + n): (1 - mass) / 14 for n in range(14)}
    log = lambda x: math.log(x) if x > 0 else -9999.0  # noqa: E731
    entries = [{"token": t, "logprob": log(x), "bytes": list(t.encode())} for t, x in p.items()]
    entries.sort(key=lambda entry: -entry["logprob"])
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": entries[0]["token"]},
        "logprobs": {"content": [{**entries[0], "top_logprobs": entries}]},
        "finish_reason": "length",
    }
    return {"id": "chatcmpl-1", "object": "chat.completion", "model": MODEL, "choices": [choice | changes]}


class FakeJudge:
    """Serves until ``stop``. ``faults`` are taken from the front, one for each chat request; then come those of
    ``random_faults`` with probability ``share``; otherwise it answers.

    ``scorer``: from a request's body to the score in [0, 1].
    """

    def __init__(self, port: int = 0, scorer: Callable[[dict[str, Any]], float] = true_score):
        self.faults: list[str] = []
        self.always = ""  # a fault of every chat request
        self.share, self.rng = 0.0, random.Random(0)
        self.random_faults: Sequence[str] = TRANSIENT
        self.scorer, self.delay, self.retry_after = scorer, 0.0, "0.05"
        self.models = [MODEL]
        self.roots: dict[str, str] = {}  # as vLLM names what a model was loaded from
        self.reply: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda body: None  # in place of its own
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.under_way = self.most_under_way = 0
        self.lock, self.ending = threading.Lock(), threading.Event()
        self.server = _Server(("127.0.0.1", port), _Handler)
        self.server.judge = self
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def __enter__(self) -> "FakeJudge":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.ending.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def next_fault(self) -> str:
        with self.lock:
            if self.always:
                return self.always
            if self.faults:
                return self.faults.pop(0)
            return self.rng.choice(self.random_faults) if self.rng.random() < self.share else ""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    judge: FakeJudge

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that give up are expected


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, status: int, body: Any, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._head(status, len(data), **headers)
        self.wfile.write(data)

    def _head(self, status: int, length: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def do_GET(self) -> None:
        assert self.path == "/v1/models", self.path
        judge = self.server.judge
        entries = [{"id": name, "object": "model"} for name in judge.models]
        for entry in entries:
            entry |= {"root": judge.roots[entry["id"]]} if entry["id"] in judge.roots else {}
        self._send(200, {"object": "list", "data": entries})

    def do_POST(self) -> None:
        judge = self.server.judge
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with judge.lock:
            judge.bodies.append(body)
            judge.headers.append({name.lower(): value for name, value in self.headers.items()})
            judge.times.append(time.monotonic())
            judge.under_way += 1
            judge.most_under_way = max(judge.most_under_way, judge.under_way)
        try:
            self._answer(judge, body, judge.next_fault())
        finally:
            with judge.lock:
                judge.under_way -= 1

    def _answer(self, judge: FakeJudge, body: dict[str, Any], fault: str) -> None:
        judge.ending.wait(judge.delay)
        whole = judge.reply(body) or completion(judge.scorer(body))
        choice = whole["choices"][0]
        if fault.isdigit():
            said = STATUS_BODY.get(int(fault), {"error": {"message": "not now"}})
            key = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            headers = {"Retry_After": judge.retry_after, "Location": f"{judge.url}/elsewhere"}
            self._send(int(fault), json.loads(json.dumps(said).replace("{key}", key)), **headers)
        elif fault == "hang":
            judge.ending.wait(60)
            self.close_connection = True
        elif fault == "drip":
            data = json.dumps(whole).encode()
            self._head(200, len(data))
            for byte in data:
                if judge.ending.wait(0.03):
                    break
                self.wfile.write(bytes([byte]))
        elif fault == "drop":
            self.close_connection = True
        elif fault == "half":
            data = json.dumps(whole).encode()
            self._head(200, len(data))
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif fault == "garbage":
            self._send(200, b"<html>upstream is busy</html>")
        elif fault == "cut":
            self._send(200, json.dumps(whole).encode()[:-40])
        elif fault == "huge":
            self._send(200, b'{"choices": [' + b" " * 4_000_000)
        elif fault == "two_choices":
            self._send(200, whole | {"choices": [choice, choice]})
        elif fault == "no_choices":
            self._send(200, whole | {"choices": []})
        elif fault == "no_logprobs":
            self._send(200, whole | {"choices": [choice | {"logprobs": None}]})
        elif fault == "low_mass":
            self._send(200, completion(judge.scorer(body), mass=0.3))
        else:
            assert not fault, fault
            self._send(200, whole)


def main(argv: Sequence[str]) -> None:
    judge = FakeJudge(int(argv[0]))
    judge.faults = json.loads(argv[1]) if len(argv) > 1 else []
    judge.delay = float(argv[2]) if len(argv) > 2 else 0.0
    print("ready", flush=True)
    judge.thread.join()


if __name__ == "__main__":
    main(sys.argv[1:])
