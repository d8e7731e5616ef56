"""A server with more to do than it can: batches, the bounded queue, clients that leave, a model that is not there or
fails. What happens when is told by gates, not by time.
"""

import json
import threading

import pytest

from cocoedit_jax.errors import UserError
from tests.torch_bridge.judge_server.helpers import (
    LIMITS,
    PATH,
    Stuck,
    gated,
    good,
    metric,
    running,
    still_serves,
    wait_until,
)
from torch_bridge.judge_server.app import AppSettings
from torch_bridge.judge_server.batching import BatchLimits
from torch_bridge.judge_server.fake import FakeModel
from torch_bridge.judge_server.protocol import parse_request, read_job
from torch_bridge.judge_server.serving import Address, JudgeServer, ServeOptions


def wait_for_depth(client, depth):
    wait_until(lambda: metric(client, "judge_queue_depth") == depth)


def assert_full(reply):
    assert reply.status_code == 429 and reply.json()["error"]["code"] == "queue_full", reply.text
    assert int(reply.headers["retry-after"]) >= 1


def fill(gate, admitted, refused):
    """The first of ``admitted`` is computed and the others fill the queue: ``refused`` has no place until they are
    done."""
    model, client, send = gate
    replies = [send(admitted[0])]
    assert model.started.wait(60)
    replies += [send(words) for words in admitted[1:]]
    wait_for_depth(client, len(admitted) - 1)
    for _ in range(3):
        assert_full(client.post(PATH, json=good(refused)))
    model.go.set()
    assert [reply.result().status_code for reply in replies] == [200] * len(admitted)
    assert still_serves(client)


def test_requests_at_one_time_are_computed_at_once():
    with gated(AppSettings("fake", batches=BatchLimits(size=8))) as (model, client, send):
        first = send("red, the first")
        assert model.started.wait(60)
        others = [send(f"red {number}") for number in range(23)]
        wait_for_depth(client, 23)
        model.go.set()
        assert {reply.result().status_code for reply in (first, *others)} == {200}
        assert [len(batch) for batch in model.batches] == [1, 8, 8, 7]
        assert len({words for batch in model.batches for words in batch}) == 24
        assert [metric(client, f"judge_batch_size_{name}") for name in ("count", "sum")] == [4, 24]


def test_a_full_queue_refuses_and_recovers():
    with gated(AppSettings("fake", batches=BatchLimits(size=1, queue=3))) as gate:
        fill(gate, ["red, the first", "red, the second", "red, the third"], "red, refused")
        model = gate[0]
        assert ["red, refused"] not in model.batches and len(model.batches) == 4


def test_what_waits_is_bounded_by_its_size():
    """Requests of few but large pictures would fill the memory before the queue has its number."""
    job = read_job(parse_request(json.dumps(good("red 0")).encode()), "fake", 256, LIMITS)
    tokens = FakeModel().prepare(job.messages).tokens
    batches = BatchLimits(size=1, queue=50, queue_tokens=int(2.5 * tokens))
    with gated(AppSettings("fake", limits=LIMITS, batches=batches)) as gate:
        fill(gate, ["red 0", "red 1", "red 2"], "red 3")


def test_what_takes_too_long_is_given_up():
    settings = AppSettings("fake", batches=BatchLimits(size=1), request_seconds=0.5, stuck_seconds=0.1)
    with gated(settings) as (model, client, send):
        first = send("red, the first")
        assert model.started.wait(60)
        wait_until(lambda: client.get("/health/live").status_code == 503)  # stuck for more than 0.1 s
        for reply in (first.result(60), client.post(PATH, json=good("red, the second"))):
            assert reply.status_code == 503 and reply.json()["error"]["code"] == "timeout"
        model.go.set()
        wait_until(lambda: client.get("/health/live").status_code == 200)
        wait_until(lambda: client.post(PATH, json=good("red, the last")).status_code == 200)
        # What was given up while it waited was not computed.
        assert model.batches[0] == ["red, the first"] and ["red, the second"] not in model.batches


def test_decoding_that_does_not_end_is_given_up_and_told():
    model = Stuck()
    settings = AppSettings("fake", request_seconds=0.5, stuck_seconds=0.1, decode_threads=2)
    with running(model, settings) as client:

        def stick(threads):
            """Whether so many threads are held; a request that no thread began in time holds none."""
            reply = client.post(PATH, json=good("red, stuck"))
            assert reply.status_code == 503 and reply.json()["error"]["code"] == "timeout", reply.text
            return metric(client, "judge_decoding_given_up") == threads

        def serves():
            return client.post(PATH, json=good()).status_code == 200

        try:
            wait_until(lambda: stick(1))
            wait_until(serves)  # in the thread that is left
            assert client.get("/health/ready").status_code == client.get("/health/live").status_code == 200
            wait_until(lambda: stick(2))
            assert client.get("/health/ready").json() == {"status": "decoding"}
            reply = client.post(PATH, json=good())
            assert reply.status_code == 503 and reply.json()["error"]["code"] == "decoding"
            wait_until(lambda: client.get("/health/live").status_code == 503)  # for more than 0.1 s
            assert set(client.get("/health/live").json()) == {"status", "decoding_seconds"}
        finally:
            model.go.set()
        wait_until(lambda: client.get("/health/ready").status_code == 200)
        wait_until(serves)
        assert client.get("/health/live").status_code == 200 and metric(client, "judge_decoding_given_up") == 0


def test_clients_that_leave_free_their_places(connect):
    """The one that is being computed too; and what nobody waits for does not reach the model."""

    def ask(client, words):
        body = json.dumps(good(words)).encode()
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        connection = connect(client)
        connection.sendall(head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        return connection

    def leave(client, connection):
        left = gone(client)
        connection.close()
        wait_until(lambda: gone(client) == left + 1)

    def gone(client):
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith('judge_requests_total{status="499"}'))

    with gated(AppSettings("fake", batches=BatchLimits(size=1, queue=2))) as (model, client, send):
        computed = ask(client, "red, computed")
        assert model.started.wait(60)
        for number in range(3):
            waiting = ask(client, f"red, left {number}")
            wait_for_depth(client, 1)
            assert_full(client.post(PATH, json=good("red, refused")))
            leave(client, waiting)
            wait_for_depth(client, 0)
        leave(client, computed)
        served = [send("red, served 0"), send("red, served 1")]  # both have a place
        wait_for_depth(client, 2)
        model.go.set()
        assert [reply.result().status_code for reply in served] == [200, 200]
        words = [words for (words,) in model.batches]
        assert words[0] == "red, computed" and sorted(words[1:]) == ["red, served 0", "red, served 1"]


class SlowLoading(FakeModel):
    def __init__(self, fault=None):
        super().__init__()
        self.go, self.fault = threading.Event(), fault

    def load(self):
        self.go.wait()
        if self.fault:
            raise self.fault


def test_alive_is_not_ready():
    model = SlowLoading()
    with running(model, AppSettings("fake"), wait=False) as client:
        try:
            assert client.get("/health/ready").status_code == client.get("/health").status_code == 503
            reply = client.post(PATH, json=good())
            assert reply.status_code == 503 and reply.headers["retry-after"]
            assert reply.json()["error"]["code"] == "loading"
        finally:
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
            reply = client.post(PATH, json=good())
            assert reply.status_code == 500 and reply.json()["error"]["code"] == "model"
            assert "broken" not in reply.text  # it is in the log
        assert client.get("/health/ready").json() == {"status": "failing"}
        model.fault = MemoryError()
        assert client.post(PATH, json=good()).status_code == 503
        model.fault = None
        assert still_serves(client) and client.get("/health/ready").status_code == 200
