"""The NFT loss with region regularisers, per sample.

The policy term is DiffusionNFT (arXiv 2509.16117) in x0 space with its self-normalising weight; the two hinges are
CoCoEdit's (arXiv 2602.14068). Everything is float32, whatever the network computes in. Means over samples are taken by
the caller: ``reduce_micro`` for the released code's reduction, ``reduce_global`` for equal weight of all valid samples.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from cocoedit_jax.errors import UserError
from cocoedit_jax.flow.packing import token_share, unpack
from cocoedit_jax.nft.presets import NFTConfig
from cocoedit_jax.nft.regions import region_weights, weighted_mse

Array = jax.Array

# Smallest mean |x0 error| that the adaptive weight divides by (released code).
MIN_ADAPTIVE_WEIGHT = 1e-5


class ObjectiveInputs(struct.PyTreeNode):
    """One micro-batch at one timestep per sample. Latents are packed tokens ``[B, n, c]`` (see ``flow.packing``)."""

    x0: Array  # sampled latent
    x_t: Array  # (1 - t) x0 + t noise
    source: Array  # latent of the source image
    t: Array  # [B] noise level in [0, 1]
    v_old: Array  # velocity of the old policy
    v_theta: Array  # velocity of the policy being trained
    r: Array  # [B] or [B, n] optimality in [0, 1]
    tau_pos: Array  # [B] hinge of the region to keep
    tau_neg: Array  # [B] hinge of the edit region
    v_ref: Array | None = None  # velocity without adapter; None = no KL term
    ref_weight: Array | None = None  # [B] times that v_ref counts, 0 where it was not computed (zeros); None = 1
    preserve_latent: Array | None = None  # [B, h, w] 1 = keep; needed when regions are used or r is per token
    token_weight: Array | None = None  # [B, n] weight of each token in the policy term; None = 1
    patch: int = struct.field(pytree_node=False, default=2)  # latent cells per token side


class ObjectiveOutput(struct.PyTreeNode):
    """Per-sample results, float32 ``[B]``.

    ``terms``: ``policy``, ``ner``, ``er``, ``bg_neg`` and ``kl`` are shares of the loss, weights included, and add up
    to ``loss``. ``ner_distance``, ``er_distance`` (latent mean squares), ``deviation_old``, ``deviation_ref`` (mean
    squared velocity differences) and ``x0_error`` (mean square of the trained policy's x0 error) are for the log.
    """

    loss: Array
    terms: dict[str, Array]


Objective = Callable[[ObjectiveInputs, NFTConfig], ObjectiveOutput]
OBJECTIVES: dict[str, Objective] = {}


def register_objective(name: str) -> Callable[[Objective], Objective]:
    """Decorator: make an objective selectable as ``NFTConfig.objective``. Raises ``UserError`` for a taken name."""

    def register(function: Objective) -> Objective:
        if name in OBJECTIVES:
            raise UserError(f"objective {name!r} is already registered; expected a new name")
        OBJECTIVES[name] = function
        return function

    return register


def get_objective(name: str) -> Objective:
    """The registered objective. Raises ``UserError`` for an unknown name."""
    if name not in OBJECTIVES:
        raise UserError(f"objective is {name!r}; expected one of {sorted(OBJECTIVES)}")
    return OBJECTIVES[name]


def implicit_velocities(v_old: Array, v_theta: Array, beta: float) -> tuple[Array, Array]:
    """Implicit positive and negative policies ``v_old +- beta (v_theta - v_old)`` (arXiv 2509.16117)."""
    difference = beta * (v_theta - v_old)
    return v_old + difference, v_old - difference


def _token_errors(prediction: Array, x0: Array, weighting: str) -> Array:
    """Mean square over channels of the x0 error, ``[B, n]``; "adaptive" divides by the sample's mean absolute error.

    The divisor is per sample also when r is per token: a divisor per token would cancel the size of each token's error
    and so the difference between a token that is nearly right and one that is not.
    """
    error = prediction - x0
    squares = jnp.square(error).mean(axis=-1)
    if weighting == "none":
        return squares
    scale = jnp.maximum(jnp.abs(error).mean(axis=(1, 2)), MIN_ADAPTIVE_WEIGHT)
    return squares / jax.lax.stop_gradient(scale)[:, None]


def _sample_optimality(inputs: ObjectiveInputs, r: Array) -> Array:
    """``[B]``: r itself, or the mean of a token map over the edit region (over all tokens if that region is empty)."""
    if r.ndim == 1:
        return r
    if inputs.preserve_latent is None:
        return r.mean(axis=1)
    inside = token_share(1.0 - inputs.preserve_latent.astype(jnp.float32), inputs.patch)
    total = inside.sum(axis=1)
    masked = (r * inside).sum(axis=1) / jnp.maximum(total, 1e-6)
    return jnp.where(total > 0, masked, r.mean(axis=1))


def _region_terms(
    inputs: ObjectiveInputs, cfg: NFTConfig, positive: Array, negative: Array, r: Array
) -> dict[str, Array]:
    if inputs.preserve_latent is None:
        raise UserError("preserve_latent is missing; expected a [B, h, w] mask because a region weight is not 0")
    _, height, width = inputs.preserve_latent.shape

    def grid(tokens: Array) -> Array:
        return unpack(tokens, height, width, inputs.patch)

    w_preserve, w_edit = region_weights(inputs.preserve_latent, cfg.erode_preserve, cfg.erode_edit, cfg.ring_weight)
    x0 = inputs.x0.astype(jnp.float32)
    source = inputs.source.astype(jnp.float32)
    ner_target = source if cfg.ner_target == "source" else x0
    er_target = source if cfg.er_target == "source" else x0
    er_prediction = positive if cfg.er_policy == "positive" else negative

    d_ner = weighted_mse(grid(positive), grid(ner_target), w_preserve)
    d_er = weighted_mse(grid(er_prediction), grid(er_target), w_edit)
    ner_share = jnp.ones_like(r) if cfg.ner_on_all_samples else r
    terms = {
        "ner": cfg.lambda_ner * ner_share * jax.nn.relu(d_ner - inputs.tau_pos),
        "er": cfg.lambda_er * (1.0 - r) * jax.nn.relu(inputs.tau_neg - d_er),
        "bg_neg": jnp.zeros_like(r),
        "ner_distance": d_ner,
        "er_distance": d_er,
    }
    if cfg.bg_weight_neg > 0 and cfg.lambda_bg_neg > 0:
        weight = jnp.clip(cfg.bg_weight_neg * w_preserve, 0.0, 1.0)
        d_bg = weighted_mse(grid(negative), grid(ner_target), weight)
        terms["bg_neg"] = cfg.lambda_bg_neg * (1.0 - r) * jax.nn.relu(d_bg - cfg.tau_bg_neg)
    return terms


@register_objective("nft")
def nft_objective(inputs: ObjectiveInputs, cfg: NFTConfig) -> ObjectiveOutput:
    """Policy term, region hinges and KL of every sample.

    ``policy = (r l+ + (1 - r) l-) adv_clip / beta``, where ``l+-`` are mean squares of the implicit policies' x0
    errors. The factor ``adv_clip`` undoes the division in the map from advantage to r: at ``v_theta = v_old`` the
    gradient is the clipped advantage times the gradient of ``l``, for every ``beta`` and ``adv_clip``. With ``r`` per
    token the policy term is the mean over tokens weighted by ``token_weight``, and the hinges use the mean of r over
    the edit region (over all tokens where that region is empty).

    Raises:
        UserError: when a region weight is not 0 and ``preserve_latent`` is missing, or shapes do not fit.
    """
    x0, x_t, v_old, v_theta, t, r = (
        a.astype(jnp.float32) for a in (inputs.x0, inputs.x_t, inputs.v_old, inputs.v_theta, inputs.t, inputs.r)
    )
    if r.shape not in (x0.shape[:1], x0.shape[:2]):
        raise UserError(f"r has shape {r.shape}; expected {x0.shape[:1]} or {x0.shape[:2]}")

    v_positive, v_negative = implicit_velocities(v_old, v_theta, cfg.beta)
    positive = x_t - t[:, None, None] * v_positive
    negative = x_t - t[:, None, None] * v_negative
    token_r = r if r.ndim == 2 else r[:, None]
    per_token = token_r * _token_errors(positive, x0, cfg.policy_weighting)
    per_token += (1.0 - token_r) * _token_errors(negative, x0, cfg.policy_weighting)
    if inputs.token_weight is None:
        policy = per_token.mean(axis=1)
    else:
        weight = inputs.token_weight.astype(jnp.float32)
        policy = (per_token * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1e-6)

    zeros = jnp.zeros_like(t)
    terms = {
        "policy": policy * (cfg.adv_clip / cfg.beta),
        "ner": zeros,
        "er": zeros,
        "bg_neg": zeros,
        "kl": zeros,
        "ner_distance": zeros,
        "er_distance": zeros,
        "deviation_old": jnp.square(v_theta - v_old).mean(axis=(1, 2)),
        "deviation_ref": zeros,
        "x0_error": jnp.square(x_t - t[:, None, None] * v_theta - x0).mean(axis=(1, 2)),
    }
    if cfg.uses_regions:
        terms |= _region_terms(inputs, cfg, positive, negative, _sample_optimality(inputs, r))
    if inputs.v_ref is not None:
        terms["deviation_ref"] = jnp.square(v_theta - inputs.v_ref.astype(jnp.float32)).mean(axis=(1, 2))
        if inputs.ref_weight is not None:
            terms["deviation_ref"] *= inputs.ref_weight.astype(jnp.float32)
        terms["kl"] = cfg.kl_weight * terms["deviation_ref"]
    loss = terms["policy"] + terms["ner"] + terms["er"] + terms["bg_neg"] + terms["kl"]
    return ObjectiveOutput(loss=loss, terms=terms)


def reduce_micro(values: Array, valid: Array) -> Array:
    """Mean over the valid samples of one micro-batch, 0 if there is none (released code).

    The released code then averages micro-batches with equal weight, so a sample counts more in a micro-batch with few
    valid ones. ``values`` and ``valid`` are ``[B]``; the result is a float32 scalar.
    """
    return reduce_global(values, valid, valid.astype(jnp.float32).sum())


def reduce_global(values: Array, valid: Array, count: Array | float) -> Array:
    """Sum over the valid samples divided by ``count``, the number of valid samples of the whole step.

    Summed over all micro-batches and devices this is the mean with equal weight for every valid sample; 0 if ``count``
    is 0. ``values`` and ``valid`` are ``[B]``; the result is a float32 scalar.
    """
    kept = jnp.where(valid.astype(jnp.float32) > 0, values.astype(jnp.float32), 0.0)
    return kept.sum() / jnp.maximum(jnp.asarray(count, jnp.float32), 1.0)
