"""What parity cases of transformers share: a tiny random PyTorch model, one batch of inputs, and weights in our layout.

Everything is drawn from ``PARITY_SEED`` (default 0).
"""

import dataclasses
import math
import os
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from cocoedit_jax.models import lora, weights

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


def round_frequencies(reference: Any, scale: float = 1.0) -> None:
    """Makes the frequencies of the reference's time embedding correctly rounded, as ours are.

    torch's float32 exp is one unit off in some of them, and times 1000 t that is an angle 1e-4 rad off: more than all
    other differences together. The tests of the embeddings compare with them as they are.

    Args:
        scale: of the angles; FLUX multiplies t before, Qwen-Image the angles.
    """
    import torch

    class Sinusoids(torch.nn.Module):
        def forward(self, t: Any) -> Any:
            exponent = -math.log(10_000) * torch.arange(128, dtype=torch.float32) / 128
            angles = t[:, None] * torch.exp(exponent.double()).float()
            angles = scale * angles
            return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)

    reference.time_text_embed.time_proj = Sinusoids()


def to_numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().numpy()


@dataclasses.dataclass
class TransformerCase:
    """One model with one batch of inputs; ``reference`` is the PyTorch module, ``transformer`` our class of it."""

    config: Any
    reference: Any
    transformer: Any

    @property
    def inputs(self) -> tuple:
        """Arguments of our transformer."""
        raise NotImplementedError

    def run_reference(self) -> Any:
        """The PyTorch model's velocity of the target tokens."""
        raise NotImplementedError

    def fresh_reference(self) -> Any:
        """Another PyTorch model with the same base weights and no adapter."""
        import torch

        model = type(self.reference)(**{k: v for k, v in self.reference.config.items() if not k.startswith("_")}).eval()
        model.load_state_dict({name: torch.from_numpy(array) for name, array in self.state().items()})
        return model

    def apply(self, variables: Any, **options: Any) -> jax.Array:
        """Our transformer on the case's inputs."""
        return jax.jit(lambda v: self.transformer(self.config, **options).apply(v, *self.inputs))(variables)

    def abstract(self) -> Any:
        init = self.transformer(self.config).init
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

    @property
    def lora_config(self) -> lora.LoraConfig:
        return lora.LoraConfig(RANK, ALPHA)

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


def relative_error(ours: Any, reference: Any) -> float:
    """Largest absolute difference over the largest absolute value of the reference."""
    reference = reference if isinstance(reference, np.ndarray) else to_numpy(reference)
    ours = np.asarray(ours, np.float32)
    assert ours.shape == reference.shape
    assert np.isfinite(reference).all() and np.ptp(reference) > 0
    return float(np.abs(ours - reference).max() / np.abs(reference).max())
