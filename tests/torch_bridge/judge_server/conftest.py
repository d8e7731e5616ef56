"""A server with the fake model for a file's tests, and raw connections that end with their test."""

import contextlib
import socket

import pytest

from tests.torch_bridge.judge_server.helpers import LIMITS, running
from torch_bridge.judge_server.app import AppSettings
from torch_bridge.judge_server.fake import FakeModel


@pytest.fixture(scope="module")
def client():
    with running(FakeModel(), AppSettings("fake", limits=LIMITS)) as found:
        yield found


@pytest.fixture
def connect():
    """Opens a connection to a client's server; a test that fails leaves none open to disturb the next one."""
    with contextlib.ExitStack() as opened:

        def one(client):
            place = (client.base_url.host, client.base_url.port)
            return opened.enter_context(socket.create_connection(place, timeout=60))

        yield one
