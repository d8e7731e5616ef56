"""Requests read and refused, replies written: without a server."""

import io
import json
import time
import zlib

import numpy as np
import pytest
from openai.types.chat import ChatCompletion
from PIL import Image, ImageFile

from cocoedit_jax.rewards.chat_protocol import parse_completion
from tests.data.scan_files import many_scans
from tests.torch_bridge.judge_server.helpers import (
    ROOT,
    as_url,
    chat,
    data_url,
    image_part,
    judge_request,
    png_chunk,
    png_of_size,
    square,
    text_part,
)
from torch_bridge.judge_server.chat_model import Completion, Sampling, TokenChoice
from torch_bridge.judge_server.pictures import PictureError, decode_data_url
from torch_bridge.judge_server.protocol import ApiError, Limits, parse_request, read_job, write_reply

SMALL = Limits(image_bytes=4000, image_pixels=10_000, images=2, text_chars=100, new_tokens=8)
PICTURE = image_part(data_url(square((255, 0, 0))))


def job_of(body, limits=SMALL):
    return read_job(parse_request(json.dumps(body).encode()), "fake", 256, limits)


def refusal(body, limits=SMALL):
    with pytest.raises(ApiError) as caught:
        job_of(body, limits)
    return caught.value


def test_a_judge_request_is_read():
    before, after = square((0, 0, 255)), square((255, 0, 0))
    job = job_of(judge_request(before, after, logprob_token_ids=[49, 48, 49]))
    assert job.sampling == Sampling(1, 20, (49, 48))
    (message,) = job.messages
    assert [type(part).__name__ for part in message.parts] == ["str", "Image", "str", "Image", "str"]
    for found, sent in zip(message.images, (before, after), strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(sent))


def test_defaults():
    job = job_of({"model": "fake", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]})
    assert job.sampling == Sampling(SMALL.new_tokens, None, ())
    assert [(message.role, message.parts) for message in job.messages] == [("system", ("s",)), ("user", ("u",))]
    # Both names of the same number; logprobs without candidates.
    job = job_of(chat(text_part("x"), max_tokens=3, max_completion_tokens=3, logprobs=True))
    assert job.sampling == Sampling(3, 0, ())


@pytest.mark.parametrize(
    ("change", "param", "text"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "a string or a list of parts"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0]", '"image_url"'),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'system', 'user' or 'assistant'"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "the last is of 'assistant'"),
        ({"messages": [{"role": "user", "content": "x" * 101}]}, "messages", "101 characters of text"),
        ({"messages": [{"role": "user", "content": [PICTURE] * 3}]}, "messages", "3 pictures, expected at most 2"),
        (
            {"messages": [{"role": "system", "content": [PICTURE]}, {"role": "user", "content": "x"}]},
            "messages[0].content[0].image_url",
            "expected only those of 'user'",
        ),
        ({"temperature": 0.7}, "temperature", "expected 0; decoding is greedy"),
        ({"temperature": "0"}, "temperature", "expected 0; decoding is greedy"),
        ({"n": 2}, "n", "expected 1; there is one choice"),
        ({"stream": True}, "stream", "replies are not streamed"),
        ({"tools": []}, "tools", "does not know this field"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "'text'"),
        ({"logprobs": 1}, "logprobs", "boolean"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "less than or equal to 20"),
        ({"top_logprobs": 5}, "top_logprobs", "needs logprobs=true"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids", "needs logprobs=true"),
        ({"logprob_token_ids": [256], "logprobs": True}, "logprob_token_ids", "256 given, expected ids below 256"),
        ({"logprob_token_ids": [-1], "logprobs": True}, "logprob_token_ids[0]", "greater than or equal to 0"),
        ({"max_completion_tokens": 9}, "max_completion_tokens", "9 given, expected at most 8"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "beside max_completion_tokens"),
    ],
)
def test_refusals_name_the_field(change, param, text):
    error = refusal(chat(text_part("x")) | change)
    assert (error.status, error.param) == (400, param) and text in error.message
    assert error.body["error"] == {
        "message": error.message,
        "type": "invalid_request_error",
        "param": param,
        "code": None,
    }


def test_all_faults_together_and_no_input_repeated():
    error = refusal(chat(image_part("x" * 1000), image_part("file:///etc/passwd"), top_logprobs=1))
    for field in ("top_logprobs", "messages[0].content[0].image_url.url", "messages[0].content[1].image_url.url"):
        assert field in error.message
    assert len(error.message) < 500
    for body in (b"", b"{", b"[]", b'{"a": NaN}', b"[" * 100_000, b'"\xff"'):
        with pytest.raises(ApiError) as caught:
            parse_request(body)
        assert caught.value.status == 400 and len(caught.value.message) < 300
    for body in (b"{" + b'"a":1,' * 1_000_000, b'{"user": [' + b"[]," * 1_000_000):
        start = time.monotonic()
        with pytest.raises(ApiError, match="too many values"):
            parse_request(body)
        assert time.monotonic() - start < 1
    error = refusal(chat(text_part("x"), **{f"unknown{number}": 1 for number in range(20)}))
    assert "and 15 more" in error.message
    error = refusal(chat(text_part("x"), model="gpt-4o"))
    assert (error.status, error.param, error.body["error"]["code"]) == (404, "model", "model_not_found")


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a.png",
        "https://example.com/a.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "",
        "data:image/png,abc",
        "data:image/svg+xml;base64,abcd",
        "data:text/plain;base64,abcd",
        "data:image/png;base64,",
        "data:image/png;base64,ä",
        "data:image/png;base64,abc",
        "data:image/png;base64,ab!d",
        as_url(b"no picture at all"),
        as_url(b"GIF89a\x01\x00\x01\x00\x00\x00\x00;"),
        data_url(square((1, 2, 3)))[:200],
        data_url(square((1, 2, 3)), "JPEG")[:400],
        as_url(png_of_size(20_000, 20_000)),
        as_url(png_of_size(101, 100)),
        as_url(png_of_size(2010, 2)),
        as_url(png_of_size(0, 5)),
    ],
    ids=lambda url: url[:30],
)
def test_pictures_that_are_refused(url):
    with pytest.raises(PictureError) as caught:
        decode_data_url(url, 10**6, 10_000)
    assert len(str(caught.value)) < 300 and " at 0x" not in str(caught.value)


def test_a_bomb_is_refused_unopened(monkeypatch):
    bomb = as_url(png_of_size(30_000, 30_000))  # 900 megapixels in about 110 kB
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(PictureError, match="30000x30000 px, expected at most 4194304 pixels|decompression bomb"):
        decode_data_url(bomb, 10**7, 2**22)
    with pytest.raises(PictureError, match=r"a file of 1\d+ bytes, expected at most 5000"):
        decode_data_url(bomb, 5000, 2**40)


def test_small_files_that_take_long_are_refused_undecoded(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(PictureError, match="a JPEG file of more than 100 scans, expected at most 100"):
        decode_data_url(as_url(many_scans(101), "jpeg"), 10**6, 10_000)
    error = refusal(chat(image_part(as_url(many_scans(101), "jpeg"))), Limits())
    assert (error.status, error.param) == (400, "messages[0].content[0].image_url.url")
    profile = png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2**20 - 1)))
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("opened"))  # which already expands profiles
    for chunks, text in ((profile * 2, "several colour profiles"), (png_chunk(b"tEXt", b"a\0") * 1000, "1000 chunks")):
        for place in (33, -12):  # behind the header; before the end
            whole = png_of_size(8, 8)
            with pytest.raises(PictureError, match=text):
                decode_data_url(as_url(whole[:place] + chunks + whole[place:]), 10**6, 10_000)


def test_large_exif_is_refused_unread(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "getexif", lambda self: pytest.fail("read"))
    whole = png_of_size(8, 8)
    for place in (33, -12):
        exif = png_chunk(b"eXIf", b"MM" + bytes(2**16))
        with pytest.raises(PictureError, match="more than 65536 bytes of EXIF"):
            decode_data_url(as_url(whole[:place] + exif + whole[place:]), 10**6, 10_000)


def test_pictures_that_are_read():
    assert decode_data_url(as_url(many_scans(100), "jpeg"), 10**6, 10_000).size == (64, 64)
    noted = png_of_size(8, 8)
    noted = noted[:33] + png_chunk(b"tEXt", b"a\0b") * 900 + noted[33:]
    assert decode_data_url(as_url(noted), 10**6, 100).size == (8, 8)
    gray = Image.fromarray(np.full((5, 7), 40000, np.uint16))
    clear = Image.new("RGBA", (7, 5), (255, 0, 0, 0))
    assert np.asarray(decode_data_url(data_url(gray), 10**6, 100)).tolist() == [[[156] * 3] * 7] * 5
    assert np.asarray(decode_data_url(data_url(clear), 10**6, 100)).tolist() == [[[255] * 3] * 7] * 5
    turned = Image.new("RGB", (7, 5))
    exif = turned.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    turned.save(buffer, "JPEG", exif=exif)
    assert decode_data_url(as_url(buffer.getvalue(), "jpeg"), 10**6, 100).size == (5, 7)


def test_replies_have_the_shape_of_vllms():
    """The same candidates, in a reply of vLLM 0.33.0's serving code and in ours."""
    theirs = json.loads((ROOT / "tests/rewards/replies/vllm_top20.json").read_text())
    places = theirs["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    candidates = tuple((number, place["logprob"]) for number, place in enumerate(places))
    job = job_of(chat(text_part("x"), logprobs=True, top_logprobs=20, max_completion_tokens=1))
    choice = TokenChoice(0, candidates[0][1], candidates)
    token = lambda number: places[number]["token"]  # noqa: E731
    ours = write_reply(job, Completion((choice,), "4", "length"), 812, theirs["model"], token)

    def check(ours, theirs):
        if isinstance(theirs, dict):
            for key, value in theirs.items():
                if value is not None and key not in ("id", "created", "system_fingerprint"):
                    check(ours[key], value)
        elif isinstance(theirs, list):
            assert len(ours) == len(theirs)
            for pair in zip(ours, theirs, strict=True):
                check(*pair)
        else:
            assert (ours, type(ours)) == (theirs, type(theirs))

    check(ours, theirs)
    assert isinstance(ours["created"], int) and ours["id"].startswith("chatcmpl-")
    parsed = [parse_completion(json.dumps(body, allow_nan=False).encode()) for body in (ours, theirs)]
    assert parsed[0] == parsed[1] and parsed[0]["logprobs"] is not None
    impossible = TokenChoice(0, 0.0, ((0, 0.0), (1, -float("inf"))))
    reply = write_reply(job, Completion((impossible,), "4", "length"), 1, "m", token)
    assert reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"][1]["logprob"] == -9999.0
    ChatCompletion.model_validate(reply, strict=True)


def test_tokens_as_ids_and_no_logprobs():
    body = chat(text_part("x"), logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True)
    choice = TokenChoice(52, -0.25, ((52, -0.25),))
    reply = write_reply(job_of(body), Completion((choice,), "4", "stop"), 1, "m", chr)
    place = reply["choices"][0]["logprobs"]["content"][0]
    assert place["token"] == place["top_logprobs"][0]["token"] == "token_id:52" and place["bytes"] == [52]
    reply = write_reply(job_of(chat(text_part("x"))), Completion((choice,), "4", "stop"), 1, "m", chr)
    assert reply["choices"][0]["logprobs"] is None
