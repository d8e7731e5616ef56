"""Weight files that diffusers writes and reads, and the names and shapes of the published model."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cocoedit_jax.models import weights
from cocoedit_jax.models.convert import convert
from cocoedit_jax.models.flux import FluxConfig, abstract_params
from cocoedit_jax.models.orbax_weights import load_params, read_config
from cocoedit_jax.sharding.mesh import make_mesh
from cocoedit_jax.sharding.rules import sharded_shapes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_diffusers_saves_is_loaded(case, tmp_path, dtype):
    import torch

    model = case.fresh_reference().to(getattr(torch, dtype))
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    model.save_pretrained(tmp_path, max_shard_size=int(1.5 * largest))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    config = FluxConfig.from_diffusers(read_config(tmp_path))
    assert config == case.config
    target = sharded_shapes(abstract_params(config), make_mesh({"fsdp": 4, "tensor": 2}), jnp.dtype(dtype))
    loaded = load_params(tmp_path, target)
    expected = weights.from_diffusers(
        {name: tensor.float().numpy() for name, tensor in model.state_dict().items()},
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), target),
        "PyTorch model",
    )
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    assert jax.tree.map(lambda x: (x.dtype, x.sharding), loaded) == jax.tree.map(
        lambda x: (x.dtype, x.sharding), target
    )


@pytest.mark.parametrize("max_shard_size", [2000, 10**9])
def test_diffusers_loads_what_is_written(one_case, tmp_path, max_shard_size):
    import torch
    from diffusers import FluxTransformer2DModel

    one_case.fresh_reference().to(torch.bfloat16).save_pretrained(tmp_path / "source" / "transformer")
    convert(tmp_path / "source", tmp_path / "orbax", "orbax")
    convert(tmp_path / "orbax", tmp_path / "back", "diffusers", max_shard_size=max_shard_size)
    before, after = (
        FluxTransformer2DModel.from_pretrained(tmp_path / name / "transformer", torch_dtype=torch.bfloat16)
        for name in ("source", "back")
    )
    assert dict(before.config) | {"_name_or_path": ""} == dict(after.config) | {"_name_or_path": ""}
    found = after.state_dict()
    assert found.keys() == before.state_dict().keys()
    for name, tensor in before.state_dict().items():
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name


def test_names_and_shapes_of_the_published_model(torch_side):
    import torch
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        reference = FluxTransformer2DModel(guidance_embeds=True)  # diffusers' other defaults are the published shape
    ours = weights.tensor_shapes(nn.unbox(abstract_params(FluxConfig())))
    assert ours == {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    assert len(ours) == 1160
    assert sum(map(math.prod, ours.values())) == 11_901_408_320
    assert FluxConfig.from_diffusers(dict(reference.config)) == FluxConfig()
