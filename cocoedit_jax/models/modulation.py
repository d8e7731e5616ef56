"""Modulation vectors computed beforehand, for a transformer whose modulation depends on the timestep alone.

A sampler visits a handful of sigmas, and training visits the same ones. At those, the modulation of Qwen-Image is 2.2 M
numbers each, while the layers that make it are 6.8 of the 20.4 billion parameters. So the layers are read a few at a
time, their results kept as tables ``[sigmas, features]``, and they themselves dropped.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cocoedit_jax.models import orbax_weights, weights
from cocoedit_jax.models.layers import Modulation
from cocoedit_jax.models.qwen import IMAGE, TEXT, QwenTransformer, TimeEmbed
from cocoedit_jax.models.sharded_weights import unstacked

Array = jax.Array
Tree = dict[str, Any]

TIME, OUT, BLOCKS = "time_text_embed", "norm_out.linear", "transformer_blocks"
_LAYERS = 4  # whose kernels are in memory at once: 0.9 GB at real size in bfloat16


def _makes_modulation(path: tuple[str, ...]) -> bool:
    return path[0] in (TIME, OUT) or path[1] in (IMAGE.modulation, TEXT.modulation)


def split(params: Mapping[str, Any]) -> tuple[Tree, Tree]:
    """The transformer's parameters that are needed beside tables, and those that tables stand in for."""
    flat = weights.flatten(params)
    part = {path: leaf for path, leaf in flat.items() if _makes_modulation(path)}
    rest = {path: leaf for path, leaf in flat.items() if path not in part}
    return weights.unflatten(rest), weights.unflatten(part)


def any_replaced(modules: Iterable[str]) -> bool:
    """Whether tables stand in for any of the linear layers with these diffusers names."""
    return any(_makes_modulation((*weights.module_path(name)[0], "kernel")) for name in modules)


def _values(transformer: QwenTransformer, params: Mapping[str, Any], temb: Array) -> Array:
    """What one modulation layer makes of ``temb`` ``[N, D]``: ``[N, features]``."""
    layer = Modulation(params["kernel"].shape[-1], dtype=transformer.dtype, num_chunks=1)
    chunks: Any = layer.apply({"params": params}, temb)
    return chunks[0][:, 0]


def _embed(transformer: QwenTransformer, params: Mapping[str, Any], sigmas: Array) -> Array:
    out: Any = TimeEmbed(transformer.config.hidden, transformer.dtype).apply({"params": params}, sigmas)
    return out


def tables(transformer: QwenTransformer, part: Mapping[str, Any], sigmas: Sequence[float]) -> Tree:
    """The ``modulation`` collection at ``sigmas`` ``[N]``, of the second result of ``split``, without boxes.

    Tables are ``[layers, N, 6 D]`` in the blocks and ``[N, 2 D]`` in the output layer, boxed with logical axis names.
    """
    levels = jnp.asarray(sigmas, jnp.float32)
    temb = _embed(transformer, part[TIME], levels)
    of_layer = lambda params: _values(transformer, params, temb)  # noqa: E731
    stacks = {name: jax.vmap(of_layer)(params) for name, params in part.get(BLOCKS, {}).items()}
    return _collection(levels, stacks, of_layer(part[OUT]), _boxed)


def _boxed(table: Any, *names: str | None) -> Any:
    return nn.LogicallyPartitioned(table, names)


def _collection(sigmas: Any, stacks: Mapping[str, Any], out: Any, box: Any) -> Tree:
    blocks = {name: {"table": box(table, "layers", None, "modulation")} for name, table in stacks.items()}
    tree = {"sigmas": sigmas, OUT: {"table": box(out, None, "modulation")}}
    return tree | ({BLOCKS: blocks} if blocks else {})


def load_tables(folder: Path, transformer: QwenTransformer, shapes: Tree, abstract: Tree) -> Tree:
    """``tables`` of the transformer in ``folder``, which is read a few layers at a time.

    Args:
        folder: a component folder in either form (``orbax_weights.load_params``).
        shapes: of all of the transformer's parameters, placed as they would be.
        abstract: of the tables, placed, without boxes; its ``sigmas`` is an array that every device holds whole.

    Raises:
        UserError: files or tensors that are missing or do not fit, all together.
    """
    flat = weights.flatten(unstacked(shapes))
    wanted = weights.flatten(unstacked(split(shapes)[1]))

    def load(*parts: str) -> Tree:
        chosen = {path: leaf for path, leaf in wanted.items() if path[0] in parts}
        others = {path: leaf for path, leaf in flat.items() if path not in chosen}
        return orbax_weights.load_params(folder, weights.unflatten(chosen), skip=weights.unflatten(others))

    # Whole everywhere: the host cannot read what is split over the devices of other processes.
    values = jax.jit(_values, static_argnums=0, out_shardings=abstract["sigmas"].sharding)
    ends = load(TIME, OUT)
    sigmas = jnp.asarray(np.asarray(abstract["sigmas"]))
    temb = jax.jit(_embed, static_argnums=0)(transformer, ends[TIME], sigmas)
    host: dict[str, list[np.ndarray]] = {name: [] for name in abstract.get(BLOCKS, {})}
    layers = [f"{BLOCKS}.{i}" for i in range(transformer.config.num_layers)]
    for start in range(0, len(layers), _LAYERS):
        chunk = layers[start : start + _LAYERS]
        loaded = load(*chunk)
        for layer in chunk:
            for name, rows in host.items():
                rows.append(np.asarray(values(transformer, loaded[layer][name], temb)))
    stacks = {name: np.stack(rows) for name, rows in host.items()}
    tree = _collection(sigmas, stacks, values(transformer, ends[OUT], temb), lambda table, *names: table)
    return jax.tree.map(lambda x, like: jax.device_put(x, getattr(like, "sharding", None)), tree, abstract)
