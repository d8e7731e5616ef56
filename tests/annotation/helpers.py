"""What several tests of annotation look at."""

import json

from cocoedit_jax.annotation import run
from cocoedit_jax.annotation.fake import FakeModel
from cocoedit_jax.annotation.gather import Outcome
from cocoedit_jax.rewards.chat import ChatRequest

FILES = ("metadata.jsonl", "rejected.jsonl", "dead.jsonl", "scores.jsonl")


def finish(*arguments, **options) -> Outcome:
    """`run.annotate` of a run that comes to its end."""
    outcome = run.annotate(*arguments, **options)
    assert outcome is not None
    return outcome


def lines(path):
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row.pop("seconds", None)
    return rows


def contents(folder):
    """All that a run gives, but for how long it took."""
    found = {name: lines(folder / name) for name in FILES}
    for part in ("images", "masks"):
        found |= {f"{part}/{p.name}": p.read_bytes() for p in sorted((folder / part).iterdir())}
    return found


def answer(line, model=None):
    """A reply line of vllm run-batch."""
    body = line["body"]
    request = ChatRequest(body["messages"], logprobs=body.get("logprobs", False), request_id=line["custom_id"])
    # The scores of the fake depend on the id, which has the settings' mark in a batch.
    request_id = line["custom_id"].rpartition("|")[0]
    (reply,) = (model or FakeModel()).complete_all(
        [ChatRequest(request.messages, logprobs=request.logprobs, request_id=request_id)]
    )
    choice = {"index": 0, "message": {"role": "assistant", "content": reply.text}, "finish_reason": "stop"}
    if reply.logprobs:
        top = [{"token": t.token, "logprob": t.logprob, "bytes": None} for t in reply.logprobs[0]]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
    response = {"status_code": 200, "request_id": "r", "body": {"object": "chat.completion", "choices": [choice]}}
    return {"id": "vllm-1", "custom_id": line["custom_id"], "response": response, "error": None}
