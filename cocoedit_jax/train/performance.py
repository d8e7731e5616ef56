"""Samples per second and model FLOPs utilisation (MFU) of a step, by formula."""

from collections.abc import Mapping

from cocoedit_jax.models.editor import Grid
from cocoedit_jax.sharding.flops import forward_flops, lora_gradient_flops, peak_flops
from cocoedit_jax.train.setup import Setup

_BETWEEN_STEPS = ("evaluate", "checkpoint")


class Performance:
    """Rates of the steps of one run; measures the peak of an unknown device once.

    Attributes:
        peak: FLOP/s of all devices of the mesh.
        peak_source: where that figure is from.
    """

    def __init__(self, setup: Setup):
        self._setup = setup
        one, self.peak_source = peak_flops()
        devices = self._setup.mesh.devices.flat
        # Devices of the CPU platform are shares of one machine, whose peak was measured with all of its threads.
        self.peak = one * (1 if devices[0].platform == "cpu" else len(devices))

    def __call__(
        self, seconds: Mapping[str, float], metrics: Mapping[str, float], grid: Grid, text_tokens: int
    ) -> dict[str, float]:
        """``samples_per_second`` and ``mfu/PHASE`` of a step on images of ``grid``.

        ``seconds`` holds ``seconds/PHASE``; ``metrics`` holds ``samples/drawn`` and ``samples/used``.
        """
        cfg, rollout = self._setup.algorithm, self._setup.config.rollout
        shape, tokens = self._setup.editor.transformer.config, 2 * grid.tokens + text_tokens
        drawn = int(metrics["samples/drawn"])
        used = rollout.groups * rollout.group_size if cfg.invalid == "zero_weight" else int(metrics["samples/used"])
        timesteps = cfg.num_timesteps(rollout.steps)
        forwards = cfg.forwards_without_gradient
        work = {
            "rollout": rollout.steps * forward_flops(shape, tokens, drawn),
            "train": timesteps
            * (lora_gradient_flops(shape, tokens, used) + forwards * forward_flops(shape, tokens, used)),
        }
        step = sum(value for name, value in seconds.items() if name.removeprefix("seconds/") not in _BETWEEN_STEPS)
        out = {"samples_per_second": drawn / step}
        for phase, flops in work.items():
            taken = seconds.get(f"seconds/{phase}", 0.0)
            if taken:
                out[f"mfu/{phase}"] = flops / taken / self.peak
        return out
