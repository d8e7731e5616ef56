"""Entries of the text cache that are of pictures too, and of several lengths."""

from dataclasses import replace

import numpy as np
import pytest

from cocoedit_jax.data.images import Framing
from cocoedit_jax.data.text_cache import TextCache
from cocoedit_jax.data.text_identity import text_identity
from cocoedit_jax.data.text_kind import qwen_kind
from cocoedit_jax.data.text_record import pad_states
from cocoedit_jax.errors import UserError
from cocoedit_jax.models.text import Instruction
from tests.data.text_cases import FEATURES, PROMPTS, QWEN, embed, tiny_model, write


@pytest.fixture(scope="module")
def identity(tmp_path_factory):
    return text_identity(tiny_model(tmp_path_factory.mktemp("models") / "model"))


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


def pictured(number, value=0.5):
    pixels = np.full((4, 4, 3), value, np.float32) + np.float32(number / 255)
    return Instruction(PROMPTS[number % 3].prompt, f"images/{number}.png", pixels)


PICTURED = [pictured(number) for number in range(9)]


def embed_pictured(instructions):
    return embed(instructions, kind=QWEN)


def write_pictured(data, identity, instructions=PICTURED, **options):
    """From instructions without pixels, as a data folder gives them."""
    loaded = {instruction.image: instruction for instruction in instructions}
    bare = [replace(instruction, pixels=None) for instruction in instructions]
    return write(data, identity, bare, embed_pictured, kind=QWEN, load=lambda bare: loaded[bare.image], **options)


def assert_holds_pictured(cache, instructions=PICTURED, multiple=64):
    found, rows = cache(instructions), embed_pictured(instructions)
    assert set(found) == {"text", "mask"} and found["text"].shape[1] % multiple == 0
    assert found["text"].shape[1] - max(len(row["text"]) for row in rows) in range(multiple)
    for states, mask, row in zip(found["text"], found["mask"], rows, strict=True):
        length = len(row["text"])
        np.testing.assert_array_equal(states[:length], row["text"])
        assert not states[length:].any() and mask[:length].all() and not mask[length:].any()


def test_entries_of_pictures(data, identity):
    assert write_pictured(data, identity, part_entries=4) == len(PICTURED)
    cache = TextCache(data, QWEN, identity)
    assert cache.folder == data / "text_cache" / "qwen-edit_plus-32-center"
    assert_holds_pictured(cache, [PICTURED[8], PICTURED[0], PICTURED[4], PICTURED[0]])
    assert_holds_pictured(TextCache(data, QWEN, length_multiple=10), PICTURED[:1], 10)
    bare = replace(PICTURED[3], pixels=None)  # at start-up there are no pixels
    assert bare in cache and replace(bare, image="images/0.png") in cache and replace(bare, image="") not in cache
    with pytest.raises(UserError, match=r"1 instruction.s. not in .*: 'make circle 1 rød' of 'images/0.png'"):
        cache([PICTURED[0], replace(PICTURED[1], image="images/0.png")])
    assert write_pictured(data, identity) == 0
    # The same pictures of another framing are another cache.
    with pytest.raises(UserError, match="no text cache; make it with: .*--resolution=64 --crop=center"):
        TextCache(data, qwen_kind("edit_plus", Framing(64)), min_bucket_records=3)


@pytest.mark.parametrize("crop, end", [("center", "center"), ("buckets", "buckets --groups=24")])
def test_the_command_frames_pictures_as_training_does(data, crop, end):
    with pytest.raises(UserError, match=rf"no text cache; make it with: .* --resolution=64 --crop={end}$"):
        TextCache(data, qwen_kind("edit_plus", Framing(64, crop)), min_bucket_records=24)


def test_a_changed_picture_is_found_and_encoded_again(data, identity):
    write_pictured(data, identity)
    changed = [*PICTURED[:4], pictured(4, 0.6), *PICTURED[5:]]
    cache = TextCache(data, QWEN)
    message = r"1 picture.s. changed, or are framed otherwise, since .*: images/4.png; encode them with"
    with pytest.raises(UserError, match=message):
        cache(changed)
    pixels = PICTURED[4].pixels
    assert pixels is not None
    larger = replace(PICTURED[4], pixels=np.full((4, 8, 3), pixels[0, 0, 0], np.float32))
    with pytest.raises(UserError, match=message):
        cache([larger])
    almost = replace(PICTURED[4], pixels=pixels + np.float32(1e-4))  # the same in whole numbers of 255
    assert_holds_pictured(cache, [almost])
    assert write_pictured(data, identity, changed) == 1
    cache = TextCache(data, QWEN)
    assert len(cache) == len(PICTURED) and [part.count for part in cache.header.parts] == [9, 1]
    assert_holds_pictured(cache, changed)
    with pytest.raises(UserError, match=message):
        cache(PICTURED)
    # When the newer entry is lost, the older one does not take its place.
    (QWEN.folder(data) / "part-00001.array_record").unlink()
    assert write_pictured(data, identity, changed) == 1
    assert_holds_pictured(TextCache(data, QWEN), changed)


def test_an_unreadable_picture_keeps_what_was_encoded(data, identity):
    def load(instruction):
        if instruction.image == "images/6.png":
            raise UserError("images/6.png: unreadable")
        return PICTURED[int(instruction.image[7])]

    with pytest.raises(UserError, match=r"images/6.png: unreadable"):
        write(data, identity, [replace(i, pixels=None) for i in PICTURED], embed_pictured, kind=QWEN, load=load)
    assert_holds_pictured(TextCache(data, QWEN), PICTURED[:4])


def test_no_more_pictures_than_needed_are_in_memory(data, identity):
    loaded, most = [], 0

    def load(instruction):
        loaded.append(instruction)
        return replace(instruction, pixels=PICTURED[0].pixels)

    def encode(batch):
        nonlocal most, done
        done += len(batch)
        most = max(most, len(loaded) - done)
        return embed_pictured(batch)

    done = 0
    many = [Instruction("x", f"{number}.png") for number in range(40)]
    assert write(data, identity, many, encode, kind=QWEN, load=load) == 40
    assert most <= 8  # two batches


def test_fixed_length_of_released_training(data, identity):
    write_pictured(data, identity)
    rows = embed_pictured(PICTURED)
    lengths = [len(row["text"]) for row in rows]
    fixed = int(np.median(lengths))
    assert min(lengths) < fixed < max(lengths)
    cache = TextCache(data, QWEN, fixed_length=fixed)
    found, cut = cache(PICTURED), sum(length > fixed for length in lengths)
    assert (
        cache.describe_cuts() == f"{cache.folder}: {cut} of 9 are cut to {fixed} states; the longest has {max(lengths)}"
    )
    assert TextCache(data, QWEN).describe_cuts() is TextCache(data, QWEN, fixed_length=150).describe_cuts() is None
    assert found["text"].shape == (len(PICTURED), fixed, FEATURES)
    for states, mask, row in zip(found["text"], found["mask"], rows, strict=True):
        kept = row["text"][:fixed]
        np.testing.assert_array_equal(states[: len(kept)], kept)
        assert not states[len(kept) :].any() and mask.tolist() == [True] * len(kept) + [False] * (fixed - len(kept))


def test_padding_ends_at_a_multiple():
    for lengths, expected in (((1,), 64), ((64, 3), 64), ((65, 64), 128)):
        found = pad_states([np.ones((length, 2), np.float32) for length in lengths])
        assert found["text"].shape == (len(lengths), expected, 2)
        assert found["mask"].sum(1).tolist() == found["text"][..., 0].sum(1).tolist() == list(lengths)


def test_lengths_are_known_without_reading(data, identity):
    write_pictured(data, identity, part_entries=4)
    cache = TextCache(data, QWEN)
    for path in cache.folder.glob("*.array_record"):
        path.write_bytes(bytes(path.stat().st_size))
    bare = [replace(instruction, pixels=None) for instruction in PICTURED]
    assert cache.lengths(bare) == [len(row["text"]) for row in embed_pictured(PICTURED)]
    with pytest.raises(UserError, match="not in the text cache"):
        cache.lengths([Instruction("new")])
