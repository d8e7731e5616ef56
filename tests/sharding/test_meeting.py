"""Processes, here threads, that meet, or learn who is missing."""

import socket
import threading
import time

import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.sharding.meeting import meet


def free_address():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def together(*calls):
    """What each (address, count, index, seconds) ends with: "" or the message."""
    ended = [""] * len(calls)

    def one(at, call):
        try:
            meet(*call)
        except UserError as error:
            ended[at] = str(error)

    threads = [threading.Thread(target=one, args=each) for each in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return ended


def test_all_come_and_the_port_is_free_again():
    address = free_address()
    assert together(*((address, 5, index, 10) for index in (3, 1, 0, 4, 2))) == [""] * 5
    assert together((address, 1, 0, 10)) == [""]
    socket.create_server(("localhost", int(address.rpartition(":")[2]))).close()


def test_those_that_come_learn_who_is_missing():
    address = free_address()
    start = time.monotonic()
    found = together((address, 4, 0, 1), (address, 4, 2, 1))
    assert 1 <= time.monotonic() - start < 8
    assert found[0] == found[1] and found[0].startswith("--initialization_timeout=1: process 1, 3 of 4 did not come")
    assert f"--coordinator_address={address}" in found[0]


@pytest.mark.parametrize(
    ("others", "text"),
    [([(3, 1)], "--num_processes=3 in process 1, 4 in process 0"), ([(4, 1)] * 2, "--process_id=1: two processes")],
)
def test_processes_that_contradict_each_other(others, text):
    address = free_address()
    found = together((address, 4, 0, 10), *((address, count, index, 10) for count, index in others))
    assert all(text in each for each in found), found


def test_a_process_that_went_is_missed_and_a_stranger_is_ignored():
    address = free_address()
    ended = []
    host = threading.Thread(target=lambda: ended.append(together((address, 3, 0, 3))[0]))
    host.start()
    with call(address) as stranger, call(address) as gone:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        gone.sendall(b'{"cocoedit_jax": 1, "process": 1, "of": 3}\n')
        time.sleep(0.5)
    host.join(20)
    assert "process 1, 2 of 3 did not come" in ended[0]


def call(address):
    """A connection to process 0, once it listens."""
    while True:
        try:
            return socket.create_connection(("localhost", int(address.rpartition(":")[2])))
        except OSError:
            time.sleep(0.05)


def test_process_0_may_come_last():
    address = free_address()
    late = threading.Timer(1.0, meet, (address, 2, 0, 10))
    late.start()
    meet(address, 2, 1, 10)
    late.join()


def test_nothing_answers():
    with pytest.raises(UserError, match=r"nothing answers within --initialization_timeout=1 s \(.*refused"):
        meet(free_address(), 2, 1, 1)
    with socket.create_server(("localhost", 0)) as taken, pytest.raises(UserError, match="cannot listen at port"):
        meet(f"localhost:{taken.getsockname()[1]}", 2, 0, 1)
