import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from cocoedit_jax.models import attention as module
from cocoedit_jax.models.attention import BACKENDS, attention, select_backend

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
    monkeypatch.setattr(module, "QUERY_BLOCK", request.param)
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
    assert set(BACKENDS) == {"xla", "blocked", "cudnn"}


@pytest.mark.parametrize(
    "dtype, head_dim, expected",
    [(jnp.bfloat16, 128, "cudnn"), (jnp.float32, 128, "xla"), (jnp.bfloat16, 12, "xla"), (jnp.bfloat16, 256, "xla")],
)
def test_backend_selection_on_a_gpu(monkeypatch, dtype, head_dim, expected):
    monkeypatch.setattr(module.jax, "default_backend", lambda: "gpu")
    assert select_backend(jnp.dtype(dtype), head_dim) == expected


def test_unknown_backend_is_named():
    q, k, v, _ = draw(SHAPES[0])
    with pytest.raises(KeyError, match="'flash' is unknown.*blocked"):
        attention(q, k, v, backend="flash")
