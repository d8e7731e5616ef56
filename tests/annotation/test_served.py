"""The pipeline through the real HTTP client, against a server in this process that answers as the fake model does."""

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from cocoedit_jax.annotation import run
from cocoedit_jax.errors import UserError
from tests.annotation.helpers import answer, contents


def _refused(name):
    """About a quarter of the scores, the first time that they are asked for."""
    return name.startswith("score") and name[-1] in "0123"


@pytest.fixture
def server():
    class Handler(BaseHTTPRequestHandler):
        seen: list = []
        broken: set = set()

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = self.headers["X-Request-Id"].partition("-try")[0]  # each attempt has a name of its own
            first = name not in self.seen
            self.seen.append(name)
            status, reply = 200, answer({"custom_id": f"{name}|mark", "body": body})["response"]["body"]
            if _refused(name) and first:
                status, reply = 503, {"error": {"message": "overloaded"}}
            if name.split("|")[0] in self.broken:
                status, reply = 422, {"detail": "no pictures, please"}
            data = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield SimpleNamespace(handler=Handler, url=f"http://127.0.0.1:{http.server_address[1]}/v1")
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def test_as_without_a_server(done, settings, photos, tmp_path, server):
    """Some scores are refused with 503 at first, and asked for again."""
    models = replace(settings.models, endpoints=(server.url,), name="served", deadline_s=60.0, probe_s=30.0)
    out = tmp_path / "out"
    outcome = run.annotate(replace(settings, models=models), out, source=str(photos))
    assert outcome == done[1]
    found, expected = contents(out), contents(done[0])
    for row in found["metadata.jsonl"]:
        assert row.pop("annotated_by") == "served"
    for row in expected["metadata.jsonl"]:
        row.pop("annotated_by")
    assert found == expected
    scores = [name for name in server.handler.seen if name.startswith("score")]
    assert len(set(scores)) == 27 + 1 and len(scores) == 28 + len({name for name in scores if _refused(name)}) > 28


def test_a_server_that_refuses_the_requests(settings, photos, tmp_path, server):
    server.handler.broken = {"rewrite"}
    models = replace(settings.models, endpoints=(server.url,), name="served", deadline_s=60.0, probe_s=30.0)
    with pytest.raises(UserError, match="rewrite: . of . records got no answer.*no pictures, please"):
        run.annotate(replace(settings, models=models), tmp_path / "out", source=str(photos))
