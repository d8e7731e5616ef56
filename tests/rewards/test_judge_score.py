"""From a reply to a score: replies in the shapes of vLLM's and transformers serve's, and the arithmetic."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from openai.types.chat import ChatCompletion
from openai.types.model import Model
from openai.types.shared import ErrorObject

from cocoedit_jax.errors import UserError
from cocoedit_jax.rewards.chat_protocol import Garbled, TokenLogprob, explain_status, parse_completion
from cocoedit_jax.rewards.judge_prompt import COMBINE, load_prompt, prompt_names
from cocoedit_jax.rewards.judge_score import digit_of, digit_score, top_tokens

REPLIES = Path(__file__).parent / "replies"


def candidates(name: str) -> tuple[TokenLogprob, ...]:
    found = parse_completion((REPLIES / name).read_bytes())
    assert found["text"] and found["finish_reason"] == "length"
    return found["logprobs"][0]


def test_a_reply_of_vllm():
    logprobs = {"0": -7.6669921875, "1": -6.9169921875, "2": -4.1669921875, "3": -1.4169921875, "4": -0.4169921875}
    p = np.exp([*logprobs.values(), -2.5419921875])
    found = digit_score(candidates("vllm_top20.json"))
    assert found.mass == pytest.approx(p.sum(), abs=1e-12) and 0.98 < found.mass < 1
    assert found.score == pytest.approx((p * np.arange(6)).sum() / p.sum() / 5, abs=1e-12)
    q = p / p.sum()
    assert found.entropy == pytest.approx(-(q * np.log(q)).sum(), abs=1e-12)
    # Asked for exactly the digits, vLLM sends just these: the same score.
    assert digit_score(candidates("vllm_token_ids.json")) == found


def test_leading_spaces_count_as_the_digit():
    found = candidates("vllm_leading_space.json")
    pairs = {d: [math.exp(c.logprob) for c in found if c.token in (str(d), f" {d}")] for d in range(6)}
    assert all(len(pair) == 2 for pair in pairs.values())
    mass = sum(map(sum, pairs.values()))
    assert digit_score(found).score == pytest.approx(sum(d * sum(p) for d, p in pairs.items()) / mass / 5, abs=1e-12)
    assert digit_score(found).mass == pytest.approx(mass, abs=1e-12)


def test_the_sampled_digit_alone_is_no_distribution():
    """vLLM replaces the candidates of a whole batch when one of its requests has logprob_token_ids."""
    found = candidates("vllm_mixed_batch.json")
    assert [c.token for c in found] == ["4", "!"] and math.exp(found[0].logprob) > 0.6
    for few in (found, [TokenLogprob(str(d), math.log(0.19)) for d in range(5)], [TokenLogprob("4", -0.1)] * 20):
        assert math.isnan(digit_score(few).score) and digit_score(few).mass == 0.0
    assert digit_score(candidates("vllm_token_ids.json")).mass > 0.98  # six are enough


@pytest.mark.parametrize("path", sorted(REPLIES.glob("*.json")), ids=lambda path: path.stem)
def test_replies_are_those_of_the_protocol(path):
    """The files under replies/ are valid for OpenAI's own types. vLLM's were written by the serving code of 0.33.0."""
    reply = json.loads(path.read_text())
    if "choices" in reply:
        ChatCompletion.model_validate(reply, strict=True)
    elif "data" in reply:
        assert [Model.model_validate(entry, strict=True).id for entry in reply["data"]] == ["judge"]
    else:
        assert ErrorObject.model_validate(reply["error"] | {"code": str(reply["error"]["code"])}, strict=True).message


def test_little_mass_is_seen_and_the_likeliest_tokens_told():
    found = digit_score(candidates("vllm_low_mass.json"))
    assert found.mass < 0.1
    told = top_tokens(candidates("vllm_low_mass.json"))
    assert told.startswith("'The' 0.724, 'Image' 0.126") and told.count(",") == 4


def test_missing_logprobs_are_missing():
    found = parse_completion((REPLIES / "transformers_serve.json").read_bytes())
    assert found["logprobs"] is None and found["text"] == "4"


@pytest.mark.parametrize(
    ("token", "raw", "digit"),
    [
        ("3", None, 3), (" 3", None, 3), ("\u01203", None, 3), ("\u25813", None, 3), ("3", b" 3", 3), ("?", b"5", 5),
        ("6", None, None), ("10", None, None), ("  3", None, None), ("3.", None, None), ("\uff13", None, None),
        ("\u0663", None, None), ("", None, None), ("3", b"\xff", None), ("token_id:18", None, None),
    ],
)  # fmt: skip
def test_which_tokens_are_digits(token, raw, digit):
    assert digit_of(TokenLogprob(token, -1.0, raw)) == digit


def test_extremes():
    others = [TokenLogprob(letter, -9999.0) for letter in "ABCDE"]
    certain = digit_score([TokenLogprob("5", 0.0), TokenLogprob("5", 0.0), *others])  # listed twice
    assert (certain.score, certain.mass, certain.entropy) == (1.0, 1.0, 0.0)
    twice = digit_score([TokenLogprob(d, math.log(0.5)) for d in "550"] + others)
    assert twice.score == pytest.approx(0.5) and twice.mass == pytest.approx(1.0)
    even = digit_score([TokenLogprob(str(d), math.log(1 / 6)) for d in range(6)])
    assert even.score == pytest.approx(0.5) and even.entropy == pytest.approx(math.log(6))
    nothing = digit_score([TokenLogprob("no", 0.0), TokenLogprob("3", -9999.0), *others])
    assert math.isnan(nothing.score) and nothing.mass == 0.0


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["logprobs"]["content"][0]["top_logprobs"][3].update(logprob=None),
        lambda c: c["logprobs"]["content"][0]["top_logprobs"][3].update(logprob=2.0),
        lambda c: c["logprobs"]["content"][0]["top_logprobs"][3].pop("token"),
        lambda c: c["logprobs"]["content"][0].update(top_logprobs=[7]),
        lambda c: c["logprobs"]["content"][0]["top_logprobs"][3].update(logprob=-(10**400)),
        lambda c: c["logprobs"]["content"][0]["top_logprobs"][3].update(logprob=True),
        lambda c: c["logprobs"]["content"][0]["top_logprobs"][0].update(bytes=[300]),
        lambda c: c["logprobs"]["content"][0]["top_logprobs"][0].update(bytes=10**9),
        lambda c: c["logprobs"].update(content=5),
        lambda c: c.update(message=None),
        lambda c: c["message"].update(content=["4"]),
    ],
)
def test_malformed_replies_are_garbled(change):
    reply = json.loads((REPLIES / "vllm_top20.json").read_text())
    change(reply["choices"][0])
    with pytest.raises(Garbled):
        parse_completion(json.dumps(reply).encode())


@pytest.mark.parametrize("raw", [b"", b"null", b"[]", b"{}", b'{"choices": NaN}', b"[" * 100_000, b"\xff\xfe"])
def test_what_is_no_reply_is_garbled(raw):
    with pytest.raises(Garbled):
        parse_completion(raw)


def test_whatever_a_server_sends_is_a_reply_or_garbled():
    """Replies and refusals with parts put in each other's place."""
    rng = random.Random(0)
    originals = [json.loads(path.read_text()) for path in sorted(REPLIES.glob("*.json"))]
    originals.append({"detail": [{"loc": ["body", "x"], "msg": "no", "type": "t"}]})
    odd = [
        "null",
        "true",
        "-1",
        "1" + "0" * 400,
        "1.5",
        '""',
        '"x"',
        '"\\ud800"',
        "[]",
        "[1]",
        "{}",
        '{"a": null}',
        "[[]]",
    ]

    def places(node):
        yield node
        for child in node.values() if isinstance(node, dict) else node:
            if isinstance(child, dict | list):
                yield from places(child)

    for _ in range(3000):
        body = json.loads(json.dumps(rng.choice(originals)))
        for _ in range(rng.choice([1, 1, 2])):
            node = rng.choice([node for node in places(body) if node])
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            node[key] = json.loads(rng.choice(odd))
        raw = json.dumps(body).encode()
        assert explain_status(400, raw).startswith("status 400, ")
        try:
            found = parse_completion(raw)
        except Garbled:
            continue
        for place in found["logprobs"] or ():
            assert math.isnan(digit_score(place).score) or 0.0 <= digit_score(place).score <= 1.0


# --- prompts --------------------------------------------------------------------------------------------------------


def test_prompts_of_the_package():
    assert prompt_names() == ["cocoedit", "edit_r1", "two_question"]
    prompts = {name: load_prompt(name) for name in prompt_names()}
    assert prompts["edit_r1"].fields == ("requirement",) and not prompts["cocoedit"].fields
    assert list(prompts["two_question"].questions) == ["success", "over_editing"]
    assert len({prompt.digest for prompt in prompts.values()}) == 3
    for prompt in prompts.values():
        for question in prompt.questions:
            text = prompt.ask(question, "swap {braces} $x", {"requirement": "a {instruction}"})
            assert "swap {braces} $x" in text and text.endswith("one digit from 0 to 5 and nothing else.")
    assert "a {instruction}" in prompts["edit_r1"].ask("score", "go", {"requirement": "a {instruction}"})
    assert "'requirement' is None" in (prompts["edit_r1"].fault({}) or "")
    with pytest.raises(ValueError, match="requirement"):
        prompts["edit_r1"].ask("score", "go", {})


def test_parts_are_named_and_the_source_comes_first():
    (message,) = load_prompt("cocoedit").messages(b"one", b"two", "question", "png")
    assert message["role"] == "user"
    kinds = [part["type"] for part in message["content"]]
    assert kinds == ["text", "image_url", "text", "image_url", "text"]
    assert message["content"][1]["image_url"]["url"] == "data:image/png;base64,b25l"
    assert message["content"][3]["image_url"]["url"] == "data:image/png;base64,dHdv"


def test_how_questions_are_combined():
    scores = [0.25, 1.0]
    found = {name: combine(scores) for name, combine in COMBINE.items()}
    assert found == pytest.approx({"min": 0.25, "mean": 0.625, "product": 0.25, "geometric": 0.5})


def test_own_prompts_and_their_faults(tmp_path):
    file = tmp_path / "mine.json"
    good = {"before": "A", "after": "B", "questions": {"q": "Was {instruction} done?"}, "combine": "mean"}
    file.write_text(json.dumps(good))
    assert load_prompt(str(file)).ask("q", "it", {}) == "Was it done?"
    file.write_text(json.dumps(good | {"before": "", "combine": "max", "questions": {"q": "?"}}))
    with pytest.raises(UserError) as error:
        load_prompt(str(file))
    for said in ("'before' is ''", "'combine' is 'max'", "'q' has no {instruction}"):
        assert said in str(error.value)
    for name in ("gpt", "../cocoedit", "no/such.json"):
        with pytest.raises(UserError, match="expected one of cocoedit, edit_r1, two_question"):
            load_prompt(name)
