"""The programmatic judge: high for the target, low for the source, blind to the background."""

import numpy as np
import pytest

from cocoedit_jax.data import scene_judge, scenes


@pytest.fixture(scope="module")
def batch():
    return scenes.sample_batch(np.random.default_rng(5), 200)


def scores_of(specs, edited):
    return scene_judge.judge_batch(specs, edited).score


def object_pixels(specs, size):
    """The pixels that the judge looks at: objects before or after the edit."""
    layers = scenes.render_layers(specs, size)
    return (layers.source_coverage > 0.5) | (layers.target_coverage > 0.5)


def drift(n, size=48):
    y, x = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size), indexing="ij")
    waves = np.stack([np.sin(3 * x + 1), np.cos(4 * y), np.sin(2 * x + 3 * y)], axis=-1)
    return np.broadcast_to(0.1 * waves, (n, size, size, 3))


def test_target_source_and_blend(batch):
    scores = [scores_of(batch.specs, (1 - a) * batch.source + a * batch.target) for a in np.linspace(0, 1, 9)]
    assert (scores[0] >= 0.04).all() and (scores[0] <= 0.1).all()
    np.testing.assert_allclose(scores[-1], 1.0, atol=1e-6)
    assert (np.diff(scores, axis=0) > 0).all()


@pytest.mark.parametrize("size", [48, 64])
def test_blind_to_background_drift(size):
    batch = scenes.sample_batch(np.random.default_rng(6), 60, size)
    looked_at = object_pixels(batch.specs, size)[..., None]
    for image in (batch.source, batch.target, 0.5 * (batch.source + batch.target)):
        drifted = np.where(looked_at, image, np.clip(image + drift(60, size), 0, 1))
        np.testing.assert_array_equal(scores_of(batch.specs, drifted), scores_of(batch.specs, image))


def test_the_place_of_a_removed_object_counts(batch):
    for number, spec in enumerate(batch.specs):
        if spec.operation in ("remove", "move"):
            item = spec.objects[spec.index]
            row, column = int(item.y * 48), int(item.x * 48)
            spoiled = batch.target[number].copy()
            spoiled[row - 4 : row + 5, column - 4 : column + 5] = item.rgb
            assert scores_of([spec], spoiled[None])[0] < 0.75


def test_half_edits_and_blobs_score_lower(batch):
    rng = np.random.default_rng(0)
    ragged = np.where(rng.random((200, 48, 48, 1)) < 0.5, batch.source, batch.target)
    loud = batch.target + batch.edit_mask[..., None] * np.sign(batch.target - 0.5) * 0.3
    assert 0.25 < scores_of(batch.specs, ragged).mean() < 0.5
    assert 0.3 < scores_of(batch.specs, np.clip(loud, 0, 1)).mean() < 0.7


def test_losing_another_object_costs_the_score(batch):
    layers = scenes.render_layers(batch.specs, 48)
    lost = np.where(layers.changed_pixels[..., None], layers.target, layers.background)
    result = scene_judge.judge_batch(batch.specs, lost)
    has_others = np.array([len(spec.objects) - (spec.index is not None) > 0 for spec in batch.specs])
    assert has_others.all() and (result.survival < 0.2).all() and (result.score < 0.2).all()
    # A mild change of colour of the others is background drift to a judge, not a lost object.
    mild = np.where(layers.changed_pixels[..., None], layers.target, layers.source + 0.04)
    assert scene_judge.judge_batch(batch.specs, mild).survival.min() > 0.8


def test_no_edit(batch):
    assert scene_judge.judge_batch(batch.specs, batch.source).no_edit.all()
    assert scene_judge.judge_batch(batch.specs, 0.85 * batch.source + 0.15 * batch.target).no_edit.all()
    assert not scene_judge.judge_batch(batch.specs, 0.5 * batch.source + 0.5 * batch.target).no_edit.any()
    wrong = np.where(batch.source < 0.5, 1.0, 0.0)
    assert not scene_judge.judge_batch(batch.specs, wrong).no_edit.any()  # a wrong edit is an edit


def test_eight_bit_images_score_alike(batch):
    eight_bit = np.rint(batch.target * 255).astype(np.uint8)
    np.testing.assert_allclose(scores_of(batch.specs, eight_bit), 1.0, atol=0.03)


def test_wrong_shape_is_named(batch):
    with pytest.raises(ValueError, match=r"expected \(200, size, size, 3\)"):
        scores_of(batch.specs, batch.target[:3])
