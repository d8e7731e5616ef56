"""Noise levels of flow-matching samplers with a resolution-dependent shift."""

import math

import numpy as np

from cocoedit_jax.errors import UserError


def flow_match_sigmas(
    num_steps: int,
    image_seq_len: int,
    *,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_seq_len: int = 256,
    max_seq_len: int = 4096,
    shift_terminal: float | None = None,
) -> np.ndarray:
    """Noise levels from 1 down to 0 with the exponential shift of FLUX and Qwen-Image samplers.

    The unshifted levels are ``linspace(1, 1/N, N)``; each becomes ``e^mu / (e^mu + 1/s - 1)`` with ``mu`` linear in the
    number of target tokens (the dynamic shift of ``FlowMatchEulerDiscreteScheduler``).

    Args:
        num_steps: N, the number of network calls.
        image_seq_len: number of target tokens (1024 for a 512 px square with 8x compression and 2x2 packing).
        base_shift: ``mu`` at ``base_seq_len`` tokens.
        max_shift: ``mu`` at ``max_seq_len`` tokens.
        base_seq_len: tokens at which ``base_shift`` holds.
        max_seq_len: tokens at which ``max_shift`` holds.
        shift_terminal: when given, the levels are stretched so that the last one before 0 has this value (Qwen: 0.02).

    Returns:
        float64 ``[N + 1]``, strictly decreasing, first 1, last 0.

    Raises:
        UserError: for a non-positive ``num_steps`` or ``image_seq_len``, equal sequence lengths, or a
            ``shift_terminal`` outside (0, 1).
    """
    if num_steps < 1:
        raise UserError(f"num_steps is {num_steps}; expected a positive number of sampling steps")
    if image_seq_len < 1:
        raise UserError(f"image_seq_len is {image_seq_len}; expected a positive number of tokens")
    if max_seq_len == base_seq_len:
        raise UserError(f"base_seq_len and max_seq_len are both {max_seq_len}; expected two different token counts")
    sigmas = np.linspace(1.0, 1.0 / num_steps, num_steps)
    slope = (max_shift - base_shift) / (max_seq_len - base_seq_len)
    shift = math.exp(base_shift + (image_seq_len - base_seq_len) * slope)
    # The parentheses make the first level exactly 1, which the second-order solver treats as pure noise.
    sigmas = shift / (shift + (1.0 / sigmas - 1.0))
    if shift_terminal is not None:
        if not 0.0 < shift_terminal < 1.0:
            raise UserError(f"shift_terminal is {shift_terminal}; expected a noise level in (0, 1)")
        # One step has only the level 1, which a stretch cannot move.
        if num_steps > 1:
            sigmas = 1.0 - (1.0 - sigmas) * ((1.0 - shift_terminal) / (1.0 - sigmas[-1]))
    return np.append(sigmas, 0.0)
