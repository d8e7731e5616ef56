"""Tiny random Qwen-Image transformers in PyTorch, and their weights in our layout."""

import dataclasses
from typing import Any

import numpy as np

from cocoedit_jax.models.qwen import QwenConfig, QwenTransformer, position_ids
from tests.parity.transformer_cases import SEED, TransformerCase, randomise, round_frequencies


@dataclasses.dataclass
class QwenCase(TransformerCase):
    """A Qwen-Image transformer."""

    hidden: np.ndarray
    text: np.ndarray
    text_mask: np.ndarray | None
    t: np.ndarray
    grids: list[tuple[int, int]]  # target first

    @property
    def ids(self) -> np.ndarray:
        return position_ids(self.grids, self.text.shape[1])

    @property
    def num_target(self) -> int:
        return self.grids[0][0] * self.grids[0][1]

    @property
    def inputs(self) -> tuple:
        return self.hidden, self.text, self.text_mask, self.t, self.ids, self.num_target

    def run_reference(self, dtype: str = "float32") -> Any:
        import torch

        hidden, text, t = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in (self.hidden, self.text, self.t))
        out = self.reference(
            hidden_states=hidden,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=None if self.text_mask is None else torch.from_numpy(self.text_mask),
            timestep=t,
            img_shapes=[[(1, *grid) for grid in self.grids]] * len(self.hidden),
            return_dict=False,
        )[0]
        return out[:, : self.num_target].float()


def draw_qwen_case(index: int, **overrides: Any) -> QwenCase:
    """Case ``index`` of this run's seed: odd ones have ragged texts, the last two are of the 2511 variant."""
    import torch
    from diffusers import QwenImageTransformer2DModel

    rng = np.random.default_rng([SEED, 100 + index])
    axes = tuple(int(2 * n) for n in rng.integers(1, 7, 3))
    out_channels = int(rng.integers(2, 6))
    options = {
        "in_channels": 4 * out_channels,
        "num_layers": int(rng.integers(1, 4)),
        "attention_head_dim": sum(axes),
        "num_attention_heads": int(rng.integers(1, 5)),
        "joint_attention_dim": int(rng.integers(5, 40)),
        "axes_dims_rope": axes,
        "zero_cond_t": index >= 2,
    } | overrides
    torch.manual_seed(0)
    reference = QwenImageTransformer2DModel(patch_size=2, out_channels=options["in_channels"] // 4, **options).eval()
    randomise(reference, rng)
    round_frequencies(reference, scale=1000.0)
    batch, num_text = int(rng.integers(2, 4)), int(rng.integers(3, 10))
    # One, two or three images behind the target.
    grids = [tuple(sides) for sides in rng.integers(1, 8, (2 + index % 3, 2)).tolist()]
    lengths = rng.integers(1, num_text + 1, batch)
    lengths[int(rng.integers(batch))] = num_text

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    return QwenCase(
        QwenConfig(**options),
        reference,
        QwenTransformer,
        hidden=normal(batch, sum(rows * columns for rows, columns in grids), options["in_channels"]),
        text=normal(batch, num_text, options["joint_attention_dim"]),
        text_mask=np.arange(num_text) < lengths[:, None] if index % 2 else None,
        t=rng.uniform(0, 1, batch).astype(np.float32),
        grids=grids,
    )
