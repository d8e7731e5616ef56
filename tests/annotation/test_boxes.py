import json

import pytest

from cocoedit_jax.annotation import boxes
from cocoedit_jax.errors import UserError

SQUARE = [476, 308, 616, 448]  # of the test picture at 28 px a cell, 840 x 560


@pytest.mark.parametrize(
    "text, expected",
    [
        ('```json\n[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}]\n```', [([1, 2, 3, 4], "cup")]),
        ('Sure: {"bbox_2d": [1.5, 2, 3, 4]} as asked', [([1.5, 2, 3, 4], "")]),
        ("[1, 2, 3, 4]", [([1, 2, 3, 4], "")]),
        ("[[1, 2, 3, 4], [5, 6, 7, 8]]", [([1, 2, 3, 4], ""), ([5, 6, 7, 8], "")]),
        ('{"box": [1, 2, 3, 4]} {"box": [9, 9, 9, 9]}', [([1, 2, 3, 4], "")]),
        ("[]", []),
        ('As [one] asks, {sic}: {"box": [1, 2, 3, 4]}', [([1, 2, 3, 4], "")]),
        ('{"box": [1, 2, 3, 4], "label": "a ] or }"}', [([1, 2, 3, 4], "a ] or }")]),
        ('[{"bbox_2d": null}]', []),
    ],
)
def test_answers(text, expected):
    assert boxes.parse_boxes(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no idea",
        "[1, 2, 3]",
        '[{"bbox_2d": [1, 2, 3, "4"]}]',
        '[{"label": "cup"}]',
        "[1, 2, NaN, 4]",
        "[[1",
        "[" * 100_000,
        "[1, 2, 3, 1" + "0" * 400 + "]",
    ],
)
def test_answers_that_are_no_boxes(text):
    with pytest.raises(ValueError):
        boxes.parse_boxes(text)


@pytest.mark.parametrize("label", ["a", "a ] or }", 'a \\"quoted\\" [one'])
def test_part_of_an_answer_is_none(label):
    """Wherever it is cut off: its first box must not stand for all."""
    whole = f'Here: [{{"bbox_2d": [1, 2, 30, 40], "label": "{label}"}}, {{"bbox_2d": [50, 6, 90, 70]}}]'
    assert len(boxes.parse_boxes(whole)) == 2
    for end in range(len(whole)):
        with pytest.raises(ValueError):
            boxes.parse_boxes(whole[:end])
    for text in ("[[1, 2, 30, 40], [50, 60", '{"bbox_2d": [1, 2, 30, 40], "lab', "[[1, 2, 30, 40], ...]"):
        with pytest.raises(ValueError):
            boxes.parse_boxes(text)


def test_conventions():
    full, sent = (2000, 1000), (1000, 500)
    expected = (200.0, 100.0, 1000.0, 500.0)
    assert boxes.to_pixels([100, 50, 500, 250], "pixels", sent, full) == expected
    assert boxes.to_pixels([100, 100, 500, 500], "relative-1000", sent, full) == expected
    assert boxes.to_pixels([0.1, 0.1, 0.5, 0.5], "relative-1", sent, full) == expected
    assert boxes.to_pixels([-50, -50, 2000, 2000], "pixels", sent, full) == (0, 0, 2000, 1000)
    assert boxes.to_pixels([500, 50, 100, 250], "pixels", sent, full) is None
    assert boxes.to_pixels([1200, 50, 1300, 250], "pixels", sent, full) is None
    assert boxes.iou((0, 0, 4, 4), (2, 2, 6, 6)) == 4 / 28 and boxes.iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    assert boxes.union([(0, 5, 2, 6), (1, 1, 4, 4)]) == (0, 1, 4, 6)


def answer(numbers):
    return json.dumps([{"bbox_2d": numbers, "label": "red square"}])


def test_the_known_square():
    image, square = boxes.probe_picture(28)
    assert image.size == (840, 560) and list(square) == SQUARE
    assert image.getpixel((476, 308)) == (220, 20, 20) and image.getpixel((616, 308)) == (225, 225, 225)
    relative = [1000 * v / side for v, side in zip(SQUARE, (840, 560) * 2, strict=True)]
    qwen2, qwen3 = "Qwen/Qwen2.5-VL-72B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"
    assert boxes.settle_convention("auto", qwen2, answer(SQUARE), 28) == "pixels"
    assert boxes.settle_convention("auto", qwen3, answer(relative), 28) == "relative-1000"
    # An unknown model: what fits. A box that is a little off still does.
    assert boxes.settle_convention("auto", "mine", answer([v / 1000 for v in relative]), 28) == "relative-1"
    assert boxes.settle_convention("auto", "mine", answer([v + 8 for v in SQUARE]), 28) == "pixels"
    with pytest.raises(UserError, match=r"wrong as 'pixels'.*fits 'relative-1000': set --config.box.convention"):
        boxes.settle_convention("auto", qwen2, answer(relative), 28)
    with pytest.raises(UserError, match="wrong as 'relative-1000'"):
        boxes.settle_convention("relative-1000", qwen2, answer(SQUARE), 28)
    with pytest.raises(UserError, match=r"overlap 0.00") as error:
        boxes.settle_convention("auto", qwen2, answer([0, 0, 100, 100]), 28)
    assert "set --config" not in str(error.value)
    with pytest.raises(UserError, match="gave no box"):
        boxes.settle_convention("auto", qwen2, "I cannot see it.", 28)
