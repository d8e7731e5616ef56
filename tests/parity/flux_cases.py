"""Tiny random FLUX transformers in PyTorch, drawn from ``PARITY_SEED`` (default 0), and their weights in our layout."""

import dataclasses
import math
import os
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from cocoedit_jax.flow.packing import position_ids
from cocoedit_jax.models import lora, weights
from cocoedit_jax.models.flux import FluxConfig, FluxTransformer

SEED = int(os.environ.get("PARITY_SEED", "0"))
NUM_CASES = 4
RANK, ALPHA = 3, 7.5


def randomise(module: Any, rng: np.random.Generator) -> None:
    """Fills every parameter; norm weights and biases too, so that leaving one out shows."""
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.from_numpy(rng.standard_normal(tuple(parameter.shape), np.float32))
            if ".lora_" in name:
                parameter.copy_(0.3 * noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.5 * noise)
            else:
                parameter.copy_(0.3 * noise)


def round_frequencies(reference: Any) -> None:
    """Makes the frequencies of the reference's time embedding correctly rounded, as ours are.

    torch's float32 exp is one unit off in some of them, and times 1000 t that is an angle 1e-4 rad off: more than all
    other differences together. ``test_time_text_embed`` compares with the embedding as it is.
    """
    import torch

    class Sinusoids(torch.nn.Module):
        def forward(self, t: Any) -> Any:
            exponent = -math.log(10_000) * torch.arange(128, dtype=torch.float32) / 128
            angles = t[:, None] * torch.exp(exponent.double()).float()
            return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)

    reference.time_text_embed.time_proj = Sinusoids()


def to_numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().numpy()


@dataclasses.dataclass
class Case:
    """One model with one batch of inputs; ``reference`` is the PyTorch module."""

    config: FluxConfig
    reference: Any
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

    def fresh_reference(self) -> Any:
        """Another PyTorch model with the same base weights and no adapter."""
        import torch

        model = type(self.reference)(**{k: v for k, v in self.reference.config.items() if not k.startswith("_")}).eval()
        model.load_state_dict({name: torch.from_numpy(array) for name, array in self.state().items()})
        return model

    def apply(self, variables: Any, **options: Any) -> jax.Array:
        """Our transformer on the case's inputs."""
        return jax.jit(lambda v: FluxTransformer(self.config, **options).apply(v, *self.inputs))(variables)

    def abstract(self) -> Any:
        init = FluxTransformer(self.config).init
        return nn.unbox(jax.eval_shape(lambda key: init(key, *self.inputs), jax.random.key(0))["params"])

    def state(self) -> dict[str, np.ndarray]:
        """The reference's own weights, under their names before any adapter was injected."""
        return {
            name.replace(".base_layer", ""): to_numpy(tensor)
            for name, tensor in self.reference.state_dict().items()
            if ".lora_" not in name
        }

    def params(self) -> Any:
        return weights.from_diffusers(self.state(), self.abstract(), "PyTorch model")

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

    def inject_adapter(self, rng: np.random.Generator) -> None:
        from peft import LoraConfig

        config = self.lora_config
        self.reference.add_adapter(
            LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets))  # type: ignore[arg-type]
        )
        randomise(self.reference, rng)

    def adapter_of(self, tensors: dict[str, np.ndarray]) -> Any:
        """PEFT's in-memory names -> an adapter tree."""
        abstract = jax.eval_shape(
            lambda key: lora.init_adapter(key, self.abstract(), self.lora_config), jax.random.key(0)
        )
        return weights.from_diffusers(
            {k.replace(".default", ""): v for k, v in tensors.items()}, abstract, "PEFT model"
        )

    def adapter(self) -> Any:
        return self.adapter_of({k: to_numpy(v) for k, v in self.reference.state_dict().items() if ".lora_" in k})


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
        hidden=normal(batch, len(ids) - num_text, config.in_channels),
        text=normal(batch, num_text, config.joint_attention_dim),
        pooled=normal(batch, config.pooled_projection_dim),
        t=rng.uniform(0, 1, batch).astype(np.float32),
        guidance=rng.uniform(1, 5, batch).astype(np.float32),
        ids=ids,
        num_text=num_text,
        num_target=len(grids[0]),
    )


def relative_error(ours: Any, reference: Any) -> float:
    """Largest absolute difference over the largest absolute value of the reference."""
    reference = reference if isinstance(reference, np.ndarray) else to_numpy(reference)
    ours = np.asarray(ours, np.float32)
    assert ours.shape == reference.shape
    assert np.isfinite(reference).all() and np.ptp(reference) > 0
    return float(np.abs(ours - reference).max() / np.abs(reference).max())
