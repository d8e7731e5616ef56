"""What rounding the frozen base to 8 bits does to velocities and edits.

    python -m benchmarks.quantized blocks [--tokens=64]      # blocks of real width with random weights
    python -m benchmarks.quantized quickstart [--scenes=128] # the packaged base and its held-out scenes

Errors are relative to float32 arithmetic on the same weights: root mean square of the difference over that of the
velocity. Says nothing of speed.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cocoedit_jax.data.source import load_batch
from cocoedit_jax.models.editor import Editor
from cocoedit_jax.models.flux import FluxConfig, FluxTransformer
from cocoedit_jax.models.quantize import FORMATS, quantize_params
from cocoedit_jax.models.qwen import QwenConfig, QwenTransformer
from cocoedit_jax.models.text import instructions
from cocoedit_jax.train.evaluate import Evaluator
from cocoedit_jax.train.setup import Setup, build
from configs.quickstart import get_config

SIGMAS = (0.25, 0.5, 0.75, 1.0)
# Name of a row, format of the base, dtype of activations.
WAYS = [("float32", "", jnp.float32), ("bfloat16", "", jnp.bfloat16)]
WAYS += [(f"{name}, {dtype}", name, jnp.dtype(dtype)) for dtype in ("float32", "bfloat16") for name in FORMATS]


def error(found: Any, exact: Any) -> float:
    """Root mean square of the difference, relative."""
    found, exact = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def random_weights(transformer: Any, seed: int = 0) -> Any:
    """Numbers that bfloat16 has, as published weights are: kernels and biases so that every layer keeps the size of
    what it is given, norms about one."""
    shapes = nn.unbox(jax.eval_shape(transformer.init_params, jax.random.key(0)))
    rng = np.random.default_rng(seed)

    def draw(path: Any, x: Any) -> jax.Array:
        name = path[-1].key
        values = rng.standard_normal(x.shape, np.float32)
        if name == "kernel":
            values *= x.shape[-2] ** -0.5
        else:
            values = 0.1 * values + (name == "scale")
        return jnp.asarray(values, jnp.bfloat16).astype(jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def at_sigmas(network: Any, params: Any, arguments: Any) -> list[jax.Array]:
    """Velocities at ``SIGMAS``; ``arguments``: of the network at one of them."""
    apply = jax.jit(lambda params, t: network.apply({"params": params}, *arguments(t)))
    return [apply(params, jnp.full(1, sigma)) for sigma in SIGMAS]


def blocks(tokens: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Of each model with one block of every kind: errors of the velocity by row."""
    text, key = 16, jax.random.key(1)
    normal = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)  # noqa: E731
    ids = np.stack([np.zeros(tokens + text), *np.divmod(np.arange(tokens + text), 16)], axis=-1).astype(np.int32)
    for model in ("FLUX.1 Kontext, 1 + 1 blocks", "Qwen-Image-Edit, 1 block"):
        if model.startswith("FLUX"):
            shape = FluxConfig(num_layers=1, num_single_layers=1)
            network: Any = FluxTransformer(shape)
            inputs: Any = (normal(0, 1, tokens, 64), normal(1, 1, text, 4096), normal(2, 1, 768))
            arguments = lambda t, inputs=inputs: (*inputs, t, jnp.full(1, 2.5), ids, tokens // 2)  # noqa: E731
        else:
            network = QwenTransformer(QwenConfig(num_layers=1))
            inputs = (normal(0, 1, tokens, 64), normal(1, 1, text, 3584), None)
            arguments = lambda t, inputs=inputs: (*inputs, t, ids, tokens // 2)  # noqa: E731
        weights = random_weights(network)
        found: dict[str, float] = {}
        exact: list[Any] = []
        for name, form, dtype in WAYS:
            velocities = at_sigmas(network.clone(dtype=dtype), quantize_params(weights, form), arguments)
            exact = exact or velocities
            found[name] = error(velocities, exact)
        yield model, found


def in_way(setup: Setup, form: str, dtype: Any) -> Setup:
    """``setup`` with its base in another format and dtype."""
    editor = dataclasses.replace(setup.editor, quantize=form, transformer=setup.editor.transformer.clone(dtype=dtype))
    base = setup.base.quantized(editor.abstract()) if form else setup.base
    return dataclasses.replace(setup, editor=editor, base=base)


def velocities(setup: Setup, scenes: int) -> np.ndarray:
    """Of the base at the sampler's sigmas, halfway between noise and the source picture as the sigma says."""
    editor: Editor = setup.editor
    params, batch = setup.base.on(setup.rollout_mesh), load_batch(setup.held_out, range(scenes))
    grid = editor.grid(*setup.framing.sizes[0])
    conditioning = editor.encode(params, batch["image"], editor.text_inputs(instructions(batch)))
    noise = jax.random.normal(jax.random.key(3), conditioning.source.shape)

    @jax.jit
    def at(params: Any, sigma: jax.Array) -> jax.Array:
        x_t = (1 - sigma) * conditioning.source + sigma * noise
        return editor.velocity(params, None, x_t, jnp.full(scenes, sigma), conditioning, grid)

    return np.stack([at(params, jnp.float32(s)) for s in editor.sigmas(6, grid)[:-1]])


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Per picture ``[N, H, W, 3]``, dB."""
    return -10 * np.log10(np.maximum(np.mean((a - b) ** 2, axis=(1, 2, 3)), 1e-12))


def quickstart(scenes: int) -> Iterator[str]:
    """Lines of a table: every way to run the packaged base."""
    setup = build(get_config())
    exact: tuple[Any, Any, Any] | None = None
    for name, form, dtype in WAYS:
        own = in_way(setup, form, dtype)
        velocity = velocities(own, min(scenes, 32))
        edits = Evaluator(own)(None, scenes)
        pictures = np.stack(edits.images)
        exact = exact or (velocity, edits, pictures)
        change, near = edits.difference(exact[1]), psnr(pictures, exact[2])
        metrics = [
            f"{change[k]['mean']:+.{d}f} ± {change[k]['se']:.{d}f}" for k, d in (("judge", 3), ("psnr_outside", 2))
        ]
        low, middle = np.percentile(near, [5, 50])
        cells = [f"{error(velocity, exact[0]):.2%}", f"{middle:.1f}", f"{low:.1f}", *metrics]
        yield f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["blocks", "quickstart"])
    parser.add_argument("--tokens", type=int, default=64, help="image tokens, target and source")
    parser.add_argument("--scenes", type=int, default=128, help="held-out scenes")
    args = parser.parse_args()
    if args.part == "blocks":
        for model, found in blocks(args.tokens):
            print(f"\n{model}\n" + "\n".join(f"| {name} | {value:.3%} |" for name, value in found.items()), flush=True)
        return
    print("| base, activations | velocity error | edits against float32, dB (median) | (5 %) | judge | PSNR outside |")
    for line in quickstart(args.scenes):
        print(line, flush=True)


if __name__ == "__main__":
    main()
