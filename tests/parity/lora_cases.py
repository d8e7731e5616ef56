"""Random adapters, diffusers' Kontext pipeline around a tiny transformer, and how its adapters compare with ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cocoedit_jax.models import lora, lora_files, weights
from tests.parity.flux_cases import Case
from tests.parity.transformer_cases import SEED, relative_error

LATENT_CHANNELS = 4


def random_adapter(case: Case, config: lora.LoraConfig) -> lora.Adapter:
    """An adapter for the case's model, both factors random."""
    abstract = jax.eval_shape(lambda key: lora.init_adapter(key, case.abstract(), config), jax.random.key(0))
    rng = np.random.default_rng([SEED, 1])
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape, np.float32)), abstract)


def build_pipeline(transformer: Any) -> Any:
    """FLUX Kontext without text encoders (embeddings are passed in) and with a tiny autoencoder."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1159,
        scaling_factor=0.3611,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = FluxKontextPipeline(scheduler, vae, None, None, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_same_adapter(model: Any, name: str, adapter: lora.Adapter, config: lora.LoraConfig) -> None:
    """Every adapted module of the PyTorch ``model`` holds ours, and no module more."""
    ours = weights.to_diffusers(adapter)
    found = {}
    for path, module in model.named_modules():
        if hasattr(module, "lora_A"):
            path = path.removeprefix("base_model.model.")
            assert module.scaling[name] == config.scale
            for half in ("lora_A", "lora_B"):
                found[f"{path}.{half}.weight"] = getattr(module, half)[name].weight.detach().numpy()
    assert found.keys() == ours.keys()
    for key in ours:
        np.testing.assert_array_equal(found[key], ours[key], err_msg=key)


def adapter_effects(model: Any, name: str) -> dict[str, np.ndarray]:
    """{module: change of its weight} of every adapted module of the PyTorch ``model``."""
    found = {}
    for path, module in model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = (getattr(module, half)[name].weight.detach().double().numpy() for half in ("lora_A", "lora_B"))
            found[path.removeprefix("base_model.model.")] = module.scaling[name] * b @ a
    return found


def effects(adapter: lora.Adapter, config: lora.LoraConfig) -> dict[str, np.ndarray]:
    """{module: change of its weight [out, in]}, from the adapter tree alone."""
    tensors = weights.to_diffusers(adapter)
    names = {name.rpartition(".lora_")[0] for name in tensors}
    return {
        name: config.alpha / config.rank * tensors[f"{name}.lora_B.weight"].astype(np.float64)
        @ tensors[f"{name}.lora_A.weight"]
        for name in names
    }  # fmt: skip


def assert_same_effects(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert relative_error(found[name], expected[name]) < 1e-6, name


def write(path: Path, adapter: lora.Adapter, config: lora.LoraConfig, format: str) -> Path:
    return lora_files.write_lora(path, lora_files.adapter_layers(adapter, config), config, format)
