"""Tiny random FLUX transformers in PyTorch, and their weights in our layout."""

import dataclasses
from typing import Any

import numpy as np

from cocoedit_jax.flow.packing import position_ids
from cocoedit_jax.models import lora
from cocoedit_jax.models.flux import FluxConfig, FluxTransformer
from tests.parity.transformer_cases import ALPHA, RANK, SEED, TransformerCase, randomise, round_frequencies


@dataclasses.dataclass
class Case(TransformerCase):
    """A FLUX transformer."""

    hidden: np.ndarray
    text: np.ndarray
    pooled: np.ndarray
    t: np.ndarray
    guidance: np.ndarray | None
    ids: np.ndarray
    num_text: int
    num_target: int

    @property
    def inputs(self) -> tuple:
        return self.hidden, self.text, self.pooled, self.t, self.guidance, self.ids, self.num_target

    def run_reference(self) -> Any:
        """The PyTorch model's velocity of the target tokens."""
        import torch

        out = self.reference(
            hidden_states=torch.from_numpy(self.hidden),
            encoder_hidden_states=torch.from_numpy(self.text),
            pooled_projections=torch.from_numpy(self.pooled),
            timestep=torch.from_numpy(self.t),
            guidance=torch.from_numpy(self.guidance) if self.config.guidance_embeds else None,
            txt_ids=torch.from_numpy(self.ids[: self.num_text]).float(),
            img_ids=torch.from_numpy(self.ids[self.num_text :]).float(),
            return_dict=False,
        )[0]
        return out[:, : self.num_target]

    @property
    def lora_config(self) -> lora.LoraConfig:
        # Without double blocks there is no second stream, and PEFT matches only the first three.
        targets = lora.DEFAULT_TARGETS if self.config.num_layers else lora.DEFAULT_TARGETS[:3]
        return lora.LoraConfig(RANK, ALPHA, targets)


def draw_case(index: int, **overrides: Any) -> Case:
    """Case ``index`` of this run's seed. Case 0 has no double block, case 1 no guidance embedding."""
    import torch
    from diffusers import FluxTransformer2DModel

    rng = np.random.default_rng([SEED, index])
    axes = tuple(int(2 * n) for n in rng.integers(1, 7, 3))
    options = {
        "in_channels": int(rng.integers(2, 20)),
        "num_layers": 0 if index == 0 else int(rng.integers(1, 4)),
        "num_single_layers": int(rng.integers(1, 4)),
        "attention_head_dim": sum(axes),
        "num_attention_heads": int(rng.integers(1, 5)),
        "joint_attention_dim": int(rng.integers(5, 40)),
        "pooled_projection_dim": int(rng.integers(5, 40)),
        "guidance_embeds": index != 1,
        "axes_dims_rope": axes,
    } | overrides
    config = FluxConfig(**options)
    torch.manual_seed(0)
    reference = FluxTransformer2DModel(patch_size=1, **options).eval()
    randomise(reference, rng)
    round_frequencies(reference)
    batch, num_text = int(rng.integers(1, 4)), int(rng.integers(1, 10))
    sides = rng.integers(1, 8, (2, 2)).tolist()
    grids = [position_ids(height, width, index) for index, (height, width) in enumerate(sides)]
    ids = np.concatenate([np.zeros((num_text, 3), np.int32), *grids])

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    return Case(
        config,
        reference,
        FluxTransformer,
        hidden=normal(batch, len(ids) - num_text, config.in_channels),
        text=normal(batch, num_text, config.joint_attention_dim),
        pooled=normal(batch, config.pooled_projection_dim),
        t=rng.uniform(0, 1, batch).astype(np.float32),
        guidance=rng.uniform(1, 5, batch).astype(np.float32),
        ids=ids,
        num_text=num_text,
        num_target=len(grids[0]),
    )
