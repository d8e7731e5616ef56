"""Classifier-free guidance with a rescaled norm."""

from typing import Any

import jax.numpy as jnp

Array = Any


def rescaled_guidance(velocity: Array, negative: Array, scale: float) -> Array:
    """``negative + scale (velocity - negative)``, every token brought back to the norm of ``velocity``.

    As diffusers' QwenImageEditPipeline ("true CFG"). Inputs and result are ``[B, S, C]``.
    """
    combined = negative + scale * (velocity - negative)
    norm = jnp.linalg.norm(velocity, axis=-1, keepdims=True)
    return combined * (norm / jnp.linalg.norm(combined, axis=-1, keepdims=True))
