import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import lora, weights
from cocoedit_jax.models.flux import FluxConfig, FluxTransformer
from cocoedit_jax.models.layers import LORA

CONFIG = FluxConfig(3, 2, 3, 24, 2, 5, 4, True, (8, 8, 8))
MODEL = FluxTransformer(CONFIG)
INPUTS = jnp.ones((1, 2, 3)), jnp.ones((1, 1, 5)), jnp.ones((1, 4)), jnp.ones(1), jnp.ones(1), np.ones((3, 3), int), 1


@jax.jit
def apply(variables):
    return MODEL.apply(variables, *INPUTS)


@pytest.fixture(scope="module")
def boxed():
    return jax.eval_shape(lambda key: MODEL.init(key, *INPUTS), jax.random.key(0))["params"]


@pytest.fixture(scope="module")
def params(boxed):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), nn.unbox(boxed))


@pytest.fixture(scope="module")
def config():
    return lora.LoraConfig(rank=4, alpha=6)


@pytest.fixture
def adapter(params, config):
    return lora.init_adapter(jax.random.key(0), params, config)


@pytest.fixture
def trained(adapter):
    return jax.tree.map(lambda x: x + 0.1, adapter)


def test_targets_are_those_of_the_released_code(adapter):
    assert lora.LoraConfig() == lora.LoraConfig(32, 64) and lora.LoraConfig().scale == 2
    assert len(adapter["transformer_blocks"]["attn"]) == 8
    assert sorted(adapter["single_transformer_blocks"]["attn"]) == ["to_k", "to_q", "to_v"]
    assert adapter["transformer_blocks"]["attn"]["to_out.0"]["lora_A"].shape == (2, 48, 4)
    assert adapter["single_transformer_blocks"]["attn"]["to_v"]["lora_B"].shape == (3, 4, 48)


def test_start(params, adapter, config):
    draws = np.concatenate([np.ravel(x) for p, x in weights.flatten(adapter).items() if p[-1] == "lora_A"])
    assert {x.dtype for x in jax.tree.leaves(adapter)} == {np.dtype(np.float32)}
    assert abs(draws.mean()) < 0.01
    assert draws.std() == pytest.approx(1 / config.rank, rel=0.05)
    assert not any(x.any() for p, x in weights.flatten(adapter).items() if p[-1] == "lora_B")
    np.testing.assert_allclose(apply({"params": params, LORA: adapter}), apply({"params": params}), rtol=1e-5)


def test_folded_adapter_is_a_weight_change(params, trained, config):
    """y = x (W + alpha / r A B): merging by hand gives the same velocity, and the scale matters."""
    flat = dict(weights.flatten(params))
    for path, a in weights.flatten(trained).items():
        if path[-1] == "lora_A":
            b = weights.flatten(trained)[(*path[:-1], "lora_B")]
            flat[(*path[:-1], "kernel")] += config.alpha / config.rank * a @ b
    merged = apply({"params": weights.unflatten(flat)})
    folded = apply({"params": params, LORA: lora.fold_scale(trained, config)})
    np.testing.assert_allclose(folded, merged, rtol=1e-4, atol=1e-4)
    assert not np.allclose(apply({"params": params, LORA: trained}), merged, rtol=1e-2, atol=1e-2)


def test_other_targets(params):
    some = lora.init_adapter(jax.random.key(0), params, lora.LoraConfig(2, 2, ("x_embedder", "proj_mlp")))
    assert some["x_embedder"]["lora_A"].shape == (3, 2)
    assert some["single_transformer_blocks"]["proj_mlp"]["lora_B"].shape == (3, 2, 192)
    assert len(jax.tree.leaves(some)) == 4


@pytest.mark.parametrize("target", ["attn.to_z", "transformer_blocks.0.attn.to_q", "o_q"])
def test_targets_that_match_nothing_are_named(params, target):
    with pytest.raises(UserError, match=f"lora.targets: \\['{target}'\\] match no linear layer"):
        lora.init_adapter(jax.random.key(0), params, lora.LoraConfig(2, 2, ("x_embedder", target)))


@pytest.mark.parametrize("change, name", [({"rank": 0}, "rank=0"), ({"targets": ()}, "targets")])
def test_configuration_is_checked(change, name):
    with pytest.raises(UserError, match=name):
        lora.LoraConfig(**change)


def test_adapter_of_another_model(params, trained):
    lora.check_fits(trained, params, "file")
    shorter = {**params, "transformer_blocks": jax.tree.map(lambda x: x[:1], params["transformer_blocks"])}
    del shorter["single_transformer_blocks"]
    with pytest.raises(UserError) as error:
        lora.check_fits(trained, shorter, "file")
    assert str(error.value).startswith("file: 22 tensor(s)")
    assert "single_transformer_blocks.attn.to_q.lora_A: the model has no such linear layer" in str(error.value)
    assert "transformer_blocks.attn.to_q.lora_A (2, 48, 4): does not fit the kernel (1, 48, 48)" in str(error.value)
