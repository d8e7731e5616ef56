"""Numbers of the released PyTorch code, recomputed here: every case of the golden files, values and gradients."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cocoedit_jax.flow.packing import downsample_mask_nearest
from cocoedit_jax.flow.solvers import sample
from cocoedit_jax.nft.advantage import advantages, banned, group_statistics
from cocoedit_jax.nft.objective import ObjectiveInputs, nft_objective, reduce_micro
from cocoedit_jax.nft.presets import preset
from cocoedit_jax.rewards.pixel import pixel_reward

GOLDEN = Path(__file__).parent / "golden"
VAE_FACTOR, PATCH = 8, 2


def load(name):
    """``{case: {key: array}}``."""
    cases = {}
    with np.load(GOLDEN / f"{name}.npz") as file:
        for key in file.files:
            case, entry = key.split("/", 1)
            cases.setdefault(case, {})[entry] = file[key]
    return cases


FILES = {name: load(name) for name in ("nft_loss", "pixel_reward", "advantage", "solver")}


def cases(name):
    return [pytest.param(c, id=k) for k, c in FILES[name].items()]


def close(ours, golden, tolerance):
    """Equal to ``tolerance`` of the array's largest value, and of each value with a floor 1e-3 below the largest."""
    ours, golden = np.asarray(ours, np.float64), np.asarray(golden, np.float64)
    largest = np.nanmax(np.abs(golden), initial=0.0)
    np.testing.assert_allclose(ours, golden, rtol=0, atol=tolerance * largest + 1e-12)
    np.testing.assert_allclose(ours, golden, rtol=tolerance, atol=1e-3 * tolerance * largest + 1e-12)


@pytest.mark.parametrize("case", cases("nft_loss"))
def test_loss_terms_and_gradient(case):
    hp = {k.removeprefix("hp_"): v.item() for k, v in case.items() if k.startswith("hp_")}
    cfg = preset("cocoedit-official").replace(
        beta=hp["beta"],
        adv_clip=hp["adv_clip_max"],
        lambda_ner=hp["lambda_ner"],
        lambda_er=hp["lambda_er"],
        er_target="source" if hp["er_reference_is_source"] else "sample",
        erode_preserve=int(hp["erode_preserve"]),
        erode_edit=int(hp["erode_edit"]),
        ring_weight=hp["ring_weight"],
    )
    arrays = {k: jnp.asarray(case[k]) for k in ("x0", "x_t", "t", "v_old", "source", "r")}
    batch = len(case["x0"])
    preserve = downsample_mask_nearest(jnp.asarray(case["preserve_mask"]), VAE_FACTOR)

    def loss(v_theta):
        inputs = ObjectiveInputs(
            **arrays,
            v_theta=v_theta,
            preserve_latent=preserve,
            tau_pos=jnp.full(batch, hp["tau_pos"], jnp.float32),
            tau_neg=jnp.full(batch, hp["tau_neg"], jnp.float32),
            patch=PATCH,
        )
        out = nft_objective(inputs, cfg)
        valid = jnp.asarray(case["valid"])
        return reduce_micro(out.loss, valid), {k: reduce_micro(v, valid) for k, v in out.terms.items()}

    (value, terms), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(case["v_theta"]))
    close(value, case["loss"], 1e-4)
    close(terms["policy"], case["policy_loss"], 1e-4)
    close(terms["ner"], case["ner_term"], 1e-4)
    close(terms["er"], case["er_term"], 1e-4)
    close(gradient, case["grad_v_theta"], 1e-3)


@pytest.mark.parametrize("case", cases("pixel_reward"))
def test_pixel_reward(case):
    cfg = preset("cocoedit-official").replace(
        pixel_psnr_max_db=case["hp_psnr_max_db"].item(), pixel_ssim_weight=case["hp_ssim_weight"].item()
    )
    ours = jax.jit(pixel_reward, static_argnums=3)(
        *(jnp.asarray(case[k]) for k in ("image", "reference", "preserve_mask")), cfg
    )
    np.testing.assert_array_equal(np.isnan(ours.psnr), np.isnan(case["psnr"]))
    for name in ("mse", "psnr", "ssim", "score"):
        close(getattr(ours, name), case[name], 1e-4)
    assert np.all(np.asarray(ours.valid))


@pytest.mark.parametrize("case", cases("advantage"))
def test_advantage(case):
    reward, group = case["reward"], case["group"]
    statistics = group_statistics(reward, group)
    close(statistics.mean, case["group_mean"], 1e-5)
    close(statistics.std, case["group_std"], 1e-5)
    close(advantages(reward, group, std="global" if case["hp_global_std"] else "group"), case["advantage"], 1e-5)
    ids = banned(group, statistics, ban_std=case["hp_ban_std"].item(), ban_mean=case["hp_ban_mean"].item())
    np.testing.assert_array_equal(ids, case["banned"])


@pytest.mark.parametrize(("name", "case"), [pytest.param(k, c, id=k) for k, c in FILES["solver"].items()])
def test_solver(name, case):
    solver, steps = name.rsplit("_", 1)
    matrix = jnp.asarray(case["A"])

    def velocity(z, sigma):
        product = jnp.matmul(z, matrix, precision=jax.lax.Precision.HIGHEST)
        return jnp.tanh(product) * (0.5 + sigma) - 0.1 * z

    final, states = sample(velocity, jnp.asarray(case["z"]), case["sigmas"], solver, return_trajectory=True)
    assert len(states) == int(steps) + 1
    close(final, case["out"], 1e-4)
    close(states, case["traj"], 1e-4)
