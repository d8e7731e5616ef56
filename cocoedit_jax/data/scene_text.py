"""Instructions for the procedural editing scenes: varied English from a small, enumerable vocabulary."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

COLOR_NAMES = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPE_NAMES = ("circle", "square", "triangle", "star")
OPERATIONS = ("recolor", "remove", "reshape", "move", "add")
CORNER_NAMES = (
    ("top left", "upper left", "top left corner", "upper left corner"),
    ("top right", "upper right", "top right corner", "upper right corner"),
    ("bottom left", "lower left", "bottom left corner", "lower left corner"),
    ("bottom right", "lower right", "bottom right corner", "lower right corner"),
)

# {ref} is one of REFERENCES, {new} the object to add, {color}, {shape} and {corner} describe the target.
REFERENCES = (
    "the {color} {shape}",
    "the {color} {shape}",
    "the {shape} that is {color}",
    "the {color} colored {shape}",
    "the {color} {shape} in the {corner}",
)
NEW_OBJECTS = ("{a} {color} {shape}", "{a} {color} {shape}", "a {shape} that is {color}", "{a} {color} colored {shape}")
TEMPLATES: dict[str, tuple[str, ...]] = {
    "recolor": (
        "make {ref} {color}",
        "paint {ref} {color}",
        "turn {ref} {color}",
        "change {ref} to {color}",
        "change the color of {ref} to {color}",
        "recolor {ref} in {color}",
        "{ref} should be {color}",
        "give {ref} {a} {color} color",
    ),
    "remove": (
        "remove {ref}",
        "delete {ref}",
        "erase {ref}",
        "take away {ref}",
        "get rid of {ref}",
        "{ref} should disappear",
        "clear {ref} from the picture",
    ),
    "reshape": (
        "turn {ref} into a {shape}",
        "change {ref} into a {shape}",
        "make {ref} a {shape}",
        "replace {ref} with a {shape} of the same color",
        "{ref} should become a {shape}",
        "change the shape of {ref} to a {shape}",
        "transform {ref} into a {shape}",
    ),
    "move": (
        "move {ref} to the {corner}",
        "put {ref} in the {corner}",
        "shift {ref} to the {corner}",
        "place {ref} in the {corner}",
        "bring {ref} to the {corner}",
        "{ref} should go to the {corner}",
    ),
    "add": (
        "add {new} in the {corner}",
        "draw {new} in the {corner}",
        "put {new} in the {corner}",
        "place {new} in the {corner}",
        "insert {new} in the {corner}",
        "there should be {new} in the {corner}",
    ),
}


def article(word: str) -> str:
    """Indefinite article for `word`, by its first letter."""
    return "an" if word[0] in "aeiou" else "a"


def words(text: str) -> list[str]:
    """Lower-case words of `text`; punctuation is dropped."""
    return re.findall(r"[a-z]+", text.lower())


def compose_instruction(
    operation: str,
    pick: Callable[[int], int],
    *,
    color: str,
    shape: str,
    cell: int,
    new_color: str = "",
    new_shape: str = "",
    new_cell: int = 0,
) -> str:
    """One sentence for an edit. `color`, `shape`, `cell` name the object as it is (for "add": the object to add, and
    `new_cell` where), the `new_*` words what it becomes. `pick(k)` chooses a number in [0, k).
    """
    template = choose(TEMPLATES[operation], pick)
    here = choose(CORNER_NAMES[cell], pick)
    there = choose(CORNER_NAMES[new_cell], pick)
    named = choose(NEW_OBJECTS if operation == "add" else REFERENCES, pick)
    # Only remove, recolor and reshape may name the place: two corners in one sentence read badly.
    if operation == "move" and "{corner}" in named:
        named = REFERENCES[0]
    phrase = named.format(a=article(color), color=color, shape=shape, corner=here)
    sentence = template.format(
        ref=phrase, new=phrase, a=article(new_color or "a"), color=new_color, shape=new_shape, corner=there
    )
    return sentence + ("." if pick(4) == 0 else "")


def choose(options: Sequence[str], pick: Callable[[int], int]) -> str:
    return options[pick(len(options))]


def scene_vocabulary() -> tuple[str, ...]:
    """Every word an instruction can contain, sorted."""
    texts = [text for group in TEMPLATES.values() for text in group]
    texts += [*REFERENCES, *NEW_OBJECTS, *COLOR_NAMES, *SHAPE_NAMES, "a an"]
    texts += [name for names in CORNER_NAMES for name in names]
    return tuple(sorted({word for text in texts for word in words(re.sub(r"\{\w+\}", " ", text))}))


def max_instruction_words() -> int:
    """Upper bound on the number of words of an instruction."""

    def length(options: Sequence[str]) -> int:
        return max(len(words(re.sub(r"\{\w+\}", " x ", text))) for text in options)

    # Beyond the slots counted as one word: the phrase for the object and the two corners (three words each).
    return length([text for group in TEMPLATES.values() for text in group]) + length(REFERENCES) + 2 * 2
