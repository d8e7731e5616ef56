"""From the candidates for one token to a score: the expected digit, and how much of the probability lies on digits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cocoedit_jax.rewards.chat_protocol import TokenLogprob

TOP_DIGIT = 5
MIN_CANDIDATES = TOP_DIGIT + 1
# Byte-level BPE and SentencePiece write a leading space into the token in these ways.
_SPACES = (" ", "\u0120", "\u2581")


@dataclass(frozen=True)
class DigitScore:
    """``score`` in [0, 1]: expected digit over 5, digits renormalised, NaN without any; ``mass``: probability of the
    digits 0 to 5 before that, 0 with too few candidates; ``entropy`` of the renormalised digits, in nats.
    """

    score: float
    mass: float
    entropy: float


def digit_of(candidate: TokenLogprob) -> int | None:
    """The digit 0 to 5 that a token writes, a leading space allowed; None for any other token."""
    text = candidate.token
    if candidate.raw is not None:
        try:
            text = candidate.raw.decode("utf-8")
        except UnicodeDecodeError:
            return None
    if len(text) == 2 and text[0] in _SPACES:
        text = text[1]
    return ord(text) - ord("0") if len(text) == 1 and "0" <= text <= str(TOP_DIGIT) else None


def digit_score(candidates: Sequence[TokenLogprob]) -> DigitScore:
    """The score that the candidates for the answer's only token give: ``s = sum(i p_i) / sum(p_i) / 5``.

    Fewer than ``MIN_CANDIDATES`` give none: the expectation would be the sampled digit itself. vLLM sends so few when
    another client's request in the same batch has ``logprob_token_ids`` and this one has not.
    """
    p = [0.0] * (TOP_DIGIT + 1)
    known = dict.fromkeys(candidates)  # some servers list the sampled token twice
    for candidate in known if len(known) >= MIN_CANDIDATES else ():
        digit = digit_of(candidate)
        if digit is not None:
            p[digit] += math.exp(candidate.logprob)
    mass = math.fsum(p)
    if mass <= 0.0:
        return DigitScore(math.nan, 0.0, 0.0)
    shares = [value / mass for value in p]
    score = math.fsum(i * share for i, share in enumerate(shares)) / TOP_DIGIT
    entropy = -math.fsum(share * math.log(share) for share in shares if share > 0.0)
    return DigitScore(min(max(score, 0.0), 1.0), min(mass, 1.0), max(entropy, 0.0))


def top_tokens(candidates: Sequence[TokenLogprob], count: int = 5) -> str:
    """The likeliest candidates, for a log."""
    likeliest = sorted(candidates, key=lambda candidate: -candidate.logprob)[:count]
    return ", ".join(f"{candidate.token!r} {math.exp(candidate.logprob):.3f}" for candidate in likeliest)
