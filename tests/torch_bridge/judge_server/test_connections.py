"""Connections that cost the server nothing for long: slow, resting, unread, too many, and from elsewhere."""

import asyncio
import contextlib
import json
import socket
import time

import pytest

from cocoedit_jax.errors import UserError
from tests.torch_bridge.judge_server.helpers import PATH, gated, good, metric, running, still_serves, wait_until
from torch_bridge.judge_server.app import AppSettings
from torch_bridge.judge_server.connections import ConnectionLimits
from torch_bridge.judge_server.fake import FakeModel
from torch_bridge.judge_server.serving import Address

HEAD = b"GET /health/live HTTP/1.1\r\nhost: x\r\n"


def closed(connection):
    """Waits until the server has closed a connection that it has sent nothing."""
    try:
        return connection.recv(4096) == b""
    except ConnectionError:
        return True


def test_slow_senders_are_cut_off(connect):
    limits = ConnectionLimits(head_seconds=1.0, keep_alive_seconds=1.0, cycle_seconds=60.0)
    with running(FakeModel(), AppSettings("fake", body_seconds=0.5), limits) as client:
        client.headers["connection"] = "close"  # its own connection must not rest
        resting = connect(client)
        resting.sendall(HEAD + b"\r\n")
        assert b"200" in resting.recv(4096)
        resting.sendall(HEAD)  # after a reply a connection may rest a while; but the next request never ends
        silent, dripping, body = connect(client), connect(client), connect(client)
        body.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        body.sendall(b"content-length: 1000\r\n\r\n{")
        with pytest.raises(ConnectionError):
            dripping.sendall(HEAD + b"x: ")
            for _ in range(1000):
                dripping.sendall(b"y")
                time.sleep(0.05)
        assert closed(silent) and closed(dripping) and closed(resting)
        assert b"408" in body.recv(4096).partition(b"\r\n")[0]
        assert still_serves(client)
        assert metric(client, "judge_slow_connections_total") == 3


def test_a_reply_that_takes_too_long_is_cut_off(connect):
    """Whatever keeps it: a client that does not read holds a connection no longer than a model that does not answer."""
    with gated(AppSettings("fake"), ConnectionLimits(cycle_seconds=1.0)) as (model, client, _):
        body = json.dumps(good()).encode()
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        waiting = connect(client)
        waiting.sendall(head.encode() + b"\r\n" + body)
        assert model.started.wait(60) and closed(waiting)
        assert metric(client, "judge_slow_connections_total") == 1


def test_connections_are_bounded():
    limits = ConnectionLimits(connections=100, head_seconds=60.0)
    with running(FakeModel(), AppSettings("fake"), limits) as client:
        assert still_serves(client)  # and keeps its connection

        async def first_bytes(opened):
            """Opens a connection, adds it to `opened`, and waits for the server to speak first."""
            reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
            opened.append(writer)
            try:
                return await reader.read(12)
            except ConnectionError:
                return b"reset"

        async def flood(count):
            opened: list[asyncio.StreamWriter] = []
            tasks = [asyncio.create_task(first_bytes(opened)) for _ in range(count)]
            try:
                answers = []
                async with asyncio.timeout(60):
                    for answer in asyncio.as_completed(tasks):
                        answers.append(await answer)
                        if len(answers) == count - 99:  # one of the hundred is the client's
                            break
                assert len(opened) == count
                return answers, sum(not task.done() for task in tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                for writer in opened:
                    writer.close()
                    with contextlib.suppress(ConnectionError):
                        await writer.wait_closed()

        answers, held = asyncio.run(flood(500))
        assert set(answers) <= {b"HTTP/1.1 429", b"reset"} and held == 99
        assert metric(client, "judge_connections_refused_total") == 401
        wait_until(lambda: metric(client, "judge_connections") == 1)
        assert still_serves(client)


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
