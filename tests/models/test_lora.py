import json

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


def test_logical_axes(boxed, adapter):
    axes = lora.logical_axes(adapter, boxed)
    query, out = (axes["transformer_blocks"]["attn"][name] for name in ("to_q", "to_out.0"))
    assert query == {"lora_A": ("layers", "embed", None), "lora_B": ("layers", None, "heads")}
    assert out == {"lora_A": ("layers", "heads", None), "lora_B": ("layers", None, "embed")}
    names = jax.tree.map(lambda box: box.names, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert lora.logical_axes(adapter, names) == axes


def test_files_round_trip(trained, config, tmp_path):
    folder = tmp_path / "lora" / "step_000080"
    lora.save_lora(folder, trained, config, {"step": "80"})
    for path in (folder, folder / lora.DIFFUSERS_FILE, folder / "peft", folder / "peft" / lora.PEFT_FILE):
        loaded, loaded_config = lora.load_lora(path)
        assert loaded_config == config
        jax.tree.map(np.testing.assert_array_equal, loaded, trained)
    assert lora.load_lora(folder, alpha=8)[1].alpha == 8


def test_headers(trained, config, tmp_path):
    lora.save_lora(tmp_path, trained, config, {"step": "80"})
    tensors, header = weights.load_safetensors(tmp_path / lora.DIFFUSERS_FILE)
    assert (header["format"], header["step"]) == ("pt", "80")
    assert json.loads(header["lora_adapter_metadata"]) == {
        "transformer.r": 4,
        "transformer.lora_alpha": 6,
        "transformer.target_modules": list(lora.DEFAULT_TARGETS),
    }
    assert tensors["transformer.single_transformer_blocks.2.attn.to_k.lora_A.weight"].shape == (4, 48)
    peft, _ = weights.load_safetensors(tmp_path / "peft" / lora.PEFT_FILE)
    assert {k.replace("base_model.model.", "transformer.") for k in peft} == set(tensors)


def rewrite(folder, change, header=None):
    tensors, old_header = weights.load_safetensors(folder / lora.DIFFUSERS_FILE)
    change(tensors)
    weights.save_safetensors(folder / lora.DIFFUSERS_FILE, tensors, old_header | (header or {}))


def test_unmatched_keys_are_named_together(trained, config, tmp_path):
    lora.save_lora(tmp_path, trained, config)
    block = "transformer.transformer_blocks.0.attn"

    def change(tensors):
        tensors["lora_unet_x.alpha"] = np.ones(1, np.float32)
        tensors[f"{block}.to_q.lora_C.weight"] = tensors[f"{block}.to_q.lora_A.weight"]
        del tensors[f"{block}.to_k.lora_A.weight"]
        for half in "AB":
            del tensors[f"{block}.to_v.lora_{half}.weight"]
        tensors["transformer.transformer_blocks.attn.to_q.lora_A.weight"] = np.ones((2, 2), np.float32)

    rewrite(tmp_path, change)
    with pytest.raises(UserError) as error:
        lora.load_lora(tmp_path)
    for part in (
        "lora_unet_x.alpha",
        f"{block}.to_q.lora_C.weight",
        f"{block}.to_k.lora_B.weight: its other half is missing",
        "transformer_blocks.attn.to_v.lora_A: layers [1]; expected all from 0 on",
        "transformer_blocks.attn.to_q.lora_A.weight: module name",
    ):
        assert part in str(error.value)


def test_rank_that_differs_from_the_header(trained, config, tmp_path):
    lora.save_lora(tmp_path, trained, config)
    rewrite(tmp_path, lambda tensors: None, {lora.METADATA_KEY: json.dumps({"transformer.r": 8})})
    with pytest.raises(UserError, match=r"ranks found \[4\]; expected all 8"):
        lora.load_lora(tmp_path)


@pytest.mark.parametrize(
    "field, message", [({"use_dora": True}, "use_dora"), ({"rank_pattern": {"to_q": 2}}, "rank_pattern")]
)
def test_other_kinds_of_lora_are_refused(trained, config, tmp_path, field, message):
    lora.save_lora(tmp_path, trained, config)
    path = tmp_path / "peft" / lora.PEFT_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | field))
    with pytest.raises(UserError, match=message):
        lora.load_lora(tmp_path / "peft")


def test_unreadable_configuration_and_empty_folder(trained, config, tmp_path):
    with pytest.raises(UserError, match="no LoRA adapter there"):
        lora.load_lora(tmp_path)
    lora.save_lora(tmp_path, trained, config)
    (tmp_path / "peft" / lora.PEFT_CONFIG).write_text("{")
    with pytest.raises(UserError, match="configuration is not readable"):
        lora.load_lora(tmp_path / "peft")
    rewrite(tmp_path, dict.clear)
    with pytest.raises(UserError, match="ranks found"):
        lora.load_lora(tmp_path)


def test_adapter_of_another_model(params, trained):
    lora.check_fits(trained, params, "file")
    shorter = {**params, "transformer_blocks": jax.tree.map(lambda x: x[:1], params["transformer_blocks"])}
    del shorter["single_transformer_blocks"]
    with pytest.raises(UserError) as error:
        lora.check_fits(trained, shorter, "file")
    assert str(error.value).startswith("file: 22 tensor(s)")
    assert "single_transformer_blocks.attn.to_q.lora_A: the model has no such linear layer" in str(error.value)
    assert "transformer_blocks.attn.to_q.lora_A (2, 48, 4): does not fit the kernel (1, 48, 48)" in str(error.value)
