"""Is a server fit to judge? What it can do, asked once; and pictures whose scores are known, asked again and again."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from cocoedit_jax.data.scene_render import render
from cocoedit_jax.data.scene_spec import COLORS, SceneObject, SceneSpec
from cocoedit_jax.errors import UserError
from cocoedit_jax.rewards.chat import ChatClient, ChatReply, ChatRequest, Failure
from cocoedit_jax.rewards.judge_score import digit_of, top_tokens

CANARY_SIZE = 224  # pixels, a multiple of the 28 of a Qwen2.5-VL cell
_RECOLORED = (("circle", "red", "blue"), ("square", "blue", "green"), ("star", "yellow", "red"))
# The digits 0 to 5 in the tokenizers of Qwen2, Qwen2.5 and Qwen3, which write no other token with a digit.
QWEN_DIGITS = tuple(range(15, 21))

_START = (
    "start one with python -m launch.serve_judge --model=MODEL, or vllm serve MODEL "
    "--limit-mm-per-prompt '{\"image\": 2}', and name its address in endpoints"
)
# What a server's message holds -> what to change.
_HINTS = (
    ("unauthorized", "name the server's API key with key_env or key_file"),
    ("forbidden", "name an API key that the server accepts with key_env or key_file"),
    ("not_found", "endpoints takes base URLs such as http://host:8000/v1, and model one of /v1/models"),
    ("too_large", "raise the server's limit on request bytes, or choose image_format=jpeg"),
    ("max_logprobs", "start the server with --max-logprobs 20"),
    ("logprobs", "start the server with --max-logprobs 20"),
    ("length", "raise the server's context length (vllm: --max-model-len)"),  # vLLM speaks of images there, too
    ("image", "the model must take two images: vllm serve needs --limit-mm-per-prompt '{\"image\": 2}'"),
)


@functools.cache
def canary_pairs() -> tuple[tuple[str, tuple[np.ndarray, np.ndarray, str]], ...]:
    """Edits whose order is known, as ``(kind, (before, after, instruction))``; images float32 ``[s, s, 3]`` in [0, 1].

    ``good`` follows the instruction, ``bad`` changes nothing, ``swapped`` is the good one backwards.
    """
    pairs = []
    for cell, (shape, old, new) in enumerate(_RECOLORED):
        item = SceneObject(shape, old, cell, 0.25 + 0.5 * (cell % 2), 0.25 + 0.5 * (cell // 2), 0.18, COLORS[old])
        result = dataclasses.replace(item, color=new, rgb=COLORS[new])
        # Only the wanted colour is named, so that the instruction cannot be met by both orders.
        instruction = f"Make the {shape} {new}."
        spec = SceneSpec((0.6, 0.6, 0.6), cell, (item,), "recolor", 0, result, instruction)
        before, after, _ = render(spec, CANARY_SIZE)
        pairs += [("good", (before, after, instruction)), ("bad", (before, before, instruction))]
        pairs.append(("swapped", (after, before, instruction)))
    return tuple(pairs)


def hint(failure: Failure) -> str:
    """What to change after a failure, or an empty string."""
    said = f"{failure.reason} {failure.message}".lower()
    return next((f"; {advice}" for word, advice in _HINTS if word in said), "")


def choose_model(client: ChatClient, wanted: str, deadline_s: float) -> str:
    """The model to ask for: ``wanted``, or the only one that the servers have.

    Raises:
        UserError: an endpoint does not answer or does not serve it.
    """
    problems, names = [], []
    for url, found in client.models(deadline_s).items():
        if isinstance(found, Failure):
            advice = hint(found) if found.fatal else f"; if no server runs there, {_START}"
            problems.append(f"{found.message}{advice}")
        elif wanted and wanted not in found:
            problems.append(f"{url} serves {', '.join(found) or 'no model'}; expected {wanted} (option model)")
        elif not wanted and len(found) != 1:
            problems.append(f"{url} serves {', '.join(found) or 'no model'}; name one of them as model")
        else:
            names.append(wanted or found[0])
    if len(set(names)) > 1:
        problems.append(f"the endpoints serve different models: {', '.join(sorted(set(names)))}; expected one")
    if problems:
        raise UserError("\n".join(f"judge 'vlm': {problem}" for problem in problems))
    return names[0]


def probe_logprobs(client: ChatClient, messages: Sequence[dict], deadline_s: float) -> None:
    """Asks every endpoint one question.

    Raises:
        UserError: an endpoint does not answer it with the log-probabilities of single digits.
    """
    requests = [ChatRequest(messages, logprobs=True, endpoint=url) for url in client.endpoints]
    problems = [problem for reply in client.complete_all(requests, deadline_s) if (problem := _problem(reply))]
    if problems:
        raise UserError("\n".join(f"judge 'vlm': {problem}" for problem in problems))


def _problem(reply: ChatReply) -> str | None:
    if reply.failure is not None:
        return f"{reply.failure.message}{hint(reply.failure)}"
    if reply.logprobs is None:
        return (
            f"{reply.endpoint} ignores logprobs (transformers serve does this), so there is nothing to take a score "
            f"from; {_START}"
        )
    candidates = reply.logprobs[0]
    if any(candidate.token.startswith("token_id:") for candidate in candidates):
        return f"{reply.endpoint} writes tokens as numbers; start it without --return-tokens-as-token-ids"
    if len(candidates) < 6:
        return f"{reply.endpoint} gives {len(candidates)} candidates where 20 were asked for; raise its --max-logprobs"
    if not any(digit_of(candidate) is not None for candidate in candidates):
        return (
            f"{reply.endpoint} answers with no digit among its likeliest tokens ({top_tokens(candidates)}); expected "
            "an instruction-tuned vision-language model whose tokenizer writes a digit as one token, and that answers "
            "without thinking first (vllm: --default-chat-template-kwargs '{\"enable_thinking\": false}')"
        )
    return None


def supports_token_ids(client: ChatClient, messages: Sequence[dict], digits: Sequence[int], deadline_s: float) -> bool:
    """Whether every endpoint gives the log-probabilities of exactly the tokens it is asked for (newer vLLM), and
    ``digits`` are the ids of 0 to 5. Without that, digits beyond the likeliest 20 tokens are not seen.
    """
    extra = {"logprob_token_ids": list(digits)}
    requests = [ChatRequest(messages, logprobs=True, endpoint=url, extra=extra) for url in client.endpoints]
    for reply in client.complete_all(requests, deadline_s):
        if reply.failure is not None or reply.logprobs is None:
            return False
        candidates = reply.logprobs[0]
        # The sampled token comes along; a server that does not know the field gives its likeliest 20.
        if len(candidates) > len(digits) + 1 or {digit_of(c) for c in candidates} - {None} != set(range(6)):
            return False
    return True
