"""The client against a real server that fails: what is tried again, what is not, in what time, at which server."""

import io
import logging
import socket
import threading
import time
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from cocoedit_jax.errors import UserError
from cocoedit_jax.rewards.api_key import Secret
from cocoedit_jax.rewards.chat import (
    ChatClient,
    ChatReply,
    ChatRequest,
    Failure,
    encode_image,
    image_part,
    text_part,
    user_message,
)
from cocoedit_jax.rewards.chat_protocol import explain_status
from tests.rewards.fake_judge import MODEL, STATUS_BODY, TRANSIENT, FakeJudge


@pytest.fixture
def server():
    with FakeJudge(scorer=lambda body: 0.4) as judge:
        yield judge


def client(*urls: str, **options) -> ChatClient:
    fast = {"timeout_s": 0.4, "connect_timeout_s": 0.4, "backoff_s": (0.01, 0.02), "breaker": (3, 0.1)}
    return ChatClient(urls, MODEL, **(fast | options))


def ask(words: str = "hello", **fields) -> ChatRequest:
    return ChatRequest([user_message(text_part(words))], logprobs=True, **fields)


def failure(reply: ChatReply) -> Failure:
    assert reply.failure is not None and reply.text is None
    return reply.failure


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("fault", [*TRANSIENT, "huge"])
def test_what_may_pass_is_tried_again(server, fault):
    server.faults = [fault]
    with client(server.url) as c:
        (reply,) = c.complete_all([ask()], 5)
        assert reply.ok and reply.text == "2" and reply.attempts == 2 and reply.endpoint == server.url
        cause = {"hang": "timeout", "drip": "timeout", "drop": "connect", "half": "connect"}.get(fault, "garbled")
        assert c.counters[f"retry_status_{fault}" if fault.isdigit() else f"retry_{cause}"] == 1
    assert len(server.bodies) == 2 and server.bodies[0] == server.bodies[1]


@pytest.mark.parametrize(
    ("status", "reason", "said"),
    [
        (400, "bad_request", "field 'messages': too many images"),
        (401, "unauthorized", "Incorrect API key"),
        (403, "forbidden", "field 'model': no access"),
        (404, "not_found", "field 'model'"),
        (413, "too_large", "Too Large"),
        (422, "unprocessable", "field 'top_logprobs': Input should be at most 5"),
        (301, "refused_301", "status 301"),
        (405, "refused_405", "status 405"),
    ],
)
def test_a_refusal_is_fatal_at_once_and_names_the_field(server, status, reason, said):
    server.faults = [str(status)]
    with client(server.url) as c:
        (reply,) = c.complete_all([ask()], 5)
    found = failure(reply)
    assert found.fatal and found.reason == reason and said in found.message and len(server.bodies) == 1


def test_a_fatal_failure_can_stop_the_rest(server):
    server.always, server.delay = "401", 0.05
    with client(server.url, concurrency=2) as c:
        replies = c.complete_all([ask() for _ in range(40)], 5, stop_on_fatal=True)
    reasons = {failure(reply).reason for reply in replies}
    assert reasons == {"unauthorized", "cancelled"} and len(server.bodies) <= 4


def test_the_deadline_holds_and_names_the_cause(server):
    server.always = "hang"
    start = time.monotonic()
    with client(server.url) as c:
        replies = c.complete_all([ask() for _ in range(3)], 1.0)
    assert 0.9 < time.monotonic() - start < 20  # the server would hang for a minute
    assert {(failure(r).reason, failure(r).cause, failure(r).fatal) for r in replies} == {
        ("deadline", "timeout", False)
    }


def test_garbled_replies_and_attempts_are_bounded(server):
    server.always = "garbage"
    with client(server.url, garbled_attempts=3) as c:
        (reply,) = c.complete_all([ask()], 5)
    assert failure(reply).reason == "attempts" and failure(reply).cause == "garbled" and reply.attempts == 3
    assert "upstream is busy" in failure(reply).message
    server.always = "503"
    with client(server.url, max_attempts=2) as c:
        (reply,) = c.complete_all([ask()])
    assert failure(reply).reason == "attempts" and failure(reply).cause == "status_503" and reply.attempts == 2


@pytest.mark.parametrize("status", ["429", "503"])
def test_retry_after_is_honoured(server, status):
    server.faults, server.retry_after = [status], "1"
    with client(server.url) as c:
        (reply,) = c.complete_all([ask()], 30)
    assert reply.ok and server.times[1] - server.times[0] >= 1.0


def test_a_dead_server_is_left_alone_and_the_other_does_the_work(server):
    dead = f"http://127.0.0.1:{free_port()}"
    with client(dead, server.url, concurrency=4, breaker=(3, 30.0)) as c:
        server.delay = 0.01
        replies = c.complete_all([ask(affinity=f"g{n // 4}") for n in range(40)], 10)
        assert all(reply.ok and reply.endpoint == server.url for reply in replies)
        assert c.counters["breaker_opened"] == 1
        assert 3 <= c.counters["retry_connect"] <= 6  # those under way when it tripped count too


def test_a_server_that_returns_is_used_again():
    port = free_port()
    with FakeJudge() as steady, client(f"http://127.0.0.1:{port}", steady.url, breaker=(2, 0.2), concurrency=2) as c:
        steady.scorer, steady.delay = (lambda body: 0.4), 0.02
        c.complete_all([ask() for _ in range(8)], 5)
        with FakeJudge(port, scorer=lambda body: 0.4) as back:
            time.sleep(0.25)
            assert all(reply.ok for reply in c.complete_all([ask() for _ in range(20)], 5))
            assert len(back.bodies) > 3


def test_every_attempt_has_a_name_of_its_own(server):
    """Older vLLM refuses the name of a request that it still computes, with 400, which would end the run."""
    server.faults = ["hang", "500"]
    with client(server.url) as c:
        (reply,) = c.complete_all([ask(request_id="r-1")], 5)
    assert reply.ok and reply.request_id == "r-1" and reply.attempts == 3
    names = [headers["x-request-id"] for headers in server.headers]
    assert names[0] == "r-1" and len(set(names)) == 3 and all(name.startswith("r-1") for name in names)


def test_groups_stay_on_one_server_and_servers_share_the_groups():
    with FakeJudge(scorer=lambda b: 0.4) as one, FakeJudge(scorer=lambda b: 0.4) as two:
        one.delay = two.delay = 0.02
        with client(one.url, two.url, concurrency=6) as c:
            requests = [ask(affinity=f"g{n // 6}") for n in range(48)]
            replies = c.complete_all(requests, 10) + c.complete_all(requests, 10)
        homes = defaultdict(set)
        for request, reply in zip(requests * 2, replies, strict=True):
            homes[request.affinity].add(reply.endpoint)
        assert all(len(urls) == 1 for urls in homes.values())
        counts = [sum(urls == {url} for urls in homes.values()) for url in (one.url, two.url)]
        assert min(counts) >= 2, counts


def test_a_group_moves_when_its_server_dies():
    with FakeJudge(scorer=lambda b: 0.4) as one, FakeJudge(scorer=lambda b: 0.4) as two:
        with client(one.url, two.url) as c:
            (first,) = c.complete_all([ask(affinity="g")], 5)
            home, other = (one, two) if first.endpoint == one.url else (two, one)
            home.always = "500"
            replies = c.complete_all([ask(affinity="g") for _ in range(10)], 5)
        assert all(reply.ok and reply.endpoint == other.url for reply in replies)


def test_no_more_requests_at_once_than_allowed(server):
    server.delay = 0.03
    with client(server.url, concurrency=5) as c:
        assert all(reply.ok for reply in c.complete_all([ask() for _ in range(30)], 10))
    assert server.most_under_way == 5


def test_calls_from_several_threads_at_once(server):
    server.scorer = lambda body: int(body["messages"][0]["content"][0]["text"]) / 5
    found = {}
    with client(server.url) as c:

        def work(n: int) -> None:
            found[n] = [r.text for r in c.complete_all([ask(str((n + k) % 5)) for k in range(8)], 10)]

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {n: [str((n + k) % 5) for k in range(8)] for n in range(4)}


def test_the_key_is_sent_and_never_shown(server, monkeypatch, tmp_path, caplog):
    key = "sk-very-secret-123"
    monkeypatch.setenv("JUDGE_KEY", key)
    server.faults = ["500", "401"]
    with caplog.at_level(logging.DEBUG), client(server.url, key_env="JUDGE_KEY") as c:
        (reply,) = c.complete_all([ask(request_id="run-1-2")], 5)
        shown = f"{c!r} {vars(c)} {reply} {reply.failure}"
    assert "Incorrect API key provided: <key>" in failure(reply).message
    assert key not in shown and key not in caplog.text
    assert server.headers[0]["authorization"] == f"Bearer {key}" and server.headers[0]["x-request-id"] == "run-1-2"
    (tmp_path / "key").write_text(key + "\n")
    with client(server.url, key_file=str(tmp_path / "key")) as c:
        c.complete_all([ask()], 5)
    assert server.headers[-1]["authorization"] == f"Bearer {key}"


def test_no_part_of_the_key_is_left_where_words_are_cut(monkeypatch):
    key = "sk-0123456789abcdef"
    monkeypatch.setenv("JUDGE_KEY", key)
    for length in range(470, 510):
        raw = b"x" * length + key.encode()
        secret = Secret(key)
        said = secret.hide(explain_status(401, secret.hide_bytes(raw)))
        assert not any(key[:n] in said for n in range(5, len(key)))
    with FakeJudge(scorer=lambda body: 0.4) as server:
        server.faults, said = ["401"], {"error": {"message": "y" * 494 + " {key}"}}
        monkeypatch.setitem(STATUS_BODY, 401, said)
        with client(server.url, key_env="JUDGE_KEY") as c:
            (reply,) = c.complete_all([ask()], 5)
        assert failure(reply).message.endswith("yyy <key>")
        server.reply = lambda body: {"choices": [{"said": key}]}
        with client(server.url, key_env="JUDGE_KEY") as c:
            (reply,) = c.complete_all([ask()], 5)
        assert failure(reply).cause == "garbled" and "<key>" in failure(reply).message and key not in repr(reply)
    with pytest.raises(UserError, match="expected the name of an environment variable") as error:
        ChatClient(["http://127.0.0.1:1"], key_env=key)  # the key where its variable should be
    assert key not in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY is empty or not set"),
        ({"key_file": "no/such/file"}, "no/such/file cannot be read"),
        ({"key_env": "A", "key_file": "b"}, "at most one"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"timeout_s": float("nan")}, "timeout_s=nan"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        ChatClient(["http://127.0.0.1:1"], **options)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://user:pw@host", "http://h:99999"])
def test_bad_urls_are_refused(url):
    with pytest.raises(UserError, match="endpoints") as error:
        ChatClient([url])
    assert "pw" not in str(error.value)
    with pytest.raises(UserError, match="each of them once"):
        ChatClient(["http://h:1", "http://h:1/v1/"])


def test_proxies_of_the_environment_are_not_used(server, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with client(server.url) as c:
        assert c.complete_all([ask()], 2)[0].ok and c.models(2) == {server.url: [MODEL]}


def test_close_gives_up_what_is_under_way_and_the_client_can_go_on(server):
    before = set(threading.enumerate())
    server.always = "hang"
    c, found = client(server.url, timeout_s=20.0), []
    thread = threading.Thread(target=lambda: found.extend(c.complete_all([ask(), ask()], 20)))
    thread.start()
    while len(server.bodies) < 2:
        time.sleep(0.01)
    start = time.monotonic()
    c.close()
    thread.join(2)
    assert time.monotonic() - start < 1 and [failure(reply).reason for reply in found] == ["cancelled"] * 2
    server.always = ""
    assert c.complete_all([ask()], 5)[0].ok
    c.close()
    assert not [t for t in threading.enumerate() if t.name == "chat-client" and t not in before]


def test_models_that_cannot_be_had(server):
    with client(server.url.removesuffix("/v1") + "/other", f"http://127.0.0.1:{free_port()}") as c:
        gone, dead = c.models(0.5).values()
    assert isinstance(dead, Failure) and isinstance(gone, Failure)
    assert dead.reason == "deadline" and dead.cause == "connect" and not dead.fatal
    assert gone.reason == "deadline"  # the server drops the connection


def test_images_are_sent_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    part = image_part(pixels)
    assert part["image_url"]["url"].startswith("data:image/png;base64,")
    assert (np.asarray(Image.open(io.BytesIO(encode_image(pixels / 255)))) == pixels).all()
    jpeg = Image.open(io.BytesIO(encode_image(pixels, "jpeg", 95)))
    assert jpeg.format == "JPEG" and JpegImagePlugin.get_sampling(jpeg) == 0  # no colour subsampling
    for image, options, said in [
        (pixels, ("jpeg", 94), "quality 94"),
        (pixels, ("webp",), "webp"),
        (pixels[..., :2], (), "shape"),
        (np.full((4, 4, 3), np.nan), (), "NaN"),
    ]:
        with pytest.raises(ValueError, match=said):
            image_part(image, *options)


def test_error_bodies_of_unknown_shape_are_shown_in_short():
    assert explain_status(400, b"") == "status 400, without a word"
    assert explain_status(400, b"[1, null]") == "status 400, 1; None"
    assert len(explain_status(400, b"x\n" * 10_000)) < 600 and "\n" not in explain_status(400, b"x\n" * 10_000)
