import dataclasses
import json

import numpy as np
import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.nft.presets import CHOICES, PRESETS, RANGES, NFTConfig, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_hashable_and_survive_json(name):
    cfg = preset(name).validate()
    assert NFTConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    assert hash(cfg) == hash(cfg.replace())


def test_every_field_is_checked():
    special = {"objective", "reward_weights", "tau_by_edit_type", "ban", "ner_on_all_samples", "train_at_pure_noise"}
    assert {f.name for f in dataclasses.fields(NFTConfig)} == special | set(CHOICES) | set(RANGES)


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_unknown_choice_is_named(name):
    with pytest.raises(UserError, match=f"{name} is 'nonsense'; expected"):
        NFTConfig.from_dict({name: "nonsense"})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"betta": 1.0}, "unknown key 'betta'"),
        ({"beta": 0}, "beta is 0; expected"),
        ({"beta": "1"}, "beta is '1'; expected"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"kl_weight": True}, "kl_weight is True"),
        ({"ban": 1}, "ban is 1; expected true or false"),
        ({"erode_edit": 1.5}, "erode_edit is 1.5; expected a whole number"),
        ({"objective": "ppo"}, "objective is 'ppo'"),
        ({"reward_weights": {}}, "reward_weights"),
        ({"reward_weights": {"judge": -1}}, r"reward_weights\['judge'\] is -1"),
        ({"reward_weights": {"judge": 0.0}}, "at least one positive"),
        ({"tau_by_edit_type": {"add": 3}}, r"tau_by_edit_type\['add'\] is 3"),
        ({"tau_by_edit_type": 3}, "tau_by_edit_type is 3"),
        ({"r_granularity": "token", "reward_normalise": "per_reward"}, "reward_normalise"),
    ],
)
def test_bad_values_are_named(values, named):
    with pytest.raises(UserError, match=named):
        NFTConfig.from_dict(values)


def test_unknown_preset_lists_the_names():
    with pytest.raises(UserError, match="'cocoedit-routed'"):
        preset("cocoedit2")


def test_thresholds_by_edit_type():
    cfg = NFTConfig.from_dict({"tau_by_edit_type": {"remove": [0.01, 0.2]}})
    positive, negative = cfg.taus(["remove", "add", None])
    np.testing.assert_allclose(positive, [0.01, 0.001, 0.001], rtol=1e-6)
    np.testing.assert_allclose(negative, [0.2, 0.03, 0.03], rtol=1e-6)


def test_what_the_presets_promise():
    paper, official = preset("cocoedit"), preset("cocoedit-official")
    assert (paper.ner_target, paper.pixel_variant, paper.pixel_ssim_weight) == ("source", "correct", 0.5)
    assert (paper.group_key, paper.invalid, paper.valid_reduction) == ("record", "drop", "global")
    assert dict(paper.reward_weights) == dict(official.reward_weights) == {"judge": 0.8, "pixel": 0.2}
    assert (official.ner_target, official.pixel_variant, official.pixel_ssim_weight) == ("sample", "official", 0.35)
    assert (official.group_key, official.invalid, official.valid_reduction) == ("prompt", "zero_weight", "micro")
    assert (official.lambda_ner, official.lambda_er, official.kl_weight) == (0.8, 0.5, 1e-4)
    assert preset("cocoedit-corrected") == paper.replace(er_policy="positive")
    for name in ("cocoedit-routed", "edit-r1", "diffusion-nft"):
        assert not preset(name).uses_regions
    for cfg in (paper, official):
        assert (cfg.ban, cfg.ban_std, cfg.ban_mean, cfg.ema_decay) == (True, 0.02, 0.9, 0)
        assert (cfg.tau_pos, cfg.tau_neg, cfg.erode_preserve, cfg.erode_edit, cfg.ring_weight) == (
            1e-3,
            3e-2,
            2,
            2,
            0.2,
        )
        assert (cfg.beta, cfg.adv_clip, cfg.advantage_std, cfg.old_decay_type) == (1, 5, "global", 1)
    routed, judge_only = preset("cocoedit-routed"), preset("edit-r1")
    assert (routed.r_granularity, routed.adv_clip, routed.routed_inside_weight) == ("token", 2, 4)
    assert (judge_only.ban, judge_only.ban_std, judge_only.ema_decay) == (False, 0.05, 0.9)
    assert dict(judge_only.reward_weights) == dict(routed.reward_weights) == {"judge": 1}


def test_number_of_timesteps():
    """Ten sampler steps: the released code trains any nine; without pure noise those nine are all there are."""
    assert preset("cocoedit-official").num_timesteps(10) == preset("cocoedit").num_timesteps(10) == 9
    assert preset("cocoedit").replace(timestep_fraction=1.0).num_timesteps(10) == 9
    assert preset("cocoedit-official").replace(timestep_fraction=1.0).num_timesteps(10) == 10
    assert preset("cocoedit").replace(timestep_fraction=0.17).num_timesteps(6) == 1
    assert preset("cocoedit").num_timesteps(1) == 1
