"""The stages on replies as a model gives them."""

import json
import math
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cocoedit_jax.annotation import stages
from cocoedit_jax.annotation.filter import choose
from cocoedit_jax.annotation.prompts import load_prompts
from cocoedit_jax.annotation.reasons import DEAD, REJECTED
from cocoedit_jax.annotation.record import Annotation, Item, read_annotations, to_line
from cocoedit_jax.annotation.settings import check
from cocoedit_jax.annotation.stages import Shown, ask, take
from cocoedit_jax.annotation.work import Worker
from cocoedit_jax.errors import UserError
from cocoedit_jax.rewards.chat import ChatReply, TokenLogprob
from tests.annotation.conftest import blob


def says(text, **by_question):
    return {name: ChatReply(name, text) for name in by_question or {"type": 0, "box": 0, "rewrite": 0}}


def start(kind=None, prompt="make the cup red"):
    return replace(Annotation(Item("a", "a.png", prompt, kind)), size=(560, 280), stage="load")


def test_kinds_of_edit(rules):
    (request,) = ask("classify", start(), None, rules).values()
    text = request.messages[0]["content"][0]["text"]
    assert "make the cup red" in text and all(f"- {kind}" in text for kind in ("motion", "style"))
    after = take("classify", start(), says("Color."), rules)
    assert (after.edit_type, after.stage, after.status) == ("color", "classify", "pending")
    after = take("classify", start(), says("**background**"), rules)
    assert (after.status, after.reason, after.edit_type) == ("rejected", "global_edit", "background")
    for answer in ("color or material", "", "hmm"):
        after = take("classify", start(), says(answer), rules)
        assert (after.status, after.reason) == ("dead", "unparsed_reply") and repr(answer) in after.detail
    # A kind that the data set states is not asked for; its words become ours.
    for given, kind in (("Object Swap", "replace"), ("action", "motion"), ("text", "text")):
        assert ask("classify", start(given), None, rules) == {}
        after = take("classify", start(given), {}, rules)
        assert after.edit_type == kind and after.attributes.get("given_type", kind) == (
            given if given != kind else kind
        )
    assert take("classify", start("style_transfer"), {}, rules).reason == "global_edit"
    assert list(ask("classify", start("unheard of"), None, rules)) == ["type"]


def test_boxes_come_back_in_pixels_of_the_picture(rules, settings):
    small = replace(settings, models=replace(settings.models, max_pixels=280 * 140))
    image = Shown(Image.new("RGB", (560, 280)))
    for convention, scale in (("pixels", 1.0), ("relative-1000", None)):
        chosen = replace(rules, settings=small, convention=convention)
        state = replace(start("color"), stage="classify")
        (request,) = ask("box", state, image, chosen).values()
        url = request.messages[0]["content"][0]["image_url"]["url"]
        assert url.startswith("data:image/jpeg;base64,")
        sent = (280, 140)  # what 560 x 280 becomes with at most 280 * 140 pixels and cells of 28
        numbers = [70, 35, 210, 105] if scale else [250, 250, 750, 750]
        after = take("box", state, says(json.dumps([{"bbox_2d": numbers, "label": "cup"}])), chosen)
        assert after.box == (140, 70, 420, 210) and after.stage == "box" and after.attributes["labels"] == ["cup"]
        assert sent == stages._sent_size(state, chosen)


def test_several_boxes_none_and_bad_ones(rules):
    state = replace(start("remove"), stage="classify")
    two = [{"bbox_2d": [0, 0, 56, 56]}, {"bbox_2d": [100, 28, 300, 200]}, {"bbox_2d": [5, 5, 6, 6]}]
    after = take("box", state, says(json.dumps(two)), rules)
    assert after.box == (0, 0, 300, 200), "around both; the third is too small"
    assert after.attributes["boxes"] == [[100, 28, 300, 200], [0, 0, 56, 56]]
    assert take("box", state, says("[]"), rules).reason == "no_target"
    after = take("box", state, says("[700, 0, 900, 50]"), rules)
    assert (after.status, after.reason) == ("dead", "bad_box") and "pixels" in after.detail
    assert take("box", state, says("over there"), rules).reason == "unparsed_reply"
    add = replace(state, item=replace(state.item, edit_type="add"))
    texts = [next(iter(ask("box", s, Shown(Image.new("RGB", (560, 280))), rules).values())) for s in (state, add)]
    texts = [request.messages[0]["content"][1]["text"] for request in texts]
    assert "will add something" in texts[1] and "will add something" not in texts[0]


def boxed(kind, *entries):
    entries = entries or ([200, 100, 300, 200],)
    box = (200.0, 100.0, 300.0, 200.0)
    return replace(start(kind), box=box, attributes={"boxes": [list(e) for e in entries]}, stage="box")


def test_masks_grow_by_kind(settings):
    image = Image.new("RGB", (560, 280))
    disk = lambda image, box: blob((280, 560), (150, 250), 40)  # noqa: E731
    areas = {}
    for kind in ("color", "replace", "motion", "add"):
        after, mask = stages.segment(boxed(kind), image, disk, settings)
        assert (
            mask is not None
            and after.stage == "mask"
            and after.mask_area == mask.mean() == after.attributes["measures"]["area"]
        )
        areas[kind] = mask.sum()
    # Radii: shares of the shorter side, 280 px.
    for kind, share in (("color", 0.01), ("replace", 0.03), ("motion", 0.06)):
        assert areas[kind] == pytest.approx(math.pi * (40 + share * 280) ** 2, rel=0.03)
    # What will be added is not there yet: its region is the box, grown by 5.6 px, with round corners.
    assert areas["add"] == pytest.approx(100**2 + 4 * 100 * 5.6 + math.pi * 5.6**2, rel=0.03)


def test_masks_of_several_boxes_and_faults(settings):
    image = Image.new("RGB", (560, 280))
    box = stages.segment(boxed("color", [0, 0, 50, 50], [200, 100, 300, 200]), image, _fill, settings)
    assert box[0].attributes["measures"]["components"] == 2
    after, mask = stages.segment(boxed("color"), image, lambda image, box: np.zeros((280, 560), bool), settings)
    assert after.reason == "empty_mask" and after.status == "rejected" and mask is None
    after, mask = stages.segment(boxed("color"), image, lambda image, box: np.zeros((10, 10), bool), settings)
    assert after.reason == "segmenter_failed" and "(10, 10)" in after.detail

    def broken(image, box):
        raise RuntimeError("CUDA out of memory")

    after, mask = stages.segment(boxed("color"), image, broken, settings)
    assert (after.status, after.reason) == ("dead", "segmenter_failed") and "out of memory" in after.detail


def _fill(image, box):
    from cocoedit_jax.annotation.mask_ops import box_mask

    return box_mask(box, image.size)


def test_the_rewritten_instruction(rules):
    state = replace(boxed("color"), stage="mask", mask_file="masks/a.png")
    shown = Shown(Image.new("RGB", (560, 280)), blob((280, 560), (150, 250), 40))
    (request,) = ask("rewrite", state, shown, rules).values()
    kinds = [part["type"] for part in request.messages[0]["content"]]
    assert kinds == ["image_url", "image_url", "text"] and request.affinity == "a"
    pictures = [part["image_url"]["url"] for part in request.messages[0]["content"][:2]]
    assert pictures[0] != pictures[1], "the second has the region marked"
    said = {"target": "cup", "location": "on the left", "attributes": "blue", "instruction": "Make the\n blue cup red."}
    after = take("rewrite", state, says(f"Here: {json.dumps(said)}"), rules)
    assert after.refined_prompt == "Make the blue cup red." and after.stage == "rewrite"
    assert (after.attributes["target"], after.attributes["location"]) == ("cup", "on the left")
    for answer in ("{}", '{"instruction": " "}', "Make it red", json.dumps({"instruction": "word " * 61})):
        assert take("rewrite", state, says(answer), rules).reason == "unparsed_reply"
    assert stages.final_prompt(after, True) == "Make the blue cup red."
    assert stages.final_prompt(after, False) == "make the cup red"


HALF = "\\ud83d"  # of a surrogate pair, as JSON may hold it


@pytest.mark.parametrize(
    "stage, answer",
    [
        ("box", f'[{{"bbox_2d": [200, 100, 300, 200], "label": "cup {HALF}"}}]'),
        ("box", f"[{'9' * 400}, 0, 10, 10]"),
        ("box", "[" * 100_000),
        ("rewrite", f'{{"instruction": "make it red {HALF}"}}'),
        ("rewrite", f'{{"instruction": "make it red", "target": "{HALF}"}}'),
    ],
)
def test_an_answer_that_cannot_be_kept_is_a_dead_letter(rules, stage, answer):
    before = {"box": replace(start("color"), stage="classify"), "rewrite": replace(boxed("color"), stage="mask")}
    after = take(stage, before[stage], says(answer), rules)
    assert (after.status, after.reason) == ("dead", "unparsed_reply") and answer[:20] in after.detail
    to_line(after).encode()


def test_an_answer_that_was_cut_off_is_none(rules):
    """Also where what came is whole for itself."""
    for stage, before, answer in (
        ("box", replace(start("color"), stage="classify"), '{"bbox_2d": [200, 100, 300, 200]}'),
        ("rewrite", replace(boxed("color"), stage="mask"), '{"instruction": "make it red"}'),
    ):
        assert take(stage, before, {stage: ChatReply("r", answer, None, "stop")}, rules).stage == stage
        after = take(stage, before, {stage: ChatReply("r", answer, None, "length")}, rules)
        assert (after.status, after.reason) == ("dead", "unparsed_reply")
        assert f"cut off after config.{stage}.max_tokens=" in after.detail


def digits(**p):
    others = (TokenLogprob(letter, -9999.0) for letter in "ABCDE")
    return ((*(TokenLogprob(token.removeprefix("d"), math.log(q)) for token, q in p.items()), *others),)


def test_scores_are_expectations_over_digits(rules):
    state = replace(boxed("color"), stage="rewrite", mask_file="m", refined_prompt="Make the blue cup red.")
    requests = ask("score", state, Shown(Image.new("RGB", (560, 280)), blob((280, 560))), rules)
    assert list(requests) == ["clarity", "mask_accuracy", "prominence"]
    assert all(r.logprobs and r.max_tokens == 1 and r.temperature == 0 for r in requests.values())
    assert [len(r.messages[0]["content"]) for r in requests.values()] == [2, 3, 3], "clarity is not shown the region"
    assert all("Make the blue cup red." in r.messages[0]["content"][-1]["text"] for r in requests.values())
    replies = {
        "clarity": ChatReply("c", "5", digits(d5=0.6, d4=0.2, x=0.2)),
        "mask_accuracy": ChatReply("m", "The", digits(The=0.7, d3=0.3)),
        "prominence": ChatReply("p", "2", None),
    }
    alone = replies | {"clarity": ChatReply("c", "5", ((TokenLogprob("5", -0.1), TokenLogprob("!", -9999.0)),))}
    assert take("score", state, alone, rules).scores["clarity"] is None, "the sampled digit alone is no distribution"
    after = take("score", state, replies, rules)
    assert after.scores["clarity"] == pytest.approx((5 * 0.6 + 4 * 0.2) / 0.8 / 5)
    assert after.scores["mask_accuracy"] is None, "less than half of the probability is on digits"
    assert after.scores["prominence"] is None, "no log-probabilities"
    assert after.attributes["digit_mass"]["mask_accuracy"] == pytest.approx(0.3)


def test_filter(finished, settings):
    rules = settings.filter
    assert choose(finished, rules).status == "kept"
    cases = {
        "clarity": {"scores": {**finished.scores, "clarity": 0.69}},
        "prominence": {"scores": {**finished.scores, "prominence": 0.4}},
        "area": {"measures": {"area": 0.7}},
        "crop": {"measures": {"crop_area": 0.001}},
        "components": {"measures": {"components": 9}},
        "box_mismatch": {"measures": {"box_iou": 0.3}},
        "border": {"measures": {"border": 0.6}},
    }
    for reason, change in cases.items():
        measures = {**finished.attributes["measures"], **change.pop("measures", {})}
        after = choose(replace(finished, attributes={"measures": measures}, **change), rules)
        assert (after.status, after.reason) == ("rejected", reason) and after.detail.startswith(reason)
    missing = replace(finished, scores={**finished.scores, "mask_accuracy": None})
    assert (choose(missing, rules).status, choose(missing, rules).reason) == ("dead", "no_score")
    assert choose(missing, replace(rules, min_mask_accuracy=None)).status == "kept"
    dead = finished.dead("bad_box", "x")
    assert choose(dead, rules) is dead


def test_annotations_as_json(finished, tmp_path):
    path = tmp_path / "a.jsonl"
    odd = replace(finished, item=Item("ü\u2028", "b.png", "é", extra={"scene": {"a": [1]}}), detail="line\nbreak")
    path.write_text(to_line(finished) + to_line(odd), encoding="utf-8")
    assert list(read_annotations(path)) == [finished, odd]
    for line, message in (
        ("[]", "expected a JSON object"),
        ('{"id": "a", "image": "b"}', "field 'prompt' is None"),
        ('{"id": "a", "image": "b", "prompt": "c", "colour": 1}', "unknown fields colour"),
        ('{"id": "a", "image": "b", "prompt": "c", "box": [1]}', "expected 4 numbers"),
        ('{"id": "a", "image": "b", "prompt": "c", "status": "fine"}', "status 'fine'"),
    ):
        path.write_text(to_line(finished) + line + "\n")
        with pytest.raises(UserError, match=f"line 2: .*{message}"):
            list(read_annotations(path))


def test_settings_are_checked_together(config):
    config.models.max_pixels = 10
    config.filter.min_clarity = 1.5
    config.filter.min_prominence = None
    config.filter.min_area = 0.9
    config.mask.dilate = {"other": 0.1, "style": 0.1}
    config.box.convention = "percent"
    config.engine.images = "move"
    with pytest.raises(UserError) as error:
        check(config.to_dict())
    assert "models.max_pixels=10" in str(
        error.value
    ) and "min_clarity=1.5; expected a number from 0 to 1, or None" in str(error.value)
    config.models.max_pixels, config.filter.min_clarity = 10000, 0.5
    with pytest.raises(UserError) as error:
        check(config.to_dict())
    for part in ("mask.dilate.style", "box.convention='percent'", "engine.images='move'", "min_area and max_area"):
        assert part in str(error.value)


def test_prompts_can_be_replaced(tmp_path):
    (tmp_path / "clarity.txt").write_text("How clear is $instruction, for $$5?")
    prompts = load_prompts(str(tmp_path))
    assert prompts.fill("clarity", instruction="it", edit_type="color") == "How clear is it, for $5?"
    assert prompts.hashes()["clarity"] != load_prompts().hashes()["clarity"]
    assert prompts.hashes()["box"] == load_prompts().hashes()["box"]
    for name, text in (("clarity", "$colour"), ("clarity", "$"), ("clarity", " "), ("clearness", "x")):
        (tmp_path / f"{name}.txt").write_text(text)
        with pytest.raises(UserError, match=f"{name}.txt"):
            load_prompts(str(tmp_path))
        (tmp_path / f"{name}.txt").unlink()
    with pytest.raises(UserError, match="no folder"):
        load_prompts(str(tmp_path / "none"))


def test_a_picture_too_large_to_decode(rules, tmp_path):
    path = tmp_path / "a.png"
    Image.new("1", (12000, 10000)).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        Worker(None, rules)
        after = stages.load(Annotation(Item("a", str(path), "make it red")))
    assert (after.status, after.reason) == ("dead", "unreadable_image") and "decompression bomb" in after.detail


def test_every_reason_is_explained():
    code = "".join(path.read_text() for path in Path(stages.__file__).parent.glob("*.py"))
    for call, known in (("dead", DEAD), ("rejected", REJECTED)):
        used = set(re.findall(rf'\.{call}\(\s*"(\w+)"', code))
        assert used and used <= set(known)
    found = set(re.findall(r'within\("(\w+)"', code)) | {"clarity", "mask_accuracy", "prominence"}
    assert len(found) == 8 and found <= set(REJECTED)
