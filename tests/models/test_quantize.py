"""Quantised kernels: products against the float reference and its error bound, gradients, remat, files, devices."""

import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import orbax_weights, quantize, weights
from cocoedit_jax.models.flux import FluxTransformer, abstract_params
from cocoedit_jax.models.layers import LORA, Linear
from cocoedit_jax.models.quantize import FORMATS, Kernel
from cocoedit_jax.models.sharded_weights import load_sharded, save_sharded
from cocoedit_jax.planning.workload import PUBLISHED
from cocoedit_jax.sharding.flops import forward_flops
from cocoedit_jax.sharding.mesh import SAMPLE_AXES, make_mesh
from cocoedit_jax.sharding.rules import manual_specs, parameter_shardings, sharded_shapes
from cocoedit_jax.train.plan import published_editor
from tests.models.tiny_flux import CONFIG, CONFIG_JSON, normal_params

IN, OUT, TOKENS = 96, 40, 17
EVERY = pytest.mark.parametrize("name", list(FORMATS))


def drawn(dtype=jnp.float32, seed=0):
    """Activations with outliers, and a kernel with columns of very different size; one of each is all zero."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, TOKENS, IN)) * np.exp(rng.standard_normal((2, TOKENS, 1)))
    x[0, 0] = 0
    kernel = rng.standard_normal((IN, OUT)) * np.exp(2 * rng.standard_normal(OUT))
    kernel[:, 3] = 0
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


def rounding_error(x, name, axis):
    """Largest error of ``round_to``: half a step for whole numbers; half a unit in the last of 4 bits, or of the
    subnormal numbers below 2^-6 steps, for fp8."""
    step = np.abs(x).max(axis=axis, keepdims=True) / FORMATS[name].limit
    if FORMATS[name].dtype == jnp.int8:
        return np.broadcast_to(step / 2, x.shape)
    return np.maximum(np.abs(x) * 2.0**-4, step * 2.0**-10)


@EVERY
def test_product_is_within_the_bound_of_its_roundings(name):
    x, kernel = drawn()
    found = np.asarray(quantize.matmul(x, quantize.quantize(kernel, name)), np.float64)
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    exact = x @ kernel
    of_x = rounding_error(x, name, -1) if FORMATS[name].activations else 0 * x
    of_kernel = rounding_error(kernel, name, 0)
    # (x + dx)(w + dw) - x w
    bound = np.abs(x) @ of_kernel + of_x @ (np.abs(kernel) + of_kernel) + 1e-5 * (np.abs(x) @ np.abs(kernel))
    error = np.abs(found - exact)
    assert (error <= bound).all()
    assert (found[0, 0] == 0).all() and (found[..., 3] == 0).all()
    # The bound means something: the error is a sum of independent roundings, far below their worst case.
    relative = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert (1e-3 if FORMATS[name].dtype == jnp.int8 else 1e-2) < relative < (0.02 if name != "fp8" else 0.06)


@EVERY
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_numbers_of_the_format_are_exact(name, dtype):
    rng = np.random.default_rng(1)
    form = FORMATS[name]
    top = 127 if form.dtype == jnp.int8 else 448
    choices = np.arange(-127, 128) if top == 127 else np.asarray([-448, -3.5, -1, -0.5, 0, 0.5, 1.5, 30, 448])
    x, kernel = rng.choice(choices, (TOKENS, 8)), rng.choice(choices, (8, OUT))
    x[:, 0], kernel[0] = top, -top  # the largest number of every token and column
    x, kernel = x * 2.0 ** rng.integers(-3, 4, (TOKENS, 1)), kernel * 2.0 ** rng.integers(-3, 4, OUT)
    stored = quantize.quantize(jnp.asarray(kernel, dtype), name)
    np.testing.assert_array_equal(np.asarray(quantize.dequantize(stored), np.float64), kernel)
    found = quantize.matmul(jnp.asarray(x, dtype), stored)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(jnp.asarray(x @ kernel, dtype)))


@EVERY
def test_gradient_is_that_of_the_stored_kernel(name):
    x, kernel = drawn()
    stored = quantize.quantize(kernel, name)
    weight = np.random.default_rng(2).standard_normal((2, TOKENS, OUT)).astype(np.float32)
    found = jax.grad(lambda x: jnp.sum(weight * quantize.matmul(x, stored)))(x)
    expected = jax.grad(lambda x: jnp.sum(weight * (x @ quantize.dequantize(stored))))(x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
    x, kernel = drawn(jnp.bfloat16)
    bf16 = jax.grad(lambda x: jnp.sum(weight * quantize.matmul(x, stored).astype(jnp.float32)))(x)
    assert bf16.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(bf16, np.float32), expected, atol=0.01 * np.abs(expected).max())


@EVERY
def test_what_is_not_finite_stays_so(name):
    x, kernel = drawn()
    for bad in (jnp.nan, jnp.inf):
        rows = quantize.matmul(x.at[0, 2, 5].set(bad), quantize.quantize(kernel, name))
        assert not jnp.isfinite(rows[0, 2]).any() and jnp.isfinite(rows[0, 1]).all()
        columns = quantize.matmul(x, quantize.quantize(kernel.at[5, 7].set(bad), name))
        assert not jnp.isfinite(columns[1, :, 7]).any() and jnp.isfinite(columns[..., 8]).all()


def layer(name):
    """A linear layer with an adapter: ``(adapter, x) -> y``, and both."""
    module, (x, kernel) = Linear(OUT, ("embed", "heads")), drawn()
    rng = np.random.default_rng(3)
    normal = lambda *shape: jnp.asarray(0.1 * rng.standard_normal(shape), jnp.float32)  # noqa: E731
    adapter = {"lora_A": normal(IN, 4), "lora_B": normal(4, OUT)}
    params = {"kernel": quantize.quantize(kernel, name) if name else kernel, "bias": normal(OUT)}
    apply: Any = lambda adapter, x: module.apply({"params": params, LORA: adapter}, x)  # noqa: E731
    return apply, adapter, x


@EVERY
def test_adapter_works_on_what_is_not_rounded(name):
    """Its branch is bit for bit that of the layer in full precision, and so are its gradients."""
    apply, adapter, x = layer(name)
    plain, *_ = layer("")
    without = {k: 0 * v for k, v in adapter.items()}
    branch, expected = apply(adapter, x) - apply(without, x), plain(adapter, x) - plain(without, x)
    np.testing.assert_allclose(branch, expected, atol=1e-5 * np.abs(plain(adapter, x)).max())
    gradients = [jax.grad(lambda a: jnp.sum(f(a, x)))(adapter) for f in (apply, plain)]  # noqa: B023
    for ours, theirs in zip(*(jax.tree.leaves(g) for g in gradients), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "name, product",
    [
        ("int8", r"xi8>, tensor<96x40xi8>\) -> tensor<2x17x40xi32>"),
        ("fp8", r"xf8E4M3FN>, tensor<96x40xf8E4M3FN>\) -> tensor<2x17x40xf32>"),
        ("int8_weights", r"xbf16>, tensor<96x40xbf16>\) -> tensor<2x17x40xf32>"),
    ],
)
def test_the_program_multiplies_numbers_of_the_format(name, product):
    x, kernel = drawn(jnp.bfloat16)
    stored = quantize.quantize(kernel, name)
    text = jax.jit(quantize.matmul).lower(x, stored).as_text()
    (dot,) = re.findall(r"stablehlo.dot_general .*", text)
    assert re.search(product, dot), dot


@pytest.mark.parametrize("axes", [("embed", "heads"), ("heads", "embed")], ids=str)
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_layer_that_is_split_rounds_alike(name, axes):
    """Over fsdp, whose shards it fetches, and tensor, over which it sums or shares its results."""
    (x, kernel), module = drawn(), Linear(OUT, axes)
    boxed = {
        "kernel": nn.LogicallyPartitioned(kernel, axes),
        "bias": nn.LogicallyPartitioned(jnp.ones(OUT), quantize.result_axes(axes)),
    }
    boxed = quantize.quantize_params({"single_transformer_blocks": {"proj_mlp": boxed}}, name)
    mesh, samples = make_mesh({"fsdp": 2, "tensor": 2}), PartitionSpec(SAMPLE_AXES)

    def run(params, x):
        apply: Any = lambda x: module.apply({"params": params["single_transformer_blocks"]["proj_mlp"]}, x)  # noqa: E731
        return apply(x), jax.grad(lambda x: jnp.sum(apply(x) ** 2))(x)

    split = jax.shard_map(
        run, mesh=mesh, in_specs=(manual_specs(boxed, mesh), samples), out_specs=samples,
        axis_names=frozenset(SAMPLE_AXES), check_vma=False,
    )  # fmt: skip
    found = jax.jit(split)(jax.device_put(nn.unbox(boxed), parameter_shardings(boxed, mesh)), x)
    for ours, expected in zip(found, run(nn.unbox(boxed), x), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*PUBLISHED, "qwen_image_edit_2511"])
def test_the_large_layers_of_the_blocks_are_quantised_and_no_others(kind):
    """All that ``forward_flops`` counts as linear, and neither modulation nor what is outside of the blocks."""
    params = published_editor(kind).abstract()["transformer"]
    config = published_editor(kind).transformer.config
    stored = jax.eval_shape(lambda: quantize.quantize_params(nn.unbox(_zeros(params)), "int8"))
    kernels = {path: x for path, x in weights.flatten(stored).items() if quantize.is_kernel(x)}
    assert all(path[0] in weights.STACKED for path in kernels)
    sizes = {len({path[:2] for path in kernels if path[0] == stack}) for stack in weights.STACKED}
    assert sizes  # per stack: attention, and one or two MLPs
    # A double-stream block has two streams, of which each token passes one.
    half = sum(x.values.size / (2 if path[0] == "transformer_blocks" else 1) for path, x in kernels.items())
    assert 2 * half == forward_flops(config, 1) - config.num_blocks * 4 * config.hidden
    large = {
        ".".join(path)
        for path, x in weights.flatten(stored).items()
        if not quantize.is_kernel(x) and path[0] in weights.STACKED and path[-1] == "kernel"
    }
    assert all("norm" in name or "_mod" in name for name in large), large


def _zeros(shapes):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def test_scales_are_split_as_the_results_are():
    """Kernels [embed, heads] over fsdp and tensor: their scales over tensor; those of [heads, embed] not at all."""
    boxed = jax.eval_shape(lambda: quantize.quantize_params(_zeros(abstract_params(CONFIG)), "int8"))
    placed = sharded_shapes(boxed, make_mesh({"fsdp": 2, "tensor": 2}))["transformer_blocks"]["attn"]
    spec = lambda x: tuple(x.sharding.spec)  # noqa: E731
    query, out = placed["to_q"]["kernel"], placed["to_out.0"]["kernel"]
    assert (spec(query.values), spec(query.scale)) == ((None, "fsdp", "tensor"), (None, "tensor"))
    assert (spec(out.values), spec(out.scale)) == ((None, "tensor", "fsdp"), (None, None))
    assert query.scale.shape == (2, 12) and query.scale.dtype == jnp.float32


def test_remat_policies_keep_no_sums():
    """No int32 number is kept for the backward pass, nor a kernel of full precision; and gradients are the same."""
    params = quantize.quantize_params(jax.tree.map(jnp.asarray, normal_params()), "int8")
    rng = np.random.default_rng(0)
    x, text, pooled = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((1, 8, 4), (1, 2, 8), (1, 4)))
    ids, half = np.zeros((10, 3), np.int32), jnp.full(1, 0.5)

    def loss(remat):
        network: Any = FluxTransformer(CONFIG, remat=remat)
        return lambda x: jnp.sum(network.apply({"params": params}, x, text, pooled, half, half, ids, 8) ** 2)

    for remat in ("none", "dots", "attention"):  # the others keep nothing of a block's inside
        kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(loss(remat), x)[1], x))  # noqa: B023
        assert not [leaf for leaf in kept if leaf.dtype == jnp.int32 and leaf.ndim > 1]
        # All kernels that there are: 12 x 12 and 12 x 48, in stacks of 2 and 3.
        stacks = [x for x in kept if x.ndim == 3 and x.shape[1:] in ((12, 12), (12, 48), (48, 12), (60, 12))]
        assert all(leaf.dtype == jnp.int8 for leaf in stacks), remat
    found, expected = (jax.jit(jax.grad(loss(remat)))(x) for remat in ("dots", "none"))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "orbax"])
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_loading_quantises_layer_by_layer(tmp_path, name, form):
    """What arrives, on a mesh that splits it, is the quantised form of what is stored, bit for bit."""
    params = normal_params()
    if form == "orbax":
        orbax_weights.save_orbax(tmp_path, jax.tree.map(jnp.asarray, params), CONFIG_JSON)
    else:
        save_sharded(tmp_path, params, max_shard_size=20_000)
    boxed = jax.eval_shape(lambda: quantize.quantize_params(_zeros(abstract_params(CONFIG)), name))
    abstract = sharded_shapes(boxed, make_mesh({"fsdp": 2, "tensor": 2}))
    load = load_sharded if form == "safetensors" else orbax_weights.load_orbax
    loaded = load(tmp_path, abstract)
    expected = quantize.quantize_params(jax.tree.map(jnp.asarray, params), name)
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    assert sum(quantize.is_kernel(x) for x in weights.flatten(loaded).values()) == 17
    for ours, theirs, shape in zip(*(jax.tree.leaves(t) for t in (loaded, expected, abstract)), strict=True):
        assert (ours.dtype, ours.sharding) == (theirs.dtype, shape.sharding)
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


# --- what is refused -------------------------------------------------------------------------------------------------


def test_unknown_names_are_refused():
    quantize.check_format("", "config.model.quantize")
    with pytest.raises(UserError, match=r"config\.model\.quantize='int4'; expected one of \['int8'"):
        quantize.check_format("int4", "config.model.quantize")


@pytest.mark.parametrize(
    "platform, kind, capability, usable",
    [
        ("cpu", "cpu", None, True),
        ("tpu", "TPU v5 lite", None, False),
        ("tpu", "TPU v6 lite", None, False),
        ("tpu", "TPU7x", None, True),
        ("gpu", "NVIDIA A100-SXM4-80GB", "8.0", False),
        ("gpu", "NVIDIA H100", "9.0", True),
        ("gpu", "NVIDIA L40S", "8.9", True),
        ("gpu", "NVIDIA B200", "10.0", True),
    ],
)
def test_fp8_needs_its_arithmetic(platform, kind, capability, usable):
    device = SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)
    for name in ("int8", "int8_weights", ""):
        quantize.check_format(name, "config.model.quantize", device)
    if usable:
        return quantize.check_format("fp8", "config.model.quantize", device)
    with pytest.raises(UserError, match=f"config.model.quantize='fp8' on a {kind}.*expected int8"):
        quantize.check_format("fp8", "config.model.quantize", device)


def test_a_format_that_stores_other_numbers_is_no_substitute():
    stored = quantize.quantize(drawn()[1], "int8")
    same = quantize.with_format(stored, "int8_weights")
    assert isinstance(same, Kernel) and same.values is stored.values and same.format == "int8_weights"
    assert quantize.with_format({"a": stored, "b": 1}, "int8_weights")["b"] == 1
    with pytest.raises(ValueError, match="stored as int8 cannot be used as fp8"):
        quantize.with_format(stored, "fp8")
