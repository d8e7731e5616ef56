"""A server with the fake model, in a thread: token, limits, batching, health, connections."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import openai
import pytest
from openai.types.chat import ChatCompletion

from cocoedit_jax.errors import UserError
from cocoedit_jax.rewards.chat import ChatClient, ChatRequest, user_message
from tests.torch_bridge.judge_server.helpers import (
    as_url,
    chat,
    data_url,
    expectation,
    image_part,
    judge_request,
    metric,
    png_of_size,
    running,
    square,
    text_part,
    wait_until,
)
from torch_bridge.judge_server.app import AppSettings
from torch_bridge.judge_server.batching import BatchLimits
from torch_bridge.judge_server.connections import ConnectionLimits
from torch_bridge.judge_server.fake import FakeModel
from torch_bridge.judge_server.protocol import Limits, parse_request, read_job
from torch_bridge.judge_server.serving import Address, JudgeServer, ServeOptions

PATH = "/v1/chat/completions"
RED, BLUE, PURPLE = (255, 0, 0), (0, 0, 255), (128, 0, 128)
GOOD = judge_request(square(BLUE), square(RED))
LIMITS = Limits(body_bytes=200_000, image_bytes=100_000, image_pixels=100_000, images=4, prompt_tokens=500)


@pytest.fixture(scope="module")
def client():
    with running(FakeModel(), AppSettings("fake", limits=LIMITS)) as client:
        yield client


def still_serves(client):
    reply = client.post(PATH, json=GOOD)
    assert reply.status_code == 200 and expectation(reply.json())[0] > 0.9
    return True


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
    direct = httpx.Client(trust_env=False)
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="unused", max_retries=0, http_client=direct) as other:
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


def post_many(client, count, body=GOOD):
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: client.post(PATH, json=body), range(count)))


def test_requests_at_one_time_are_computed_at_once():
    settings = AppSettings("fake", batches=BatchLimits(size=8, wait_seconds=0.05))
    with running(FakeModel(delay=0.2), settings) as client:
        start = time.monotonic()
        replies = post_many(client, 24)
        seconds = time.monotonic() - start
        assert all(reply.status_code == 200 for reply in replies)
        batches, requests = (metric(client, f"judge_batch_size_{name}") for name in ("count", "sum"))
        assert requests == 24 and batches <= 6 and seconds < 24 * 0.2 / 2


def test_a_full_queue_refuses_and_recovers():
    settings = AppSettings("fake", limits=LIMITS, batches=BatchLimits(size=1, queue=3))
    with running(FakeModel(delay=0.3), settings) as client:
        replies = post_many(client, 12)
        statuses = [reply.status_code for reply in replies]
        assert set(statuses) == {200, 429} and 3 <= statuses.count(200) <= 6
        refused = next(reply for reply in replies if reply.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1 and refused.json()["error"]["code"] == "queue_full"
        assert still_serves(client)


def test_what_takes_too_long_is_given_up():
    settings = AppSettings("fake", batches=BatchLimits(size=1), request_seconds=0.5, stuck_seconds=0.1)
    with running(FakeModel(delay=1.0), settings) as client:
        first = threading.Thread(target=lambda: client.post(PATH, json=GOOD))
        first.start()
        wait_until(lambda: client.get("/health/live").status_code == 503)  # stuck for more than 0.1 s
        reply = client.post(PATH, json=GOOD)
        assert reply.status_code == 503 and reply.json()["error"]["code"] == "timeout"
        first.join()
        wait_until(lambda: client.get("/health/live").status_code == 200)
        assert metric(client, "judge_batch_size_sum") <= 1  # what was given up was not computed


class Gated(FakeModel):
    """Computes nothing until told to go."""

    def __init__(self):
        super().__init__()
        self.go, self.started = threading.Event(), False

    def complete(self, prompts, samplings):
        self.started = True
        self.go.wait(20)
        return super().complete(prompts, samplings)


def test_what_waits_is_bounded_by_its_size():
    """Requests of few but large pictures would fill the memory before the queue has its number."""
    job = read_job(parse_request(json.dumps(GOOD).encode()), "fake", 256, LIMITS)
    model, tokens = Gated(), FakeModel().prepare(job.messages).tokens
    batches = BatchLimits(size=1, queue=50, queue_tokens=int(2.5 * tokens))
    with running(model, AppSettings("fake", limits=LIMITS, batches=batches)) as client, ThreadPoolExecutor(8) as pool:
        first = pool.submit(client.post, PATH, json=GOOD)
        wait_until(lambda: model.started)
        others = [pool.submit(client.post, PATH, json=GOOD) for _ in range(6)]
        wait_until(lambda: sum(other.done() for other in others) == 4)  # two wait
        model.go.set()
        found = sorted(other.result().status_code for other in (first, *others))
        assert found == [200] * 3 + [429] * 4
        refused = next(other.result() for other in others if other.result().status_code == 429)
        assert refused.json()["error"]["code"] == "queue_full" and int(refused.headers["retry-after"]) >= 1
        assert still_serves(client)


def test_a_client_that_leaves_frees_its_place():
    model = Gated()
    with running(model, AppSettings("fake", batches=BatchLimits(size=1, queue=2))) as client:
        for number in range(4):  # the first one is being computed, the others wait behind it
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{client.base_url}{PATH}", json=GOOD, timeout=0.3, trust_env=False)
            wait_until(lambda: metric(client, "judge_requests_total") == number + 1)  # noqa: B023
        model.go.set()
        assert client.post(PATH, json=GOOD).status_code == 200
        assert metric(client, "judge_batch_size_sum") == 2


class SlowLoading(FakeModel):
    def __init__(self, fault=None):
        super().__init__()
        self.go, self.fault = threading.Event(), fault

    def load(self):
        self.go.wait(20)
        if self.fault:
            raise self.fault


def test_alive_is_not_ready():
    model = SlowLoading()
    with running(model, AppSettings("fake"), wait=False) as client:
        assert client.get("/health/ready").status_code == client.get("/health").status_code == 503
        reply = client.post(PATH, json=GOOD)
        assert reply.status_code == 503 and reply.headers["retry-after"] and reply.json()["error"]["code"] == "loading"
        model.go.set()
        wait_until(lambda: client.get("/health/ready").status_code == 200)
        assert still_serves(client)


def test_a_model_that_cannot_be_loaded_ends_the_server():
    model = SlowLoading(UserError("model: no weights"))
    model.go.set()
    server = JudgeServer(model, AppSettings("fake"), ServeOptions(Address(port=0)), lambda text: None)
    with pytest.raises(UserError, match="no weights"):
        server.run()


class Failing(FakeModel):
    fault: Exception | None = RuntimeError("broken")

    def complete(self, prompts, samplings):
        if self.fault:
            raise self.fault
        return super().complete(prompts, samplings)


def test_a_failing_model_is_an_error_and_not_ready():
    model = Failing()
    with running(model, AppSettings("fake")) as client:
        for _ in range(3):
            reply = client.post(PATH, json=GOOD)
            assert reply.status_code == 500 and reply.json()["error"]["code"] == "model"
            assert "broken" not in reply.text  # it is in the log
        assert client.get("/health/ready").json() == {"status": "failing"}
        model.fault = MemoryError()
        assert client.post(PATH, json=GOOD).status_code == 503
        model.fault = None
        assert still_serves(client) and client.get("/health/ready").status_code == 200


def connect(client):
    connection = socket.create_connection((client.base_url.host, client.base_url.port), timeout=10)
    return connection


def closed(connection):
    try:
        return connection.recv(4096) == b""
    except ConnectionError:
        return True


def test_slow_senders_are_cut_off():
    limits = ConnectionLimits(head_seconds=0.4, keep_alive_seconds=1.0, cycle_seconds=3.0)
    settings = AppSettings("fake", body_seconds=0.5)
    with running(FakeModel(), settings, limits) as client:
        silent, dripping, body = connect(client), connect(client), connect(client)
        body.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        body.sendall(b"content-length: 1000\r\n\r\n{")
        start = time.monotonic()
        with pytest.raises(ConnectionError):
            for letter in b"GET /health/live HTTP/1.1\r\nx: " + b"y" * 100:
                dripping.sendall(bytes([letter]))
                time.sleep(0.05)
        assert time.monotonic() - start < 3
        assert closed(silent) and closed(dripping)
        assert b"408" in body.recv(4096).partition(b"\r\n")[0]
        assert metric(client, "judge_slow_connections_total") == 2
        # After a reply a connection may rest a while, then it goes.
        resting = connect(client)
        resting.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200" in resting.recv(4096)
        resting.sendall(b"GET /health/live HTTP/1.1\r\n")  # the next one never ends
        assert closed(resting)
        assert still_serves(client)
        for connection in (silent, dripping, body, resting):
            connection.close()


def test_connections_are_bounded():
    limits = ConnectionLimits(connections=100, head_seconds=60.0)
    with running(FakeModel(), AppSettings("fake"), limits) as client:
        assert still_serves(client)

        async def flood(count):
            opened, all_open = [], asyncio.Event()  # held connections stay until all are made, however long that takes

            async def one():
                reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
                opened.append(writer)
                if len(opened) == count:
                    all_open.set()
                try:
                    await all_open.wait()
                    return await asyncio.wait_for(reader.read(12), 3.0)
                except TimeoutError:
                    return b"held"
                except ConnectionError:
                    return b"reset"
                finally:
                    writer.close()
                    with contextlib.suppress(ConnectionError):
                        await writer.wait_closed()

            return await asyncio.gather(*(one() for _ in range(count)))

        found = asyncio.run(flood(500))
        assert found.count(b"held") <= 100
        refused = sum(answer in (b"HTTP/1.1 429", b"reset") for answer in found)
        assert refused >= 400 and refused + found.count(b"held") == 500
        wait_until(lambda: still_serves(client))
        assert metric(client, "judge_connections_refused_total") >= 400


def test_only_this_machine_without_a_token():
    for host in ("0.0.0.0", "::", "example.com", "10.0.0.1"):
        with pytest.raises(UserError, match="other machines could use the server"):
            Address(host).check("")
        Address(host).check("token")
    for host in ("127.0.0.1", "::1", "localhost", "127.3.2.1"):
        Address(host).check("")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="cannot listen there"):
            Address("127.0.0.1", taken.getsockname()[1]).bind()
