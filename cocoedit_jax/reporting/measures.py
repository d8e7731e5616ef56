"""The measures of an edit, as tables show them: names, digits, which way is better."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cocoedit_jax.reporting.html import Raw
from cocoedit_jax.reporting.telemetry import decode_number


@dataclass(frozen=True)
class Measure:
    name: str
    title: str
    digits: int
    better: int  # 1: higher, -1: lower, 0: neither
    percent: bool = False


MEASURES = (
    Measure("judge", "Judge score", 3, 1),
    Measure("psnr_outside", "PSNR outside (dB)", 2, 1),
    Measure("ssim_outside", "SSIM outside", 4, 1),
    Measure("change_inside", "Change inside", 3, 0),
    Measure("no_edit", "No-edit rate", 1, -1, percent=True),
)
EXPLANATION = (
    "Outside and inside refer to the edit mask. PSNR and SSIM compare the edit with the source where nothing should "
    "change; change inside is the mean absolute difference to the source where something should. The no-edit rate is "
    "the share of edits that leave the source as it was."
)


def value_of(summary: Mapping[str, Any] | None, name: str, part: str = "mean") -> float:
    """``summary[name][part]`` as a float, NaN if it is missing."""
    entry = (summary or {}).get(name)
    value = decode_number(entry.get(part)) if isinstance(entry, Mapping) else None
    return float(value) if isinstance(value, int | float) else math.nan


def number(value: float, measure: Measure, signed: bool = False) -> str:
    """``value`` with the measure's digits; a dash if unknown, a true minus sign."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    scaled = 100 * value if measure.percent else value
    written = f"{scaled:{'+' if signed else ''}.{measure.digits}f}".replace("-", "−")
    return written + (" %" if measure.percent else "")


def with_error(value: float, error: float, measure: Measure, signed: bool = False) -> str:
    """``value ± error``."""
    if math.isnan(value) or math.isnan(error) or math.isinf(value):
        return number(value, measure, signed)
    unit = " %" if measure.percent else ""
    return number(value, measure, signed).removesuffix(unit) + " ± " + number(error, measure).removesuffix(unit) + unit


def judged(difference: float, error: float, measure: Measure) -> str:
    """``good``, ``bad`` or an empty string: only a difference beyond two standard errors is called either."""
    if not measure.better or not math.isfinite(error) or not abs(difference) > 2 * error:
        return ""
    return "good" if difference * measure.better > 0 else "bad"


def difference_cell(difference: float, error: float, measure: Measure) -> str:
    """Markup of a paired difference, coloured if it is beyond two standard errors."""
    written = with_error(difference, error, measure, signed=True)
    kind = judged(difference, error, measure)
    return Raw(f'<span class="{kind}">{written}</span>') if kind else written
