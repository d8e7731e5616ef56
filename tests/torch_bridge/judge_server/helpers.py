"""Judge servers for tests, in a thread or as a process, and requests to them."""

import base64
import contextlib
import io
import os
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import numpy as np
from PIL import Image

from torch_bridge.judge_server.fake import FakeModel
from torch_bridge.judge_server.protocol import Limits
from torch_bridge.judge_server.serving import Address, JudgeServer, ServeOptions

ROOT = Path(__file__).resolve().parents[3]
PATH = "/v1/chat/completions"
RED, BLUE, PURPLE = (255, 0, 0), (0, 0, 255), (128, 0, 128)
LIMITS = Limits(body_bytes=200_000, image_bytes=100_000, image_pixels=100_000, images=4, prompt_tokens=500)


def square(colour, size=64):
    """A picture with a square of a colour on gray, from a quarter to three quarters of each side."""
    pixels = np.full((size, size, 3), 200, np.uint8)
    pixels[size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = colour
    return Image.fromarray(pixels)


def data_url(image, format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return as_url(buffer.getvalue(), format.lower())


def as_url(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def image_part(url):
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text):
    return {"type": "text", "text": text}


def chat(*parts, model="fake", **fields):
    return {"model": model, "messages": [{"role": "user", "content": list(parts)}]} | fields


def judge_request(before, after, instruction="make the square red", **fields):
    """As a trainer sends it."""
    parts = [text_part("Image A, before:"), image_part(data_url(before))]
    parts += [text_part("Image B, after:"), image_part(data_url(after)), text_part(f"{instruction}; 0 to 5?")]
    wanted = {"temperature": 0, "max_completion_tokens": 1, "logprobs": True, "top_logprobs": 20}
    return chat(*parts, **(wanted | fields))


def expectation(reply):
    """Score in [0, 1] and covered mass."""
    found = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    chances = {c["token"].strip(): np.exp(c["logprob"]) for c in found if c["token"].strip() in "012345"}
    mass = sum(chances.values())
    return sum(int(digit) * chance for digit, chance in chances.items()) / mass / 5, mass


def png_chunk(kind, data):
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png_of_size(width, height):
    """A small, valid PNG file that decodes to width x height black pixels."""
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


def metric(client, name):
    """A sum over the labels of a metric."""
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0].split(" ")[0] == name)


def wait_until(condition, seconds=60.0):
    """For what must come to be, on however busy a machine."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.02)


def good(words="make the square red"):
    """A request that any judge scores well; `words` must name the colour red."""
    return judge_request(square(BLUE), square(RED), words)


def still_serves(client):
    reply = client.post(PATH, json=good())
    assert reply.status_code == 200 and expectation(reply.json())[0] > 0.9
    return True


@contextlib.contextmanager
def running(model, settings, connections=None, *, wait=True, token="", drain_seconds=20):
    """A client of a server in a thread of this process."""
    options = ServeOptions(Address(port=0), drain_seconds=drain_seconds)
    if connections is not None:
        options = ServeOptions(Address(port=0), connections, drain_seconds)
    server = JudgeServer(model, settings, options, lambda text: None)
    thread = threading.Thread(target=server.run)
    thread.start()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with httpx.Client(base_url=server.url, headers=headers, timeout=60, trust_env=False) as client:
            wait_until(lambda: _answers(client, "/health/ready" if wait else "/health/live"))
            yield client
    finally:
        server.stop()
        thread.join(60)
    assert not thread.is_alive()


class Gated(FakeModel):
    """Computes nothing until `go` is set, and keeps the last words of what it was given to compute, by batches."""

    def __init__(self):
        super().__init__()
        self.go, self.started = threading.Event(), threading.Event()
        self.batches = []

    def complete(self, prompts, samplings):
        self.batches.append([prompt.inputs[-1].texts[-1].partition(";")[0] for prompt in prompts])
        self.started.set()
        self.go.wait()
        return super().complete(prompts, samplings)


@contextlib.contextmanager
def gated(settings, connections=None):
    """A `Gated` model behind a server, a client, and `send(words)`: a request under way, as a future. The gate opens at
    the end, whatever happened, so that no thread waits for ever.
    """
    model = Gated()
    with running(model, settings, connections) as client, ThreadPoolExecutor(32) as pool:
        try:
            yield model, client, lambda words: pool.submit(client.post, PATH, json=good(words))
        finally:
            model.go.set()


class Stuck(FakeModel):
    """Does not come back from preparing what has the word stuck in it, until `go` is set."""

    def __init__(self):
        super().__init__()
        self.go = threading.Event()

    def prepare(self, messages):
        if "stuck" in messages[-1].texts[-1]:
            self.go.wait()
        return super().prepare(messages)


def _answers(client, path):
    try:
        return client.get(path).status_code == 200
    except httpx.TransportError:
        return False


class FakeProcess:
    """``python -m launch.serve_judge --fake``, or another program, as a process; `torch` cannot be imported in it."""

    def __init__(self, folder, *flags, port=0, environment=None, program=None):
        (folder / "torch.py").write_text("raise RuntimeError('torch was imported')")
        path = os.pathsep.join([str(folder), str(ROOT)])
        self.process = subprocess.Popen(
            [sys.executable, *(program or ("-m", "launch.serve_judge", "--fake", f"--port={port}", *flags))],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path} | (environment or {}),
        )
        assert self.process.stdout is not None
        try:
            first = self.process.stdout.readline()
            assert first.startswith("listening at "), first
            self.url = first.split()[2].removesuffix("/v1;")
            assert self.process.stdout.readline().startswith("ready: ")
        except BaseException:
            self.__exit__()
            raise

    @property
    def port(self):
        return int(self.url.rpartition(":")[2])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()
