"""A server with the fake model, in a thread: answers, refusals, token, metrics and health."""

import json
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai.types.chat import ChatCompletion

from cocoedit_jax.rewards.chat import ChatClient, ChatRequest, user_message
from tests.torch_bridge.judge_server.helpers import (
    BLUE,
    LIMITS,
    PATH,
    PURPLE,
    RED,
    as_url,
    chat,
    data_url,
    expectation,
    good,
    image_part,
    judge_request,
    metric,
    png_of_size,
    running,
    square,
    still_serves,
    text_part,
)
from torch_bridge.judge_server.app import AppSettings
from torch_bridge.judge_server.fake import FakeModel

GOOD: Any = good()


def test_scores_follow_the_pictures(client):
    scores = {}
    for name, pair in {"good": (BLUE, RED), "none": (BLUE, BLUE), "half": (BLUE, PURPLE), "back": (RED, BLUE)}.items():
        reply = client.post(PATH, json=judge_request(*map(square, pair)))
        scores[name], mass = expectation(reply.json())
        assert mass == pytest.approx(0.97, abs=1e-3)
        assert client.post(PATH, json=judge_request(*map(square, pair))).json()["choices"] == reply.json()["choices"]
    assert scores["good"] > 0.95 and max(scores["none"], scores["back"]) < 0.05
    assert scores["half"] == pytest.approx(0.5, abs=0.01)
    free, _ = expectation(client.post(PATH, json=judge_request(square(BLUE), square(RED), "change it")).json())
    assert free == pytest.approx(0.75, abs=0.01)  # a quarter of the pixels changed


def test_ids_are_answered_as_asked(client):
    body = GOOD | {"logprob_token_ids": [15, 20, 11]}
    place = client.post(PATH, json=body).json()["choices"][0]["logprobs"]["content"][0]
    assert [c["token"] for c in place["top_logprobs"]] == ["5", "0", ","]
    assert place["top_logprobs"][2]["logprob"] == -9999.0


def test_longer_answers(client):
    picture = image_part(data_url(square(RED, 80)))
    reply = client.post(PATH, json=chat(picture, text_part("Give the bounding box."), max_completion_tokens=200))
    choice = reply.json()["choices"][0]
    assert json.loads(choice["message"]["content"]) == [{"bbox_2d": [20, 20, 60, 60], "label": "object"}]
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    reply = client.post(PATH, json=chat(picture, text_part("say this"), max_completion_tokens=4, logprobs=True))
    choice = reply.json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("say ", "length")
    assert [place["token"] for place in choice["logprobs"]["content"]] == list("say ")
    assert reply.json()["usage"]["completion_tokens"] == 4


def test_models_and_request_id(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["root"]) == ("fake", "fake")
    assert client.post(PATH, json=GOOD, headers={"X-Request-Id": "run-3-1"}).headers["x-request-id"] == "run-3-1"
    assert "x-request-id" not in client.post(PATH, json=GOOD, headers={"X-Request-Id": "a\tb"}).headers
    assert client.get("/v1/other").status_code == 404 and client.get(PATH).status_code == 405


def test_the_projects_client_is_served(client):
    with ChatClient([str(client.base_url)], "fake", max_attempts=1) as chat_client:
        assert list(chat_client.models().values()) == [["fake"]]
        content = GOOD["messages"][0]["content"]
        replies = chat_client.complete_all([ChatRequest([user_message(*content)], logprobs=True)] * 3, 20)
        assert all(reply.ok and reply.logprobs is not None and len(reply.logprobs[0]) == 20 for reply in replies)
        (reply,) = chat_client.complete_all([ChatRequest([user_message(*content)], temperature=0.5)], 20)
        assert reply.failure is not None and reply.failure.fatal and "field 'temperature'" in reply.failure.message


def test_openais_own_client_is_served(client):
    """Its types are strict about nothing; the replies must be valid for them all the same."""
    url = f"{client.base_url}/v1"
    with (
        httpx.Client(trust_env=False) as direct,
        openai.OpenAI(base_url=url, api_key="unused", max_retries=0, http_client=direct) as other,
    ):
        listed = other.models.list().data[0]
        reply = other.chat.completions.create(**GOOD)
        ChatCompletion.model_validate(reply.model_dump(), strict=True)
        place = (reply.choices[0].logprobs.content or [])[0]
        assert listed.id == reply.model == "fake" and len(place.top_logprobs) == 20
        assert place.token == place.top_logprobs[0].token and place.bytes == list(place.token.encode())
        for change, param in [({"stream": True}, "stream"), ({"temperature": 0.5}, "temperature")]:
            with pytest.raises(openai.BadRequestError) as error:
                other.chat.completions.create(**(GOOD | change))
            assert error.value.param == param
        with pytest.raises(openai.NotFoundError):
            other.chat.completions.create(**(GOOD | {"model": "gpt"}))


HOSTILE = {
    "oversized body": (b'{"model": "' + b"x" * 300_000 + b'"}', 413, "at most 200000 bytes"),
    "oversized and chunked": (iter([b"x" * 50_000] * 6), 413, "at most 200000 bytes"),
    "not json": (b"\x89PNG", 400, "Invalid JSON"),
    "deep": (b"[" * 150_000, 400, "Invalid JSON"),
    "bomb": (chat(image_part(as_url(png_of_size(20_000, 20_000)))), 400, "px, expected at most|decompression bomb"),
    "truncated": (chat(image_part(data_url(square(RED))[:120])), 400, "not a PNG or JPEG|not base64"),
    "no picture": (chat(image_part(as_url(b"MZ" * 99))), 400, "not a PNG or JPEG file"),
    "address": (chat(image_part("http://169.254.169.254/")), 400, "expected data:image/png;base64"),
    "too many pictures": (chat(*[image_part(data_url(square(RED)))] * 5), 400, "5 pictures, expected at most 4"),
    "too long": (chat(text_part("x" * 501)), 400, "501 tokens with those of pictures, expected at most 500"),
    "other model": (chat(text_part("x"), model="other"), 404, "expected 'fake'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_are_refused(client, name):
    body, status, text = HOSTILE[name]
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    reply = client.post(PATH, content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert any(part in error["message"] for part in text.split("|")), error
    assert set(error) == {"message", "type", "param", "code"}
    assert still_serves(client)


def test_other_content_types_are_refused(client):
    reply = client.post(PATH, content=json.dumps(GOOD), headers={"Content-Type": "text/plain"})
    assert reply.status_code == 415 and reply.json()["error"]["param"] == "content-type"


def test_metrics_and_health(client):
    before = {name: metric(client, name) for name in ("judge_images_total", "judge_covered_mass_count")}
    assert still_serves(client)
    assert metric(client, "judge_images_total") == before["judge_images_total"] + 2
    assert metric(client, "judge_covered_mass_count") == before["judge_covered_mass_count"] + 1
    assert metric(client, "judge_requests_total") >= 1 and metric(client, "judge_queue_depth") == 0
    assert client.get("/health/live").json() == {"status": "live"}
    assert client.get("/health").json() == client.get("/health/ready").json() == {"status": "ready"}


def test_without_the_token_nothing_is_looked_at():
    with running(FakeModel(), AppSettings("fake", "right", LIMITS), token="right") as client:
        assert still_serves(client)
        for header in ("Bearer wrong", "Bearer", "right", "Basic right", "", "Bearer right2", "Bearer righ"):
            for reply in (
                client.post(PATH, content=b"x" * 150_000, headers={"Authorization": header}),
                client.get("/v1/models", headers={"Authorization": header}),
                client.get("/metrics", headers={"Authorization": header}),
                client.get("/nothing", headers={"Authorization": header}),
            ):
                assert reply.status_code == 401 and reply.json()["error"]["param"] == "authorization"
        for path in ("/health", "/health/ready", "/health/live"):
            assert client.get(path, headers={"Authorization": ""}).status_code == 200
        assert metric(client, "judge_requests_total") == 1  # the one with the token
