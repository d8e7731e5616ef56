"""Which annotations are kept. Reads raw scores and measures only, so it can be done again with other thresholds."""

from __future__ import annotations

from dataclasses import replace

from cocoedit_jax.annotation.record import SCORE_NAMES, Annotation
from cocoedit_jax.annotation.settings import FilterSettings
from cocoedit_jax.annotation.stages import STAGES


def choose(annotation: Annotation, rules: FilterSettings) -> Annotation:
    """The annotation as kept, rejected (first failed rule as reason, all in detail), or dead where a score is missing
    that a threshold needs. What an earlier stage has ended is returned as it is.
    """
    if annotation.status != "pending" or annotation.stage != STAGES[-1]:
        return annotation
    thresholds = {name: getattr(rules, f"min_{name}") for name in SCORE_NAMES}
    missing = [name for name in SCORE_NAMES if thresholds[name] is not None and annotation.scores[name] is None]
    if missing:
        return annotation.dead("no_score", ", ".join(missing))
    m = annotation.attributes["measures"]
    failed: list[tuple[str, str]] = []

    def within(reason: str, value: float, low: float | None = None, high: float | None = None) -> None:
        if low is not None and value < low:
            failed.append((reason, f"{reason} {value:.3g} < {low:g}"))
        elif high is not None and value > high:
            failed.append((reason, f"{reason} {value:.3g} > {high:g}"))

    within("area", m["area"], rules.min_area, rules.max_area)
    within("crop", m["crop_area"], rules.min_crop_area, rules.max_crop_area)
    within("components", m["components"], high=rules.max_components)
    within("box_mismatch", m["box_iou"], rules.min_box_iou)
    within("border", m["border"], high=rules.max_border)
    for name in SCORE_NAMES:
        score = annotation.scores[name]
        if score is not None:
            within(name, score, thresholds[name])
    if failed:
        return annotation.rejected(failed[0][0], "; ".join(text for _, text in failed))
    return replace(annotation, status="kept", reason=None, detail="")
