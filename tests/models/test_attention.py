import functools
from typing import Any

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from cocoedit_jax.models import attention as module
from cocoedit_jax.models import attention_blocked, attention_splash
from cocoedit_jax.models.attention import BACKENDS, attention, select_backend
from cocoedit_jax.models.blocks import REMAT_POLICIES

SHAPES = [(2, 5, 7, 3, 4), (1, 1, 1, 1, 2), (3, 8, 4, 2, 6)]  # B, Q, K, H, D


def draw(shape, dtype=np.float32, seed=0):
    batch, queries, keys, heads, dim = shape
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, queries, heads, dim))
    k, v = rng.standard_normal((2, batch, keys, heads, dim))
    mask = rng.random((batch, keys)) < 0.6
    mask[:, 0] = True
    return *(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.asarray(mask)


def reference(q, k, v, mask):
    """Softmax attention in float64, one head of one sample at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape[:3] + v.shape[3:])
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            keys = np.arange(k.shape[1]) if mask is None else np.flatnonzero(np.asarray(mask[b]))
            scores = q[b, :, h] @ k[b, keys, h].T / np.sqrt(q.shape[3])
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[b, :, h] = weights / weights.sum(-1, keepdims=True) @ v[b, keys, h]
    return out


@pytest.fixture(params=[512, 3, 1])
def query_block(request, monkeypatch):
    """Whole sequences in a block, blocks with padding, blocks of one query."""
    monkeypatch.setattr(attention_blocked, "QUERY_BLOCK", request.param)
    return request.param


@pytest.mark.parametrize("backend", ["xla", "blocked"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_forward(backend, shape, masked, query_block):
    q, k, v, mask = draw(shape)
    mask = mask if masked else None
    out = attention(q, k, v, key_mask=mask, backend=backend)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, reference(q, k, v, mask), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_blocked_gradient_is_xlas(shape, masked, query_block):
    q, k, v, mask = draw(shape)
    mask = mask if masked else None
    cotangent = draw(shape, seed=1)[0]

    def gradient(backend):
        def loss(q, k, v):
            return jnp.sum(attention(q, k, v, key_mask=mask, backend=backend) * cotangent)

        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    for ours, expected in zip(gradient("blocked"), gradient("xla"), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_blocked_gradient_is_the_derivative():
    jax.test_util.check_grads(lambda *x: attention(*x, backend="blocked"), draw(SHAPES[0])[:3], order=1, modes=["rev"])


def test_masked_keys_change_nothing():
    q, k, v, mask = draw(SHAPES[0])
    hidden = ~mask[:, :, None, None]
    for backend in ("xla", "blocked"):
        out = attention(q, k, v, key_mask=mask, backend=backend)
        other = attention(q, jnp.where(hidden, 9.0, k), jnp.where(hidden, -9.0, v), key_mask=mask, backend=backend)
        np.testing.assert_array_equal(out, other)


@pytest.mark.parametrize("backend", ["xla", "blocked"])
def test_bfloat16_keeps_its_dtype_and_float32_statistics(backend):
    q, k, v, mask = draw(SHAPES[0], jnp.bfloat16)
    out, gradient = jax.value_and_grad(
        lambda v: attention(q, k, v, key_mask=mask, backend=backend).astype(jnp.float32).sum()
    )(v)
    assert gradient.dtype == jnp.bfloat16
    assert out.dtype == jnp.float32
    result = attention(q, k, v, key_mask=mask, backend=backend)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(result.astype(jnp.float32), reference(q, k, v, mask), rtol=0.03, atol=0.03)


def test_backend_selection():
    assert select_backend(jnp.dtype(jnp.float32), 64) == "blocked"  # the tests' platform is the CPU
    assert set(BACKENDS) == {"xla", "blocked", "cudnn", "splash"}


@pytest.mark.parametrize(
    "dtype, head_dim, expected",
    [(jnp.bfloat16, 128, "cudnn"), (jnp.float32, 128, "xla"), (jnp.bfloat16, 12, "xla"), (jnp.bfloat16, 256, "xla")],
)
def test_backend_selection_on_a_gpu(monkeypatch, dtype, head_dim, expected):
    monkeypatch.setattr(module.parallel, "platform", lambda: "gpu")
    assert select_backend(jnp.dtype(dtype), head_dim) == expected


@pytest.mark.parametrize("head_dim, expected", [(128, "splash"), (64, "xla"), (12, "xla")])
def test_backend_selection_on_a_tpu(monkeypatch, head_dim, expected):
    monkeypatch.setattr(module.parallel, "platform", lambda: "tpu")
    assert select_backend(jnp.dtype(jnp.bfloat16), head_dim) == expected


def value_and_gradients(attend, q, k, v, mask):
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), jnp.float32)

    def loss(q, k, v):
        out = attend(q, k, v, mask)
        return jnp.sum(out.astype(jnp.float32) * cotangent), out

    grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float32) for x in (out, *grads)]


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 0.03)])
@pytest.mark.parametrize("queries, keys, masked", [(130, 200, True), (128, 200, False), (128, 128, False)])
def test_splash_is_xla(dtype, tolerance, queries, keys, masked):
    """The TPU kernel, emulated: lengths that are padded, masked keys, whole blocks."""
    q, k, v, mask = draw((2, queries, keys, 1, 128), dtype)
    mask = mask if masked else None
    found = value_and_gradients(lambda *x: attention_splash.splash(*x, interpret=True), q, k, v, mask)
    for a, b in zip(found, value_and_gradients(BACKENDS["xla"], q, k, v, mask), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("length, size", [(2304, 384), (2560, 512), (8704, 512), (100, 128), (640, 128), (1, 128)])
def test_splash_blocks(length, size):
    assert attention_splash.block_size(length) == size


@pytest.mark.parametrize("length", [8, 9])
def test_cudnn_counts_keys_instead_of_masking_them(length):
    """With XLA in cuDNN's place, which takes the same arguments."""
    q, k, v, mask = draw((3, length, length, 2, 6))
    cudnn: Any = BACKENDS["cudnn"]
    by_count = functools.partial(cudnn, implementation="xla")
    for a, b in zip(
        value_and_gradients(by_count, q, k, v, mask), value_and_gradients(BACKENDS["xla"], q, k, v, mask), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def cudnn_calls(monkeypatch, masked, remat):
    """JAX's cuDNN calls, forward and backward, in the gradient of attention; traced, and checked by JAX, not run."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    q, k, v, mask = draw((2, 15, 15, 2, 64), jnp.bfloat16)

    def loss(q, k, v):
        attend = functools.partial(attention, key_mask=mask if masked else None, backend="cudnn")
        out = jax.checkpoint(attend, policy=REMAT_POLICIES[remat])(q, k, v)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v))
    return [text.count(f"= dot_product_attention_{part}_wrapper[") for part in ("fwd", "bwd")]


@pytest.mark.parametrize("masked", [False, True])
def test_cudnn_takes_odd_lengths_and_is_run_again_only_without_remat_attention(monkeypatch, masked):
    assert cudnn_calls(monkeypatch, masked, "full") == [2, 1]
    assert cudnn_calls(monkeypatch, masked, "attention") == [1, 1]


def test_unknown_backend_is_named():
    q, k, v, _ = draw(SHAPES[0])
    with pytest.raises(KeyError, match="'flash' is unknown.*blocked"):
        attention(q, k, v, backend="flash")
