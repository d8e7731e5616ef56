"""Pretraining of the quickstart's base, a few steps of it."""

import json

import numpy as np
import pytest

from cocoedit_jax.data.scenes import render_layers, sample_batch
from cocoedit_jax.models.quickstart import load_base
from cocoedit_jax.models.weights import load_safetensors
from cocoedit_jax.train.pretrain import pretrain, spoil
from configs.quickstart_base import get_config


def tiny_config():
    config = get_config()
    small = {
        "image_size": 16, "batch_size": 4, "checkpoint_every": 2, "clean.steps": 3, "clean.warmup_steps": 1,
        "clean.decay_steps": 1, "drift.steps": 2, "drift.warmup_steps": 1, "drift.decay_steps": 1,
        "transformer.num_layers": 1, "transformer.num_single_layers": 1, "transformer.attention_head_dim": 12,
        "transformer.axes_dims_rope": (4, 4, 4), "transformer.joint_attention_dim": 8,
        "transformer.pooled_projection_dim": 8,
    }  # fmt: skip
    config.update_from_flattened_dict(small)
    return config


@pytest.mark.slow
def test_pretraining_is_reproducible_in_one_go_or_in_two(tmp_path):
    pretrain(tiny_config(), tmp_path / "whole")
    log = [json.loads(line) for line in (tmp_path / "whole" / "pretraining.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [2, 3, 3, 5]
    assert all(0 <= row["judge"] <= 1 for row in log)
    assert (tmp_path / "whole" / "samples.png").is_file()

    pretrain(tiny_config(), tmp_path / "second", start_from=tmp_path / "whole" / "clean")
    one, two = (load_safetensors(tmp_path / name / "model.safetensors")[0] for name in ("whole", "second"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor, two[name])
    clean = load_safetensors(tmp_path / "whole" / "clean" / "model.safetensors")[0]
    assert any((clean[name] != one[name]).any() for name in one)
    load_base(tmp_path / "whole")


def test_spoiled_targets_drift_outside_the_objects_only():
    batch = sample_batch(np.random.default_rng(0), 64, 32)
    drift = get_config().drift
    spoiled = spoil(np.random.default_rng(1), batch, drift)
    layers = render_layers(batch.specs, 32)
    objects = ((layers.source_coverage > 0.999) & (layers.target_coverage > 0.999))[..., None]
    background = (layers.source_coverage < 0.001) & (layers.target_coverage < 0.001)
    assert objects.any()
    change = np.abs(spoiled - batch.source)
    np.testing.assert_allclose((change * (layers.source == layers.target) * objects).max(), 0, atol=1e-3)
    assert change[background].mean() > 0.01
    # Edits that are missing drift less than those that take hold.
    per_image = np.asarray([c[b].mean() for c, b in zip(change, background, strict=True)])
    kind = np.random.default_rng(1).random(64)  # the first draw of ``spoil``
    assert per_image[kind < drift.no_edit].mean() < per_image[kind >= drift.no_edit + drift.partial].mean()
