"""The stages, as functions from an annotation to one that is a stage further.

load -> classify -> box -> mask -> rewrite -> score; the filter comes after them, see filter.py. A stage that asks a
model is two functions: `ask` gives its requests by question, `take` makes the next annotation of the replies. Nothing
here sends, reads or writes, so that a live server, a batch file and a test take the same way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cocoedit_jax.annotation import boxes, mask_ops, pictures
from cocoedit_jax.annotation.prompts import Prompts
from cocoedit_jax.annotation.record import SCORE_NAMES, Annotation, to_line
from cocoedit_jax.annotation.segmenters import Segmenter
from cocoedit_jax.annotation.settings import Settings
from cocoedit_jax.data.duplicates import Fingerprint, fingerprint
from cocoedit_jax.data.images import DataFault, load_image
from cocoedit_jax.rewards.chat import ChatReply, ChatRequest, image_part, text_part, user_message
from cocoedit_jax.rewards.judge_score import digit_score

STAGES = ("load", "classify", "box", "mask", "rewrite", "score")
# The stages that ask a model, and their questions, one request each.
QUESTIONS = {"classify": ("type",), "box": ("box",), "rewrite": ("rewrite",), "score": SCORE_NAMES}
MODEL_STAGES = tuple(QUESTIONS)
_WHOLE = ("box", "rewrite")  # whose answer has parts: of one that was cut off, some may be missing
_MAX_SAID = 200  # letters of an answer that a dead letter repeats


@dataclass(frozen=True)
class Rules:
    """What the stages go by. convention: how the model writes boxes, never "auto"."""

    settings: Settings
    prompts: Prompts
    convention: str


@dataclass(frozen=True)
class Shown:
    """The picture of an annotation and its mask (bool, true = may change), as far as there is one."""

    image: Image.Image
    edit_mask: np.ndarray | None = None


def pending_at(annotation: Annotation, stage: str) -> bool:
    """Whether `stage` is what comes next."""
    number = STAGES.index(stage)
    return annotation.status == "pending" and annotation.stage == (STAGES[number - 1] if number else "")


def load(annotation: Annotation) -> Annotation:
    """Opens the picture; sets the size, and the fingerprint by which duplicates are found."""
    path = Path(annotation.item.image)
    try:
        found = fingerprint(path)
        size = load_image(path).size
    except (DataFault, OSError) as fault:  # the latter: removed since it was decoded
        return annotation.dead("unreadable_image", str(fault))
    text = f"{found.sha256}:{found.dhash:016x}:{found.thumbnail.tobytes().hex()}"
    return replace(annotation, size=size, attributes={**annotation.attributes, "fingerprint": text}, stage="load")


def read_fingerprint(text: str) -> Fingerprint:
    """Of `attributes["fingerprint"]`."""
    sha256, dhash, thumbnail = text.split(":")
    pixels = np.frombuffer(bytes.fromhex(thumbnail), np.uint8).reshape(8, 8, 3)
    return Fingerprint(sha256, int(dhash, 16), pixels)


def ask(stage: str, annotation: Annotation, shown: Shown | None, rules: Rules) -> dict[str, ChatRequest]:
    """The requests of a stage by question; none where the answer is known already."""
    return _ASK[stage](annotation, shown, rules)


def take(stage: str, annotation: Annotation, replies: Mapping[str, ChatReply], rules: Rules) -> Annotation:
    """The annotation after a stage, from successful replies to all questions of `ask`."""
    try:
        if stage in _WHOLE and any(reply.finish_reason == "length" for reply in replies.values()):
            raise ValueError(f"cut off after config.{stage}.max_tokens={getattr(rules.settings, stage).max_tokens}")
        after = _TAKE[stage](annotation, replies, rules)
        to_line(after).encode()  # JSON may hold half a surrogate pair, which no file of ours can
    except (ValueError, ArithmeticError, RecursionError) as error:
        said = next((reply.text for reply in replies.values() if reply.text), "")
        return annotation.dead("unparsed_reply", f"{stage}: {error}; the answer: {said[:_MAX_SAID]!r}")
    return replace(after, stage=stage) if after.status == "pending" else after


# --- classify ---------------------------------------------------------------------------------------------------------


def _known_type(annotation: Annotation, rules: Rules) -> str | None:
    """The kind of edit that the input states, in our words."""
    classify = rules.settings.classify
    name = (annotation.edit_type or "").strip().lower().replace(" ", "_")
    name = classify.aliases.get(name, name)
    return name if name in (*classify.local, *classify.whole) else None


def _ask_type(annotation: Annotation, shown: Shown | None, rules: Rules) -> dict[str, ChatRequest]:
    if _known_type(annotation, rules):
        return {}
    classify = rules.settings.classify
    names = "\n".join(f"- {name}" for name in (*classify.local, *classify.whole))
    prompt = rules.prompts.fill("classify", instruction=annotation.item.prompt, edit_types=names)
    return {"type": ChatRequest([user_message(text_part(prompt))], max_tokens=classify.max_tokens)}


def _take_type(annotation: Annotation, replies: Mapping[str, ChatReply], rules: Rules) -> Annotation:
    classify = rules.settings.classify
    kind = _known_type(annotation, rules)
    if kind is None:
        words = set(re.findall(r"[a-z_-]+", (replies["type"].text or "").lower()))
        named = [name for name in (*classify.local, *classify.whole) if name in words]
        if len(named) != 1:
            raise ValueError("expected one kind of edit")
        kind = named[0]
    given = {"given_type": annotation.edit_type} if annotation.edit_type not in (None, kind) else {}
    after = replace(
        annotation,
        item=replace(annotation.item, edit_type=kind),
        attributes={**annotation.attributes, **given},
    )
    if kind in classify.whole:
        return replace(after, stage="classify").rejected("global_edit", f"kind {kind}")
    return after


# --- box --------------------------------------------------------------------------------------------------------------


def _sent_size(annotation: Annotation, rules: Rules) -> tuple[int, int]:
    assert annotation.size is not None, "load comes first"
    return pictures.fitted_size(annotation.size, rules.settings.models.cell, rules.settings.models.max_pixels)


def box_request(image: Image.Image, instruction: str, edit_type: str, rules: Rules) -> ChatRequest:
    """Asks for the boxes in `image`, which is sent as it is."""
    name = "box_add" if edit_type == "add" else "box"
    prompt = rules.prompts.fill(name, instruction=instruction, edit_type=edit_type)
    message = user_message(image_part(image, rules.settings.models.image_format), text_part(prompt))
    return ChatRequest([message], max_tokens=rules.settings.box.max_tokens)


def _ask_box(annotation: Annotation, shown: Shown | None, rules: Rules) -> dict[str, ChatRequest]:
    assert shown is not None
    image = pictures.fit(shown.image, _sent_size(annotation, rules))
    return {"box": box_request(image, annotation.item.prompt, annotation.edit_type or "", rules)}


def _take_box(annotation: Annotation, replies: Mapping[str, ChatReply], rules: Rules) -> Annotation:
    assert annotation.size is not None
    limits, sent = rules.settings.box, _sent_size(annotation, rules)
    answers = boxes.parse_boxes(replies["box"].text or "")
    if not answers:
        return annotation.rejected("no_target", "the model found nothing to put a box around")
    found = []
    for numbers, label in answers:
        box = boxes.to_pixels(numbers, rules.convention, sent, annotation.size)
        # The shortest side allowed is in pixels of the picture as sent; boxes are in those of the full one.
        least = limits.min_side * annotation.size[0] / sent[0]
        if box is not None and min(box[2] - box[0], box[3] - box[1]) >= least:
            found.append((box, label))
    if not found:
        return annotation.dead("bad_box", f"{json.dumps([n for n, _ in answers])[:_MAX_SAID]} as {rules.convention}")
    area = lambda entry: (entry[0][2] - entry[0][0]) * (entry[0][3] - entry[0][1])  # noqa: E731
    found = sorted(found, key=area, reverse=True)[: limits.max_boxes]
    extra = {"boxes": [list(box) for box, _ in found], "labels": [label for _, label in found]}
    return replace(
        annotation, box=boxes.union([box for box, _ in found]), attributes={**annotation.attributes, **extra}
    )


# --- mask -------------------------------------------------------------------------------------------------------------


def segment(
    annotation: Annotation, image: Image.Image, segmenter: Segmenter, settings: Settings
) -> tuple[Annotation, np.ndarray | None]:
    """The annotation with the measures of its mask, and the mask (bool [H, W], true = may change) or None."""
    rules, kind, box = settings.mask, annotation.edit_type or "", annotation.box
    assert box is not None, "box comes before mask"
    mask = np.zeros((image.height, image.width), bool)
    for entry in annotation.attributes["boxes"]:
        piece = (entry[0], entry[1], entry[2], entry[3])
        if kind in rules.from_box:
            mask |= mask_ops.box_mask(piece, image.size)
            continue
        try:
            found = np.asarray(segmenter(image, piece))
        except (RuntimeError, ValueError, ArithmeticError) as error:
            return annotation.dead("segmenter_failed", f"{type(error).__name__}: {error}"[:_MAX_SAID]), None
        if found.shape != mask.shape:
            return annotation.dead("segmenter_failed", f"a mask of shape {found.shape}, expected {mask.shape}"), None
        mask |= found.astype(bool)
    mask = mask_ops.refine(mask, min_piece=rules.min_piece, fill_holes=rules.fill_holes)
    if not mask.any():
        return annotation.rejected("empty_mask", f"by {rules.segmenter}"), None
    radius = rules.dilate.get(kind, rules.dilate["other"]) * min(image.size)
    grown = mask_ops.dilate(mask, radius)
    measures = mask_ops.measures(grown, mask, box)
    attributes = {**annotation.attributes, "measures": measures}
    return replace(annotation, mask_area=measures["area"], attributes=attributes, stage="mask"), grown


# --- rewrite, score ---------------------------------------------------------------------------------------------------


def _ask_rewrite(annotation: Annotation, shown: Shown | None, rules: Rules) -> dict[str, ChatRequest]:
    source, region = _both(annotation, shown, rules)
    prompt = rules.prompts.fill("rewrite", instruction=annotation.item.prompt, edit_type=annotation.edit_type or "")
    message = user_message(source, region, text_part(prompt))
    request = ChatRequest([message], max_tokens=rules.settings.rewrite.max_tokens, affinity=annotation.item.id)
    return {"rewrite": request}


def _take_rewrite(annotation: Annotation, replies: Mapping[str, ChatReply], rules: Rules) -> Annotation:
    found = boxes.find_json(replies["rewrite"].text or "")
    text = found.get("instruction") if isinstance(found, dict) else None
    if not isinstance(text, str) or not text.split():
        raise ValueError('no "instruction"')
    text = " ".join(text.split())
    if len(text.split()) > rules.settings.rewrite.max_words:
        raise ValueError(f"{len(text.split())} words, expected at most {rules.settings.rewrite.max_words}")
    said = {name: found[name] for name in ("target", "location", "attributes") if isinstance(found.get(name), str)}
    return replace(annotation, refined_prompt=text, attributes={**annotation.attributes, **said})


def _ask_scores(annotation: Annotation, shown: Shown | None, rules: Rules) -> dict[str, ChatRequest]:
    source, region = _both(annotation, shown, rules)
    texts = {
        "instruction": final_prompt(annotation, rules.settings.rewrite.use),
        "edit_type": annotation.edit_type or "",
    }
    requests = {}
    for name in SCORE_NAMES:
        # Clarity is asked without the marking, which would tell what is meant.
        parts = [source] if name == "clarity" else [source, region]
        message = user_message(*parts, text_part(rules.prompts.fill(name, **texts)))
        requests[name] = ChatRequest([message], logprobs=True, affinity=annotation.item.id)
    return requests


def _take_scores(annotation: Annotation, replies: Mapping[str, ChatReply], rules: Rules) -> Annotation:
    scores: dict[str, float | None] = {}
    masses: dict[str, float] = {}
    for name in SCORE_NAMES:
        logprobs = replies[name].logprobs
        found = digit_score(logprobs[0] if logprobs else ())
        masses[name] = found.mass
        scores[name] = found.score if found.mass > 0 and found.mass >= rules.settings.score.min_mass else None
    return replace(annotation, scores=scores, attributes={**annotation.attributes, "digit_mass": masses})


def final_prompt(annotation: Annotation, use_rewritten: bool) -> str:
    """The instruction that is scored and goes into the data set. use_rewritten: `rewrite.use` of the run."""
    refined = annotation.refined_prompt if use_rewritten else None
    return refined or annotation.item.prompt


def _both(annotation: Annotation, shown: Shown | None, rules: Rules) -> tuple[dict[str, Any], dict[str, Any]]:
    """The picture, and the same with the region marked, as parts of a message."""
    assert shown is not None and shown.edit_mask is not None, "mask comes before"
    image = pictures.fit(shown.image, _sent_size(annotation, rules))
    kind = rules.settings.models.image_format
    return image_part(image, kind), image_part(pictures.marked(image, shown.edit_mask), kind)


_ASK: dict[str, Callable[..., dict[str, ChatRequest]]] = {
    "classify": _ask_type, "box": _ask_box, "rewrite": _ask_rewrite, "score": _ask_scores
}  # fmt: skip
_TAKE: dict[str, Callable[..., Annotation]] = {
    "classify": _take_type, "box": _take_box, "rewrite": _take_rewrite, "score": _take_scores
}  # fmt: skip
