"""A model without weights that answers by rule, always the same to the same request: for tests and first steps.

One token, two pictures or more: a digit for the first picture (before) and the second (after). If the last text names a
colour, the score in [0, 1] is how much of the way to that colour the changed pixels went; else it is one minus the
share of pixels that changed. Nothing changed: 0. One token with fewer pictures: a score drawn from a hash of the
request. The probability of the digits 0 to 5 is 0.97 in all, with 5 * score as their expectation.

More tokens: if the last text asks for a box, JSON as Qwen2.5-VL writes it, `[{"bbox_2d": [left, top, right, bottom],
"label": "object"}]` in pixels of the last picture as it was sent, around what differs from that picture's edge; else
the last text again.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Sequence

import numpy as np
from PIL import Image

from torch_bridge.judge_server.chat_model import Completion, Message, Prompt, Sampling, TokenChoice

_COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
    "orange": (255, 165, 0),
    "purple": (128, 0, 128),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
}
_COLOUR = re.compile(rf"\b({'|'.join(_COLOURS)})\b", re.IGNORECASE)
_BOX = re.compile(r"\b(bbox|box|bounding)", re.IGNORECASE)
_SIDE = 64  # pictures are compared at this size
_CHANGED = 16  # of 255, in any channel
_DIGIT_MASS = 0.97
_FIRST = 33  # the byte with number 0
_CELL = 28  # pixels of a picture token of Qwen2.5-VL


class FakeModel:
    """See the module. Tokens are bytes; the digits 0 to 5 have the numbers 15 to 20, as in Qwen's tokenizers.

    Args:
        delay: seconds that a batch takes.
    """

    vocabulary_size = 256
    max_tokens = 2**15
    digits = frozenset(range(15, 21))

    def __init__(self, delay: float = 0.0):
        self.delay = delay

    def load(self) -> None:
        pass

    def token(self, token_id: int) -> str:
        return bytes([(token_id + _FIRST) % 256]).decode("utf-8", "replace")

    def prepare(self, messages: Sequence[Message]) -> Prompt:
        texts = sum(len(text.encode()) for message in messages for text in message.texts)
        sizes = [image.size for message in messages for image in message.images]
        cells = sum(math.ceil(width / _CELL) * math.ceil(height / _CELL) for width, height in sizes)
        return Prompt(tuple(messages), texts + cells)

    def complete(self, prompts: Sequence[Prompt], samplings: Sequence[Sampling]) -> list[Completion]:
        time.sleep(self.delay)
        return [_complete(prompt.inputs, sampling) for prompt, sampling in zip(prompts, samplings, strict=True)]


def _complete(messages: Sequence[Message], sampling: Sampling) -> Completion:
    if sampling.max_tokens == 1:
        return _judge(messages, sampling)
    images = [image for message in messages for image in message.images]
    text = _last_text(messages)
    if images and _BOX.search(text):
        text = json.dumps([{"bbox_2d": find_box(images[-1]), "label": "object"}])
    data = text.encode()[: sampling.max_tokens]
    ids = [(byte - _FIRST) % 256 for byte in data]
    choices = tuple(TokenChoice(number, 0.0, _candidates(_certain(number), number, sampling)) for number in ids)
    return Completion(choices, data.decode("utf-8", "replace"), "stop" if len(data) < sampling.max_tokens else "length")


def _judge(messages: Sequence[Message], sampling: Sampling) -> Completion:
    logprobs = _digit_logprobs(score(messages))
    best = int(logprobs.argmax())
    choice = TokenChoice(best, float(logprobs[best]), _candidates(logprobs, best, sampling))
    return Completion((choice,), chr(best + _FIRST), "length")


def score(messages: Sequence[Message]) -> float:
    """In [0, 1]; the rule is at the head of this module."""
    images = [image for message in messages for image in message.images]
    text = _last_text(messages)
    if len(images) < 2:
        digest = hashlib.sha256(text.encode())
        for image in images:
            digest.update(image.tobytes())
        return int.from_bytes(digest.digest()[:4], "big") / (2**32 - 1)
    before, after = (_small(image) for image in images[:2])
    changed = (np.abs(after - before) > _CHANGED).any(-1)
    if not changed.any():
        return 0.0
    named = _COLOUR.search(text)
    if not named:
        return float(1.0 - changed.mean())
    colour = np.asarray(_COLOURS[named[1].lower()], np.float64)
    start, end = (np.abs(picture[changed] - colour).sum() for picture in (before, after))
    return float(np.clip((start - end) / max(start, 1.0), 0.0, 1.0))


def find_box(image: Image.Image) -> list[int]:
    """Left, top, right and bottom (exclusive) in pixels around what differs from the colour of the picture's edge."""
    pixels = np.asarray(image, np.int64)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    differs = (np.abs(pixels - np.median(edge, axis=0)) > 2 * _CHANGED).any(-1)
    rows, columns = (np.flatnonzero(differs.any(axis)) for axis in (1, 0))
    if not len(rows):
        return [0, 0, image.width, image.height]
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def _digit_logprobs(value: float) -> np.ndarray:
    """Log-probabilities of the 256 tokens: the two digits around 5 * value, and a little for every capital letter."""
    probabilities = np.zeros(256)
    probabilities[ord("A") : ord("Z") + 1] = (1 - _DIGIT_MASS) / 26
    digits = np.zeros(6)
    low = min(int(5 * value), 4)
    digits[low + 1] = 5 * value - low
    digits[low] = 1 - digits[low + 1]
    probabilities[ord("0") : ord("6")] = _DIGIT_MASS * digits
    with np.errstate(divide="ignore"):
        return np.log(np.roll(probabilities, -_FIRST))


def _certain(token_id: int) -> np.ndarray:
    logprobs = np.full(256, -np.inf)
    logprobs[token_id] = 0.0
    return logprobs


def _candidates(logprobs: np.ndarray, chosen: int, sampling: Sampling) -> tuple[tuple[int, float], ...]:
    if sampling.top_logprobs is None:
        return ()
    ids = list(np.argsort(-logprobs, kind="stable")[: sampling.top_logprobs])
    if sampling.token_ids:
        ids = list(dict.fromkeys((chosen, *sampling.token_ids)))
    return tuple((int(number), float(logprobs[number])) for number in ids)


def _last_text(messages: Sequence[Message]) -> str:
    texts = [text for message in messages for text in message.texts]
    return texts[-1] if texts else ""


def _small(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float64)
