"""What the tests of the judge "vlm" share: edits, a judge in a hurry, servers."""

import json
from pathlib import Path

import numpy as np

from cocoedit_jax.rewards.judge import JudgeRequest
from cocoedit_jax.rewards.vlm_judge import VlmJudge
from tests.rewards.fake_judge import FakeJudge

REPLIES = Path(__file__).parent / "replies"


def requests(count: int = 12, size: int = 8, seed: int = 0, **fields) -> list[JudgeRequest]:
    """Edits of one group for every four."""
    rng = np.random.default_rng(seed)
    sources = rng.random((-(-count // 4), size, size, 3)).astype(np.float32)
    edited = rng.random((count, size, size, 3)).astype(np.float32)
    return [
        JudgeRequest(sources[n // 4], edited[n], f"do {n // 4}", f"r{seed}-{n // 4}", **fields) for n in range(count)
    ]


def new_judge(*urls: str, **options) -> VlmJudge:
    """To be closed by the caller; tests take the fixture ``judge`` instead."""
    fast = {
        "timeout_s": 0.5, "connect_timeout_s": 0.5, "step_deadline_s": 8.0, "start_deadline_s": 1.5,
        "backoff_s": (0.01, 0.03), "breaker": (6, 0.05), "canary_margin": -1.0,
    }  # fmt: skip
    return VlmJudge(list(urls), **(fast | options))


def scores(answers) -> list[float | None]:
    return [answer.score for answer in answers]


class Fixed(FakeJudge):
    """Always the same reply, for whatever model is asked."""

    def __init__(self, raw: bytes):
        super().__init__()
        self.models = [json.loads(raw)["model"]]
        self.reply = lambda body: json.loads(raw)
