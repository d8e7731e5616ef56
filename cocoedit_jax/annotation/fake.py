"""A stand-in for the vision-language model: no weights, no server, the same answers every time.

It sees (boxes lie around where the picture has its detail) but understands nothing: for a first look at the pipeline
and for tests. Its data must not be trained on.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from cocoedit_jax.rewards.chat import ChatReply, ChatRequest, TokenLogprob

_KIND_WORDS = {
    "remove": ("remove", "erase", "delete", "without"),
    "add": ("add", "put", "insert", "place"),
    "replace": ("replace", "swap", "turn", "into"),
    "text": ("text", "letter", "word", "write"),
    "style": ("style", "painting", "sketch", "cartoon"),
    "background": ("background",),
    "tone": ("night", "winter", "sunset", "black and white", "brighter", "darker"),
    "material": ("wooden", "metal", "marble", "glass", "gold"),
    "motion": ("raise", "jump", "open", "close", "smile", "sit", "run"),
}


class FakeModel:
    """Answers by the first two parts of `request_id` (stage|question|...), as `work.prepare` writes it. Boxes are in
    pixels of the picture as sent.
    """

    def complete_all(self, requests: Sequence[ChatRequest], deadline_s: float | None = None) -> list[ChatReply]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: ChatRequest) -> ChatReply:
        stage, question, _ = request.request_id.split("|", 2)
        pictures, text = _parts(request.messages)
        found = re.search(r"^Instruction: (.*)$", text, re.MULTILINE)
        instruction = found[1] if found else ""
        if request.logprobs:
            return self._digit(request.request_id, question, text)
        if stage == "classify":
            answer = self._kind(instruction)
        elif stage == "box":
            box = [round(side) for side in detail_box(pictures[0])]
            answer = f"```json\n{json.dumps([{'bbox_2d': box, 'label': 'target'}])}\n```"
        else:
            where = _place(detail_box(pictures[0]), pictures[0].size)
            said = {"target": "target", "location": where, "attributes": "", "instruction": f"{instruction} ({where})"}
            answer = json.dumps(said)
        return ChatReply(request.request_id, answer, finish_reason="stop")

    @staticmethod
    def _kind(instruction: str) -> str:
        text = instruction.lower()
        kinds = (kind for kind, words in _KIND_WORDS.items() if any(re.search(rf"\b{word}\b", text) for word in words))
        return next(kinds, "color")

    @staticmethod
    def _digit(request_id: str, question: str, text: str) -> ChatReply:
        """Between 3 and 5, more often high, so that a handful of photos is not all rejected."""
        number = int.from_bytes(hashlib.sha256(f"{question}\0{text}\0{request_id}".encode()).digest()[:4], "big")
        share = math.sqrt(number / 2**32)
        value = 3 + 1.999 * share
        low = int(value)
        p = {str(low): 0.98 * (low + 1 - value), str(low + 1): 0.98 * (value - low), "none": 0.02}
        p |= dict.fromkeys("ABC", 0.0)  # a server lists 20; fewer than there are digits are no distribution
        ranked = sorted(p.items(), key=lambda entry: -entry[1])
        candidates = tuple(TokenLogprob(token, math.log(max(q, 1e-9))) for token, q in ranked)
        return ChatReply(request_id, candidates[0].token, (candidates,), "length")


def detail_box(image: Image.Image) -> tuple[float, float, float, float]:
    """Where the picture has its edges: per axis the range without a tail of 0.1 % of a plain picture's edges, or of a
    quarter at both ends of a photo's, whose edges lie everywhere.
    """
    gray = np.asarray(image.convert("L"), np.float64)
    rows, columns = np.abs(np.diff(gray, axis=0)), np.abs(np.diff(gray, axis=1))
    # Few pixels with any change: a drawing, not a photo.
    tail = 0.001 if np.mean(columns > 2) < 0.02 else 0.25
    x0, x1 = _range(columns.sum(0) + 1e-9, tail)
    y0, y1 = _range(rows.sum(1) + 1e-9, tail)
    return x0, y0, x1, y1


def _range(weight: np.ndarray, tail: float) -> tuple[float, float]:
    share = np.cumsum(weight) / weight.sum()
    # A change between pixels i and i + 1 is an edge at i + 1.
    return float(np.searchsorted(share, tail) + 1), float(np.searchsorted(share, 1 - tail) + 1)


def _place(box: tuple[float, float, float, float], size: tuple[int, int]) -> str:
    x, y = (box[0] + box[2]) / 2 / size[0], (box[1] + box[3]) / 2 / size[1]
    across = "on the left" if x < 0.4 else "on the right" if x > 0.6 else "in the middle"
    return across + (", at the top" if y < 0.4 else ", at the bottom" if y > 0.6 else "")


def _parts(messages: Sequence[Mapping]) -> tuple[list[Image.Image], str]:
    pictures, texts = [], []
    for part in (part for message in messages for part in message["content"]):
        if part["type"] == "image_url":
            data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
            pictures.append(Image.open(io.BytesIO(data)).convert("RGB"))
        else:
            texts.append(part["text"])
    return pictures, "\n".join(texts)
