"""The commands as processes: the fake judge without PyTorch, drained, killed and started again, and measured."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.rewards.chat import ChatClient
from cocoedit_jax.rewards.judge import JudgeRequest
from cocoedit_jax.rewards.judge_bench import find_model
from cocoedit_jax.rewards.vlm_judge import VlmJudge
from tests.rewards.fake_judge import FakeJudge
from tests.torch_bridge.judge_server.helpers import ROOT, FakeProcess, expectation, judge_request, square, wait_until

GOOD = judge_request(square((0, 0, 255)), square((255, 0, 0)))


def post(url, body=GOOD, **options):
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False, **options)


def command(name, *flags):
    return subprocess.run(
        [sys.executable, "-m", f"launch.{name}", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def wait_for_depth(url, depth):
    wait_until(lambda: f"judge_queue_depth {depth:.1f}" in httpx.get(f"{url}/metrics", trust_env=False).text)


def refuses(port):
    """Nobody listens there any more."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
    except ConnectionError:
        return True
    return False


def test_told_to_end_it_finishes_what_it_has(tmp_path):
    with FakeProcess(tmp_path, "--fake_delay=1", "--max_batch=1") as server, ThreadPoolExecutor() as pool:
        replies = [pool.submit(post, server.url) for _ in range(2)]
        wait_for_depth(server.url, 1)  # one is being computed, one waits
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(server.port))
        assert [reply.result().status_code for reply in replies] == [200] * 2
        out, err = server.process.communicate(timeout=60)
        assert server.process.returncode == 0 and out == "stopped\n" and err == ""


def test_a_drain_that_takes_too_long_is_ended(tmp_path):
    with (
        ThreadPoolExecutor() as pool,
        FakeProcess(tmp_path, "--fake_delay=60", "--drain_seconds=1", "--max_batch=1") as server,
    ):
        replies = [pool.submit(_status, server.url) for _ in range(2)]
        wait_for_depth(server.url, 1)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(40) == 1
        assert all(reply.result() in (500, None) for reply in replies)  # a client tries again


_STUCK = """
from tests.torch_bridge.judge_server.helpers import Stuck
from torch_bridge.judge_server.app import AppSettings
from torch_bridge.judge_server.serving import Address, ServeOptions, serve
serve(Stuck(), AppSettings("fake", request_seconds=0.5, decode_threads=1), ServeOptions(Address(port=0)))
"""


def test_a_thread_that_does_not_end_is_not_waited_for(tmp_path):
    body = judge_request(square((0, 0, 255)), square((255, 0, 0)), "red, stuck")
    with FakeProcess(tmp_path, program=("-c", _STUCK)) as server:

        def stuck():
            assert post(server.url, body).status_code == 503
            return httpx.get(f"{server.url}/health/ready", trust_env=False).status_code == 503

        wait_until(stuck)
        server.process.send_signal(signal.SIGTERM)
        out, err = server.process.communicate(timeout=40)  # its drain may take 60 s
        assert (server.process.returncode, out, err) == (1, "stopped\n", "")


def test_ten_thousand_connections(tmp_path):
    count = 10_000
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < count + 200:
        pytest.skip(f"needs more than {count} open files")
    with FakeProcess(tmp_path, "--max_connections=200", "--head_seconds=1") as server:
        sockets = []
        try:
            for _ in range(count):
                sockets.append(socket.create_connection(("127.0.0.1", server.port), timeout=10))
            open_files = len(os.listdir(f"/proc/{server.process.pid}/fd"))
            assert open_files < 300
            wait_until(lambda: _status(server.url) == 200)
            text = httpx.get(f"{server.url}/metrics", trust_env=False).text
            counted = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
            refused, slow = (
                float(counted[f"judge_{name}_total"]) for name in ("connections_refused", "slow_connections")
            )
            # Places of those that were cut off for their silence were taken by others.
            assert refused > count / 2 and count - 210 <= refused + slow <= count + 100
        finally:
            for connection in sockets:
                connection.close()


def _status(url):
    try:
        return post(url).status_code
    except httpx.TransportError:
        return None


def test_killed_and_started_again(tmp_path):
    with FakeProcess(tmp_path, "--fake_delay=5") as server:
        url, port = server.url, server.port
        threading.Timer(0.5, server.process.kill).start()
        with pytest.raises(httpx.TransportError):
            post(url)
        server.process.wait(10)
    (tmp_path / "key").write_text("secret\n")
    with FakeProcess(tmp_path, f"--key_file={tmp_path / 'key'}", port=port) as server:
        assert server.url == url and post(url).status_code == 401
        reply = post(url, headers={"Authorization": "Bearer secret"})
        assert reply.status_code == 200 and expectation(reply.json())[0] > 0.9
        # A trainer's judge is content with it: capabilities, canaries, scores.
        judge: Any = VlmJudge(f"{url}/v1", key_file=str(tmp_path / "key"))
        judge.start()
        before, after = (np.asarray(square(colour)) for colour in ((0, 0, 255), (255, 0, 0)))
        pairs = [(before, after), (before, before)]
        good, none = judge([JudgeRequest(*pair, "make the square red") for pair in pairs])
        judge.close()
        assert good.score is not None and good.score > 0.9 and none.score == pytest.approx(0)
        # The other command on it.
        flags = (
            f"--endpoint={url}/v1",
            "--requests=20",
            "--concurrency=4",
            "--size=32",
            f"--json={tmp_path / 'b.json'}",
        )
        done = command("bench_judge", *flags, f"--key_file={tmp_path / 'key'}")
        assert done.returncode == 0, done.stderr
        result = json.loads((tmp_path / "b.json").read_text())
        assert result["answered"] == 20 and result["failed"] == {} and result["without_logprobs"] == 0
        latency = result["latency_ms"]
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]
        assert result["images_per_s"] == pytest.approx(40 / result["seconds"])
        assert "p50" in done.stdout and "images/s" in done.stdout and "20/20" in done.stderr
        with ChatClient([f"{url}/v1"]) as client, pytest.raises(UserError, match="--endpoint: .*field 'authorization'"):
            find_model(client)


def test_what_was_measured_until_the_judge_died_is_printed(tmp_path):
    with FakeJudge() as judge:
        judge.faults = [""] * 11 + ["drop"] * 90
        flags = (f"--endpoint={judge.url}", "--requests=90", "--concurrency=1", "--size=8")
        done = command("bench_judge", *flags, f"--json={tmp_path / 'b.json'}")
    assert done.returncode == 1 and "p50" in done.stdout
    assert "--endpoint: 5 requests in a row failed, when 10 of 90 had been answered" in done.stderr.splitlines()[-1]
    assert json.loads((tmp_path / "b.json").read_text())["answered"] == 10


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ((), "--model and --fake: give one of them"),
        (("--fake", "--model=x"), "--model and --fake: give one of them"),
        (("--fake", "--host=0.0.0.0"), "--host=0.0.0.0: other machines could use the server"),
        (("--fake", "--key_env=COCOEDIT_NO_SUCH_KEY"), "COCOEDIT_NO_SUCH_KEY"),
        (("--model=no/such-model",), "'no/such-model': no such folder, and not in the Hugging Face cache"),
    ],
)
def test_bad_flags(flags, text):
    done = command("serve_judge", *flags)
    assert done.returncode == 1 and text in done.stderr and done.stderr.count("\n") == 1, done.stderr
