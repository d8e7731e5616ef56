"""Procedural scenes: what the instruction says is what the target shows, and nothing else changes."""

import json
from collections import Counter

import numpy as np
import pytest

from cocoedit_jax.data import scenes
from cocoedit_jax.data.scene_text import CORNER_NAMES, TEMPLATES


@pytest.fixture(scope="module")
def batch():
    return scenes.sample_batch(np.random.default_rng(3), 300)


@pytest.mark.parametrize("size", [48, 64])
def test_shapes_and_ranges(size):
    batch = scenes.sample_batch(np.random.default_rng(0), 5, size)
    for image in (batch.source, batch.target):
        assert image.shape == (5, size, size, 3) and image.dtype == np.float32
        assert 0.0 <= image.min() and image.max() <= 1.0
    assert batch.edit_mask.shape == (5, size, size) and batch.edit_mask.dtype == np.float32
    assert set(np.unique(batch.edit_mask)) == {0.0, 1.0}


@pytest.mark.parametrize("size", [47, 8])
def test_bad_size(size):
    with pytest.raises(ValueError, match=f"size: {size} given"):
        scenes.sample_batch(np.random.default_rng(0), 1, size)


def test_bad_operation():
    with pytest.raises(ValueError, match="rotate"):
        scenes.sample_specs(np.random.default_rng(0), 1, ["rotate"])


def test_nothing_changes_outside_the_mask(batch):
    changed = (batch.source != batch.target).any(-1)
    assert changed.any(axis=(1, 2)).all()
    assert not (changed & (batch.edit_mask == 0)).any()
    # Two pixels of border: the change itself never touches the rim of the mask, except at the image border.
    padded = np.pad(batch.edit_mask, ((0, 0), (2, 2), (2, 2)), constant_values=1)
    eroded = np.min([padded[:, y : y + 48, x : x + 48] for y in range(5) for x in range(5)], axis=0)
    assert not (changed & (eroded == 0)).any()
    assert 0.03 < batch.edit_mask.mean() < 0.35


def test_objects_stay_in_their_cells_and_are_distinct(batch):
    for spec in batch.specs:
        for objects in (spec.objects, scenes.edited_objects(spec)):
            assert len({item.cell for item in objects}) == len(objects)
            assert len({(item.color, item.shape) for item in objects}) == len(objects)
            for item in objects:
                x, y = 0.25 + 0.5 * (item.cell % 2), 0.25 + 0.5 * (item.cell // 2)
                assert max(abs(item.x - x), abs(item.y - y)) + 1.05 * item.radius <= 0.25
        assert len(spec.objects) in (2, 3)
    layers = scenes.render_layers(batch.specs, 48)
    for coverage in (layers.source_coverage, layers.target_coverage):
        # Only the faint tip of a corner, by its anti-aliasing, may reach the rim of a cell.
        assert coverage[:, [0, 23, 24, 47]].max() < 0.3 and coverage[:, :, [0, 23, 24, 47]].max() < 0.3


def test_operations_are_what_they_say(batch):
    counts = Counter(spec.operation for spec in batch.specs)
    assert set(counts) == set(scenes.OPERATIONS) and min(counts.values()) > 300 / 5 / 2
    for spec in batch.specs:
        before = None if spec.index is None else spec.objects[spec.index]
        after = spec.result
        if spec.operation == "remove":
            assert before is not None and after is None
        elif spec.operation == "add":
            assert before is None and after is not None and after.cell not in {item.cell for item in spec.objects}
        else:
            assert before is not None and after is not None
            names = ("shape", "color", "cell", "radius")
            changed = [name for name in names if getattr(before, name) != getattr(after, name)]
            assert changed == [{"recolor": "color", "reshape": "shape", "move": "cell"}[spec.operation]]


def test_the_instruction_names_object_and_result(batch):
    for spec in batch.specs:
        words = scenes.words(spec.instruction)
        named = spec.result if spec.index is None else spec.objects[spec.index]
        assert named is not None and named.color in words and named.shape in words
        if spec.operation in ("move", "add"):
            assert any(corner in spec.instruction for corner in CORNER_NAMES[spec.result.cell])
        if spec.operation == "recolor":
            assert spec.result.color in words
        if spec.operation == "reshape":
            assert spec.result.shape in words


def test_vocabulary_covers_all_sentences_and_no_more():
    specs = scenes.sample_specs(np.random.default_rng(1), 6000)
    sentences = [scenes.words(spec.instruction) for spec in specs]
    vocabulary = scenes.scene_vocabulary()
    assert list(vocabulary) == sorted(set(vocabulary))
    assert {word for sentence in sentences for word in sentence} == set(vocabulary)
    assert max(map(len, sentences)) <= scenes.max_instruction_words()
    assert all(len(templates) >= 5 for templates in TEMPLATES.values())
    assert not any(" a orange" in spec.instruction or " an red" in spec.instruction for spec in specs)


def test_json_round_trip_renders_the_same(batch):
    specs = [scenes.SceneSpec.from_json(json.loads(json.dumps(spec.to_json()))) for spec in batch.specs]
    assert specs == batch.specs
    again = scenes.render_batch(specs)
    np.testing.assert_array_equal(again.source, batch.source)
    np.testing.assert_array_equal(again.target, batch.target)
    source, target, mask = scenes.render(specs[7])
    np.testing.assert_allclose(source, batch.source[7], atol=1e-6)
    np.testing.assert_allclose(target, batch.target[7], atol=1e-6)
    np.testing.assert_array_equal(mask, batch.edit_mask[7])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operation": "rotate"}, "'operation' is 'rotate'"),
        ({"index": 9}, "'index' is 9"),
        ({"index": None}, "do not fit"),
        ({"objects": 3}, "not a scene description"),
        ({"result": {"shape": "cube", "color": "red", "cell": 0}}, "unknown object"),
    ],
)
def test_bad_json_is_named(change, message):
    data = scenes.sample_specs(np.random.default_rng(0), 1, ["recolor"])[0].to_json()
    with pytest.raises(ValueError, match=message):
        scenes.SceneSpec.from_json(data | change)
    with pytest.raises(ValueError, match="'texture_seed' is missing"):
        scenes.SceneSpec.from_json({name: value for name, value in data.items() if name != "texture_seed"})


def test_sampling_is_reproducible():
    one, two = (scenes.sample_batch(np.random.default_rng(9), 4) for _ in range(2))
    assert one.instructions == two.instructions
    np.testing.assert_array_equal(one.target, two.target)


def test_size_changes_the_sampling_not_the_scene(batch):
    """A 96 px picture averaged down to 48 px is the 48 px picture, up to anti-aliasing."""
    large = scenes.render_batch(batch.specs[:40], 96).source
    small = large.reshape(40, 48, 2, 48, 2, 3).mean(axis=(2, 4))
    difference = np.abs(small - batch.source[:40])
    assert difference.mean() < 0.01 and np.quantile(difference, 0.99) < 0.15
