import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import weights
from cocoedit_jax.models.flux import FluxConfig, FluxTransformer

CONFIG = FluxConfig(3, 2, 3, 6, 2, 5, 4, True, (2, 2, 2))


@pytest.fixture(scope="module")
def params():
    init = FluxTransformer(CONFIG).init
    arguments = jnp.zeros((1, 2, 3)), jnp.zeros((1, 1, 5)), jnp.zeros((1, 4)), jnp.zeros(1), jnp.zeros(1)
    shapes = nn.unbox(jax.eval_shape(lambda key: init(key, *arguments, np.zeros((3, 3)), 1), jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), shapes["params"])


def test_flatten_and_back():
    tree = {"a": {"b.0": 1, "c": {"d": 2}}, "e": 3}
    flat = weights.flatten(tree)
    assert flat == {("a", "b.0"): 1, ("a", "c", "d"): 2, ("e",): 3}
    assert weights.unflatten(flat) == tree


@pytest.mark.parametrize(
    "name, path, layer",
    [
        ("x_embedder", ("x_embedder",), None),
        ("norm_out.linear", ("norm_out.linear",), None),
        ("transformer_blocks.12.attn.to_out.0", ("transformer_blocks", "attn", "to_out.0"), 12),
        ("transformer_blocks.0.ff.net.0.proj", ("transformer_blocks", "ff", "net.0.proj"), 0),
        ("transformer_blocks.0.ff_context.net.2", ("transformer_blocks", "ff_context", "net.2"), 0),
        ("single_transformer_blocks.7.proj_mlp", ("single_transformer_blocks", "proj_mlp"), 7),
    ],
)
def test_module_names(name, path, layer):
    assert weights.module_path(name) == (path, layer)
    assert weights.module_name(path, layer) == name


@pytest.mark.parametrize("name", ["transformer_blocks.attn.to_q", "single_transformer_blocks"])
def test_block_without_an_index_is_named(name):
    with pytest.raises(ValueError, match="expected a layer index"):
        weights.module_path(name)


def test_every_module_name_of_the_model_reads_back(params):
    names = {name.rpartition(".")[0] for name in weights.to_diffusers(params)}
    for name in names:
        assert weights.module_name(*weights.module_path(name)) == name


def test_layout_is_torchs(params):
    tensors = weights.to_diffusers(params)
    kernel = params["transformer_blocks"]["attn"]["to_out.0"]["kernel"]
    np.testing.assert_array_equal(tensors["transformer_blocks.1.attn.to_out.0.weight"], kernel[1].T)
    scale = params["single_transformer_blocks"]["attn"]["norm_q"]["scale"]
    np.testing.assert_array_equal(tensors["single_transformer_blocks.2.attn.norm_q.weight"], scale[2])
    assert weights.tensor_shapes(params) == {name: tensor.shape for name, tensor in tensors.items()}


def test_file_round_trip(params, tmp_path):
    path = tmp_path / "model.safetensors"
    weights.save_safetensors(path, weights.to_diffusers(params), {"note": "made by a test"})
    tensors, metadata = weights.load_safetensors(path)
    assert metadata == {"format": "pt", "note": "made by a test"}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    back = weights.from_diffusers(tensors, params, str(path))
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_bfloat16_file(params, tmp_path):
    """The published weights are bfloat16; they take the dtype of the tree they are read into."""
    path = tmp_path / "model.safetensors"
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    weights.save_safetensors(path, weights.to_diffusers(low))
    tensors, _ = weights.load_safetensors(path)
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    for tree in (low, params):
        back = weights.from_diffusers(tensors, tree, str(path))
        jax.tree.map(lambda x, y, z: np.testing.assert_array_equal(x, y.astype(z.dtype)), back, low, tree)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        weights.load_safetensors(tmp_path / "absent.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json")
    with pytest.raises(UserError, match="broken.safetensors: not a readable safetensors file"):
        weights.load_safetensors(tmp_path / "broken.safetensors")


def test_all_problems_are_named_together(params):
    tensors = weights.to_diffusers(params)
    del tensors["proj_out.bias"]
    tensors["extra"] = np.zeros(3, np.float32)
    tensors["x_embedder.weight"] = np.zeros((2, 2), np.float32)
    with pytest.raises(UserError) as error:
        weights.from_diffusers(tensors, params, "base.safetensors")
    lines = str(error.value).splitlines()
    assert lines[0] == "base.safetensors: 3 tensor(s) do not fit:"
    assert [line.strip() for line in lines[1:]] == [
        "missing: proj_out.bias (3,)",
        "unexpected: extra (3,)",
        "wrong shape: x_embedder.weight (2, 2), expected (12, 3)",
    ]


def test_convolutions_are_stored_as_torch_does():
    kernel = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)  # [h, w, in, out]
    tree = {"encoder": {"down_blocks.0": {"conv": {"kernel": kernel, "bias": np.zeros(5, np.float32)}}}}
    tensors = weights.to_diffusers(tree)
    name = "encoder.down_blocks.0.conv.weight"
    assert weights.tensor_shapes(tree)[name] == tensors[name].shape == (5, 4, 2, 3)
    assert tensors[name][4, 3, 1, 2] == kernel[1, 2, 3, 4]
    np.testing.assert_array_equal(
        weights.from_diffusers(tensors, tree, "x")["encoder"]["down_blocks.0"]["conv"]["kernel"], kernel
    )
