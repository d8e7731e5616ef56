"""Mesh construction, the rule table, FLOPs by formula."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from cocoedit_jax.errors import UserError
from cocoedit_jax.models.flux import FluxConfig
from cocoedit_jax.sharding.flops import forward_flops, lora_gradient_flops, peak_flops
from cocoedit_jax.sharding.mesh import AXES, make_mesh
from cocoedit_jax.sharding.rules import partition_spec


def test_mesh_fills_the_open_axis():
    mesh = make_mesh({"data": -1, "fsdp": 2})
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "context": 1, "tensor": 1}
    assert mesh.axis_names == AXES


@pytest.mark.parametrize(
    "sizes", [{"data": 9}, {"data": -1, "fsdp": -1}, {"data": -1, "fsdp": 3}, {"model": 2}, {"data": 0}], ids=str
)
def test_mesh_refuses(sizes):
    with pytest.raises(UserError, match="mesh"):
        make_mesh(sizes)


def test_a_smaller_mesh_takes_the_first_devices():
    mesh = make_mesh({"data": 2, "fsdp": 1})
    assert mesh.devices.flat[0] == jax.devices()[0] and mesh.size == 2


def test_rules():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    assert partition_spec(("layers", "embed", "heads"), (2, 24, 24), mesh) == PartitionSpec(None, "fsdp", "tensor")
    # 6 does not divide by 4: that dimension stays whole instead of failing.
    assert partition_spec(("embed", "mlp"), (6, 8), mesh) == PartitionSpec(None, "tensor")
    with pytest.raises(KeyError):
        partition_spec(("no_such_name",), (8,), mesh)


def test_flops_of_kontext():
    """Kontext at 512 px with 128 text tokens is 31.4 TFLOP per forward; the block linears are 24 d^2 per token."""
    config = FluxConfig()
    assert forward_flops(config, 2176) == pytest.approx(31.4e12, rel=0.01)
    assert forward_flops(config, 8704) == pytest.approx(165.4e12, rel=0.01)
    assert forward_flops(config, 100, samples=3) == pytest.approx(3 * forward_flops(config, 100))
    # Frozen base: forward plus input gradients of the linears, three times attention.
    tokens, blocks = 2176, 57
    attention = blocks * 4 * tokens**2 * config.hidden
    linear = forward_flops(config, tokens) - attention
    assert lora_gradient_flops(config, tokens) == pytest.approx(2 * linear + 3 * attention)


def test_flops_agree_with_the_compiler():
    """XLA's own count of one unscanned block agrees with the formula to a few per cent."""
    import jax.numpy as jnp
    from flax import linen as nn

    from cocoedit_jax.models.flux import FluxTransformer

    shape = FluxConfig(16, 0, 1, 32, 4, 16, 16, False, (8, 12, 12))
    model = FluxTransformer(shape, attention_backend="xla")
    tokens, text = 192, 64
    ids = np.zeros((tokens + text, 3))
    args = (jnp.zeros((1, tokens, 16)), jnp.zeros((1, text, 16)), jnp.zeros((1, 16)), jnp.zeros((1,)))
    params = nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), *args, None, ids, tokens)))
    compiled = jax.jit(lambda p: model.apply(p, *args, None, ids, tokens)).lower(params).compile()
    analysis = compiled.cost_analysis()
    assert analysis is not None
    counted = analysis["flops"]
    assert forward_flops(shape, tokens + text) == pytest.approx(counted, rel=0.1)


def test_peak_of_an_unknown_device_is_measured():
    peak, source = peak_flops()
    assert peak > 1e8 and "measured" in source
