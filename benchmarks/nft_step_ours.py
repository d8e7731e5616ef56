"""Our side of ``nft_step``; also draws the weights and inputs of both."""

import functools
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from benchmarks import nft_step_problem as problem
from cocoedit_jax.flow.packing import position_ids
from cocoedit_jax.models import lora, lora_files, weights
from cocoedit_jax.models.flux import FluxConfig, FluxTransformer
from cocoedit_jax.models.layers import LORA
from cocoedit_jax.nft.objective import ObjectiveInputs, nft_objective
from cocoedit_jax.nft.presets import preset
from cocoedit_jax.train.step import make_optimizer

LORA_CONFIG = lora.LoraConfig(problem.LORA_RANK, problem.LORA_ALPHA)


def draw_params(abstract: Any, rng: np.random.Generator) -> Any:
    """Weights under which activations keep their size from layer to layer."""

    def leaf(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape, np.float32)
        if path[-1] == "scale":
            return 1 + 0.1 * noise
        if path[-1] == "bias":
            return 0.02 * noise
        return noise * (0.3 if "norm" in path[-3] or "norm" in path[-2] else 1.0) / shape[-2] ** 0.5

    flat = weights.flatten(abstract)
    return weights.unflatten({path: leaf(("", "", *path), x.shape) for path, x in flat.items()})


class Ours:
    def __init__(self, folder: Path, device: str, dtype: str, size: str) -> None:
        if device != "auto":
            jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[device])
        if dtype == "float32":
            jax.config.update("jax_default_matmul_precision", "highest")  # no TF32, as in PyTorch
        self.folder, self.size, self.dtype = folder, problem.SIZES[size], jnp.dtype(dtype)
        self.config = FluxConfig(**self.size.model)
        grids = [position_ids(self.size.side, self.size.side, index) for index in (0, 1)]
        self.ids = np.concatenate([np.zeros((self.size.text, 3), np.int32), *grids])
        self.optimizer = make_optimizer(problem.LEARNING_RATE, problem.WEIGHT_DECAY, problem.MAX_GRADIENT_NORM)
        self.steps: dict[str, Any] = {}

    def info(self) -> dict[str, Any]:
        device = jax.devices()[0]
        return {
            "device": "cpu" if device.platform == "cpu" else "gpu",
            "kind": device.device_kind,
            "jax": jax.__version__,
            "parameters": sum(x.size for x in jax.tree.leaves(self.params)),
        }

    def prepare(self) -> dict[str, Any]:
        size, rng = self.size, np.random.default_rng(0)
        tokens, channels, cells = size.side**2, self.config.in_channels, size.side * problem.PATCH

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal((size.batch, *shape), np.float32)

        keep = np.ones((size.batch, cells, cells), np.float32)
        keep[:, cells // 4 : cells // 2, cells // 4 : 3 * cells // 4] = 0
        inputs = {
            "x0": normal(tokens, channels),
            "noise": normal(tokens, channels),
            "source": normal(tokens, channels),
            "text": normal(size.text, self.config.joint_attention_dim),
            "pooled": normal(self.config.pooled_projection_dim),
            "t": np.asarray(problem.TIMES[: size.batch], np.float32),
            "guidance": np.full(size.batch, problem.GUIDANCE, np.float32),
            "preserve_latent": keep,
            "r": np.linspace(0.1, 0.8, size.batch).astype(np.float32),
            "tau_pos": np.full(size.batch, 1e-3, np.float32),
            "tau_neg": np.full(size.batch, 5.0, np.float32),  # high enough for the edit hinge to be active
        }
        abstract = nn.unbox(jax.eval_shape(lambda: self._init(inputs)))["params"]
        params = draw_params(abstract, rng)
        adapters = {}
        for name in problem.ADAPTERS:
            fresh = jax.eval_shape(lambda: lora.init_adapter(jax.random.key(0), abstract, LORA_CONFIG))
            # Both halves at 0.05: the adapter changes the velocity by some percent.
            adapters[name] = jax.tree.map(lambda x: 0.05 * rng.standard_normal(x.shape, np.float32), fresh)
            lora_files.save_lora(self.folder / name, adapters[name], LORA_CONFIG)
        weights.save_safetensors(self.folder / problem.WEIGHTS_FILE, weights.to_diffusers(params))
        weights.save_safetensors(self.folder / problem.INPUTS_FILE, inputs)

        self.params = jax.tree.map(lambda x: jnp.asarray(x, self.dtype), params)
        self.theta, self.old = (jax.tree.map(jnp.asarray, adapters[name]) for name in problem.ADAPTERS)
        self.inputs = {name: jnp.asarray(x) for name, x in inputs.items()}
        self.opt_state = self.optimizer.init(self.theta)
        self.start = self.theta
        return {}

    def _init(self, inputs: dict[str, np.ndarray]) -> Any:
        hidden = np.concatenate([inputs["x0"], inputs["source"]], axis=1)
        arguments = (inputs["text"], inputs["pooled"], inputs["t"], inputs["guidance"], self.ids, 1)
        return FluxTransformer(self.config).init(jax.random.key(0), jnp.asarray(hidden), *arguments)

    def _loss(self, theta: Any, old: Any, params: Any, inputs: Any, variant: dict[str, Any]) -> jax.Array:
        cfg = preset("cocoedit").replace(kl_weight=variant["kl_weight"])
        model = FluxTransformer(self.config, self.dtype, variant["remat"])
        t = inputs["t"][:, None, None]
        x_t = (1 - t) * inputs["x0"] + t * inputs["noise"]

        def velocity(adapter: Any) -> jax.Array:
            variables = {"params": params}
            if adapter is not None:
                variables[LORA] = lora.fold_scale(adapter, LORA_CONFIG)
            hidden = jnp.concatenate([x_t, inputs["source"]], axis=1)
            conditioning = (inputs[name] for name in ("text", "pooled", "t", "guidance"))
            return model.apply(variables, hidden, *conditioning, self.ids, x_t.shape[1])  # type: ignore[return-value]

        v_theta = velocity(theta)
        v_old = jax.lax.stop_gradient(v_theta if variant["on_policy"] else velocity(old))
        v_ref = jax.lax.stop_gradient(velocity(None)) if cfg.kl_weight > 0 else None
        fields = {name: inputs[name] for name in ("x0", "source", "t", "r", "tau_pos", "tau_neg", "preserve_latent")}
        return nft_objective(
            ObjectiveInputs(x_t=x_t, v_old=v_old, v_theta=v_theta, v_ref=v_ref, patch=problem.PATCH, **fields), cfg
        ).loss.mean()

    def gradient(self, variant: dict[str, Any], path: str) -> dict[str, Any]:
        function = jax.jit(jax.value_and_grad(functools.partial(self._loss, variant=variant)))
        loss, gradient = function(self.start, self.old, self.params, self.inputs)
        weights.save_safetensors(Path(path), weights.to_diffusers(gradient))
        return {"loss": float(loss)}

    def _compile(self, variant: dict[str, Any]) -> Any:
        def step(theta: Any, opt_state: Any, old: Any, params: Any, inputs: Any) -> tuple[Any, Any, jax.Array]:
            loss, gradient = jax.value_and_grad(self._loss)(theta, old, params, inputs, variant)
            updates, opt_state = self.optimizer.update(gradient, opt_state, theta)
            return optax.apply_updates(theta, updates), opt_state, loss

        return jax.jit(step)

    def step(self, variant: dict[str, Any]) -> dict[str, Any]:
        key = repr(variant)
        if key not in self.steps:
            self.steps[key] = self._compile(variant)
        start = time.perf_counter()
        state = self.steps[key](self.theta, self.opt_state, self.old, self.params, self.inputs)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - start
        self.theta, self.opt_state, loss = state
        return {"seconds": seconds, "loss": float(loss)}


if __name__ == "__main__":
    ours = Ours(Path(sys.argv[1]), *sys.argv[2:])
    problem.serve({name: getattr(ours, name) for name in ("info", "prepare", "gradient", "step")})
