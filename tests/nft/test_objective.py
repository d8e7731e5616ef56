import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.nft.objective import (
    ObjectiveInputs,
    get_objective,
    nft_objective,
    reduce_global,
    reduce_micro,
    register_objective,
)
from cocoedit_jax.nft.presets import NFTConfig, preset

B, H, W, C, P = 3, 8, 12, 2, 2
TOKENS = (B, H * W // P**2, C * P**2)


def make_inputs(seed=0, **changes):
    rng = np.random.default_rng(seed)
    x0, noise, source, v_old, v_theta = (jnp.asarray(rng.normal(size=TOKENS), jnp.float32) for _ in range(5))
    t = jnp.asarray(rng.uniform(0.1, 0.9, B), jnp.float32)
    keep = np.ones((B, H, W), np.float32)
    keep[:, 1:7, 2:9] = 0
    values = {
        "x0": x0,
        "x_t": (1 - t[:, None, None]) * x0 + t[:, None, None] * noise,
        "source": source,
        "t": t,
        "v_old": v_old,
        "v_theta": v_theta,
        "r": jnp.asarray(rng.uniform(0.1, 0.9, B), jnp.float32),
        "tau_pos": jnp.full(B, 1e-3),
        "tau_neg": jnp.full(B, 3e-2),
        "preserve_latent": jnp.asarray(keep),
        "patch": P,
    }
    return ObjectiveInputs(**(values | changes))


def plain(**changes):
    base = {"lambda_ner": 0.0, "lambda_er": 0.0, "kl_weight": 0.0}
    return NFTConfig.from_dict(base | changes)


def gradient(inputs, cfg, term=None):
    def total(v_theta):
        out = nft_objective(inputs.replace(v_theta=v_theta), cfg)
        return (out.loss if term is None else out.terms[term]).sum()

    return jax.grad(total)(inputs.v_theta)


@pytest.mark.parametrize("weighting", ["none", "adaptive"])
@pytest.mark.parametrize(("beta", "clip"), [(1.0, 5.0), (0.1, 2.0)])
def test_gradient_at_the_old_policy_is_the_advantage_times_the_regression_gradient(weighting, beta, clip):
    advantage = jnp.asarray([-1.5, 0.0, 0.7], jnp.float32)
    inputs = make_inputs(r=advantage / (2 * clip) + 0.5)
    inputs = inputs.replace(v_theta=inputs.v_old)

    def regression(v):
        error = inputs.x_t - inputs.t[:, None, None] * v - inputs.x0
        scale = jax.lax.stop_gradient(jnp.abs(error).mean(axis=(1, 2))) if weighting == "adaptive" else 1.0
        return (jnp.square(error).mean(axis=(1, 2)) / scale).sum()

    expected = advantage[:, None, None] * jax.grad(regression)(inputs.v_old)
    ours = gradient(inputs, plain(beta=beta, adv_clip=clip, policy_weighting=weighting))
    np.testing.assert_allclose(ours, expected, atol=1e-4 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("weighting", ["none", "adaptive"])
def test_constant_token_map_equals_the_sample_r(weighting):
    cfg, inputs = plain(policy_weighting=weighting), make_inputs()
    spread = inputs.replace(r=jnp.broadcast_to(inputs.r[:, None], TOKENS[:2]), token_weight=jnp.full(TOKENS[:2], 3.0))
    np.testing.assert_allclose(nft_objective(spread, cfg).loss, nft_objective(inputs, cfg).loss, rtol=1e-5)


def test_token_weight_moves_the_policy_term_to_its_tokens():
    inputs = make_inputs()
    weight = jnp.zeros(TOKENS[:2]).at[:, 5].set(2.0)
    g = gradient(inputs.replace(r=jnp.full(TOKENS[:2], 0.8), token_weight=weight), plain())
    assert float(jnp.abs(g[:, 5]).min()) > 0
    assert float(jnp.abs(g.at[:, 5].set(0.0)).max()) == 0


def test_terms_add_up_and_stay_per_sample():
    cfg = NFTConfig(bg_weight_neg=0.5, lambda_bg_neg=0.7, tau_neg=3.0).validate()
    rng = np.random.default_rng(5)
    v_ref = jnp.asarray(rng.normal(size=TOKENS), jnp.float32)
    inputs = make_inputs(v_ref=v_ref, tau_neg=jnp.full(B, 30.0))
    out = nft_objective(inputs, cfg)
    parts = [out.terms[k] for k in ("policy", "ner", "er", "bg_neg", "kl")]
    assert all(part.shape == (B,) and float(part.min()) > 0 for part in parts)
    np.testing.assert_allclose(out.loss, sum(parts), rtol=1e-6)
    np.testing.assert_allclose(out.terms["kl"], 1e-4 * ((inputs.v_theta - v_ref) ** 2).mean((1, 2)), rtol=1e-5)
    assert all(value.shape == (B,) and value.dtype == jnp.float32 for value in out.terms.values())
    # A change to one sample changes that sample alone.
    other = nft_objective(inputs.replace(v_theta=inputs.v_theta.at[1].add(1.0)), cfg)
    np.testing.assert_array_equal(other.loss[jnp.array([0, 2])], out.loss[jnp.array([0, 2])])


def test_bfloat16_network_outputs_are_accepted():
    inputs = make_inputs()
    low = inputs.replace(v_theta=inputs.v_theta.astype(jnp.bfloat16), v_old=inputs.v_old.astype(jnp.bfloat16))
    out = jax.jit(nft_objective, static_argnums=1)(low, preset("cocoedit"))
    assert out.loss.dtype == jnp.float32
    assert out.terms["kl"].tolist() == [0.0] * B


def test_targets_of_the_non_edit_term():
    inputs = make_inputs(r=jnp.ones(B))
    # The trained policy predicts the source: nothing to correct against the source, something against the sample.
    inputs = inputs.replace(v_theta=(inputs.x_t - inputs.source) / inputs.t[:, None, None])
    paper = NFTConfig()
    assert float(nft_objective(inputs, paper).terms["ner"].max()) == 0
    assert float(nft_objective(inputs, paper.replace(ner_target="sample")).terms["ner"].min()) > 0
    rejected = inputs.replace(r=jnp.zeros(B), v_theta=inputs.v_old)
    assert float(nft_objective(rejected, paper).terms["ner"].max()) == 0
    assert float(nft_objective(rejected, paper.replace(ner_on_all_samples=True)).terms["ner"].min()) > 0


@pytest.mark.parametrize(("er_policy", "moves"), [("negative", "towards"), ("positive", "away from")])
def test_direction_of_the_edit_term(er_policy, moves):
    """Written on the negative policy its descent moves the trained policy to the source, on the positive away."""
    inputs = make_inputs(r=jnp.zeros(B), tau_neg=jnp.full(B, 100.0))
    inputs = inputs.replace(v_theta=inputs.v_old)
    cfg = NFTConfig(er_policy=er_policy, erode_edit=0, erode_preserve=0)

    def distance(v):
        out = nft_objective(inputs.replace(v_theta=v), cfg.replace(er_policy="positive"))
        return float(out.terms["er_distance"].sum())

    stepped = inputs.v_theta - 0.1 * gradient(inputs, cfg, "er")
    change = distance(stepped) - distance(inputs.v_theta)
    assert change < 0 if moves == "towards" else change > 0


def test_mask_without_edit_region_gives_the_threshold_and_no_gradient():
    inputs = make_inputs(r=jnp.zeros(B), preserve_latent=jnp.ones((B, H, W)))
    cfg = NFTConfig(lambda_er=1.0)
    np.testing.assert_allclose(nft_objective(inputs, cfg).terms["er"], 0.03, rtol=1e-6)
    assert float(jnp.abs(gradient(inputs, cfg, "er")).max()) == 0


def test_mask_without_region_to_keep_has_no_non_edit_term():
    inputs = make_inputs(preserve_latent=jnp.zeros((B, H, W)))
    assert float(nft_objective(inputs, NFTConfig()).terms["ner"].max()) == 0
    assert float(jnp.abs(gradient(inputs, NFTConfig(), "ner")).max()) == 0


def test_regions_take_the_token_map_inside_the_edit_region():
    inputs = make_inputs()
    keep = np.ones((B, H, W), np.float32)
    keep[:, :2, :2] = 0  # token 0
    keep[:, :1, 2:4] = 0  # half of token 1
    keep[2] = 1
    token_r = jnp.full(TOKENS[:2], 0.1).at[:, 0].set(0.9).at[:, 1].set(0.6)
    out = nft_objective(inputs.replace(r=token_r, preserve_latent=jnp.asarray(keep)), NFTConfig(tau_pos=0.0))
    unit = nft_objective(inputs.replace(r=jnp.ones(B), preserve_latent=jnp.asarray(keep)), NFTConfig(tau_pos=0.0))
    share = out.terms["ner"] / unit.terms["ner"]
    np.testing.assert_allclose(share, [0.8, 0.8, float(token_r[2].mean())], rtol=1e-5)


def test_reductions():
    values, valid = jnp.asarray([1.0, jnp.nan, 3.0]), jnp.asarray([1.0, 0.0, 1.0])
    assert float(reduce_micro(values, valid)) == 2.0
    assert float(reduce_global(values, valid, 8)) == 0.5
    assert float(reduce_micro(values, jnp.zeros(3))) == 0.0
    assert float(reduce_global(values, jnp.zeros(3, bool), jnp.asarray(0))) == 0.0


def test_registry_and_bad_input():
    assert get_objective("nft") is nft_objective
    with pytest.raises(UserError, match="objective is 'ppo'"):
        get_objective("ppo")
    with pytest.raises(UserError, match="already registered"):
        register_objective("nft")(nft_objective)
    with pytest.raises(UserError, match="preserve_latent is missing"):
        nft_objective(make_inputs(preserve_latent=None), NFTConfig())
    with pytest.raises(UserError, match="r has shape"):
        nft_objective(make_inputs(r=jnp.zeros(B + 1)), plain())
