"""Our 2-D autoencoder against diffusers' AutoencoderKLQwenImage on one frame, with the same random weights."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cocoedit_jax.models.autoencoder_qwen import AutoencoderQwen, ChannelNorm
from cocoedit_jax.models.autoencoder_qwen_config import AutoencoderQwenConfig
from cocoedit_jax.models.autoencoder_qwen_weights import load_params, stored_shapes, unused_parameters
from cocoedit_jax.sharding.mesh import DATA, make_mesh
from cocoedit_jax.sharding.rules import sharded_shapes
from tests.parity.autoencoder_cases import from_torch, to_torch
from tests.parity.autoencoder_qwen_cases import QwenAutoencoderCase, draw_qwen_autoencoder
from tests.parity.transformer_cases import SEED, relative_error, to_numpy

TOLERANCE = 5e-6


@pytest.fixture(scope="module", params=range(2))
def model(request: pytest.FixtureRequest, torch_side: None, tmp_path_factory) -> QwenAutoencoderCase:
    return draw_qwen_autoencoder(request.param, tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def small_model(torch_side: None, tmp_path_factory) -> QwenAutoencoderCase:
    options = {"dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]}
    return draw_qwen_autoencoder(3, tmp_path_factory.mktemp("vae"), **options)


@pytest.fixture
def case(model: QwenAutoencoderCase) -> QwenAutoencoderCase:
    return with_fresh_inputs(model)


@pytest.fixture
def small(small_model: QwenAutoencoderCase) -> QwenAutoencoderCase:
    return with_fresh_inputs(small_model)


def with_fresh_inputs(case):
    """``case`` with inputs that do not depend on which tests ran before."""
    return dataclasses.replace(case, rng=np.random.default_rng([SEED, 2]))


def sizes(case):
    """(height, width) in latent cells: a square, and two sides that differ."""
    height, width = case.rng.choice(np.arange(1, 5), 2, replace=False)
    return (3, 3), (int(height), int(width))


def test_encode(case):
    for height, width in sizes(case):
        images = case.images(2, height * case.ours.factor, width * case.ours.factor)
        latents = jax.jit(case.ours.encode)(case.params, images)
        assert latents.shape == (2, height, width, case.config.z_dim)
        assert relative_error(latents, case.encode_reference(images)) < TOLERANCE


def test_decode(case):
    for height, width in sizes(case):
        latents = case.latents(2, height, width)
        images = jax.jit(case.ours.decode)(case.params, latents)
        assert images.shape == (2, height * case.ours.factor, width * case.ours.factor, 3)
        assert relative_error(images, case.decode_reference(latents)) < TOLERANCE


def test_tiled_decode(small):
    """Three tiles a side, of which the last ones are cut off by the border."""
    tile, factor = 8, small.ours.factor
    latents = small.latents(1, tile + 8, tile + 9)
    exact = small.decode_reference(latents)
    small.reference.enable_tiling(*2 * [tile * factor], *2 * [tile * factor * 3 // 4])
    try:
        expected = small.decode_reference(latents)
    finally:
        small.reference.disable_tiling()
    tiled = jax.jit(AutoencoderQwen(small.config, tile_size=tile * factor).decode)(small.params, latents)
    assert relative_error(tiled, expected) < TOLERANCE
    # Tiles see less than the whole, so agreement with the exact decoder would mean that nothing was tiled.
    assert relative_error(tiled, exact) > 1e-3


def test_tiles_are_exact_away_from_seams(small):
    """Attention apart, which sees the whole picture: norms are of single pixels, so only convolutions reach over."""
    latents, factor = small.latents(1, 36, 4), small.ours.factor
    params = jax.tree.map(lambda x: x, small.params)
    middle = params["decoder"]["mid_block"]
    middle["attentions.0"]["proj"] = jax.tree.map(jnp.zeros_like, middle["attentions.0"]["proj"])
    exact, tiled = (
        jax.jit(AutoencoderQwen(small.config, tile_size=size).decode)(params, latents) for size in (None, 24 * factor)
    )
    wrong = np.abs(np.asarray(tiled - exact)).max(axis=(0, 2, 3)) > 1e-5
    # Tiles hold rows 0 to 23 and 18 to 35; nine convolutions reach 9 rows and six, at twice the size, 3 more.
    assert wrong.any() and not wrong[: 12 * factor].any() and not wrong[30 * factor :].any()


def test_bfloat16(small):
    ours = AutoencoderQwen(small.config, dtype=jnp.bfloat16)
    params = load_params(small.folder, ours.abstract_params())
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    images, latents = small.images(1, 8, 12), small.latents(1, 4, 6)
    encoded, decoded = jax.jit(ours.encode)(params, images), jax.jit(ours.decode)(params, latents)
    assert encoded.dtype == decoded.dtype == jnp.float32
    # 8 significant bits, about ten convolutions of random weights.
    assert relative_error(encoded, small.encode_reference(images)) < 0.1
    assert relative_error(decoded, small.decode_reference(latents)) < 0.1


def test_norm_of_large_small_and_no_values(small):
    x = small.rng.standard_normal((1, 2, 3, 5), np.float32)
    x[0, 0, 0], x[0, 0, 1], x[0, 0, 2] = 0, 1e-14 * x[0, 0, 1], 1e15 * x[0, 0, 2]
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageRMS_norm

    out = ChannelNorm().apply({"params": {"gamma": jnp.ones(5)}}, x)
    expected = from_torch(QwenImageRMS_norm(5)(to_torch(x)))
    np.testing.assert_allclose(np.asarray(out), expected, rtol=1e-5, atol=1e-9)


def test_the_reference_does_not_use_what_we_leave_behind(case):
    """Other random numbers there, and the reference gives the same bits."""
    import torch

    height, width = sizes(case)[1]
    images = case.images(1, height * case.ours.factor, width * case.ours.factor)
    latents = case.latents(1, height, width)
    before = case.encode_reference(images), case.decode_reference(latents)
    unused, saved = unused_parameters(case.config), {}
    assert any("time_conv" in name for name in unused) == any(case.config.temperal_downsample)
    for name, shape in unused.items():
        tensor = case.reference.get_parameter(name)
        saved[name] = tensor.clone()
        part = tensor if tensor.shape == shape else tensor[:, :, :-1]
        assert part.shape == shape
        part.copy_(torch.from_numpy(case.rng.standard_normal(shape, np.float32)))
    after = case.encode_reference(images), case.decode_reference(latents)
    for name, tensor in saved.items():
        case.reference.get_parameter(name).copy_(tensor)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_loaded_parameters_are_the_last_slices(case):
    state = {name: to_numpy(tensor) for name, tensor in case.reference.state_dict().items()}
    block, attention = case.params["encoder"]["down_blocks.0"], case.params["decoder"]["mid_block"]["attentions.0"]
    kernel = state["encoder.down_blocks.0.conv1.weight"]
    np.testing.assert_array_equal(block["conv1"]["kernel"], kernel[:, :, -1].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(block["norm1"]["gamma"], state["encoder.down_blocks.0.norm1.gamma"].ravel())
    kernel = state["decoder.mid_block.attentions.0.to_qkv.weight"]
    np.testing.assert_array_equal(attention["to_qkv"]["kernel"], kernel.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(
        attention["norm"]["gamma"], state["decoder.mid_block.attentions.0.norm.gamma"].ravel()
    )


def test_shards_onto_a_mesh(small, tmp_path):
    small.reference.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    mesh = make_mesh({DATA: 2, "fsdp": 4})
    params = load_params(tmp_path, sharded_shapes(jax.eval_shape(small.ours.init, jax.random.key(0)), mesh))
    assert all(x.sharding.is_fully_replicated and x.sharding.mesh == mesh for x in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, params, small.params)


def test_names_and_shapes(case):
    expected = {name: tuple(tensor.shape) for name, tensor in case.reference.state_dict().items()}
    assert stored_shapes(case.config) == expected


def test_real_names_and_shapes(torch_side):
    """Qwen-Image's autoencoder, without its weights."""
    import torch
    from diffusers import AutoencoderKLQwenImage

    with torch.device("meta"):
        reference = AutoencoderKLQwenImage()
    expected = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    assert stored_shapes(AutoencoderQwenConfig()) == expected


def test_config_is_read_as_diffusers_reads_it(torch_side):
    from diffusers import AutoencoderKLQwenImage

    parameters = inspect.signature(AutoencoderKLQwenImage.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    assert AutoencoderQwenConfig.from_dict(defaults, "defaults") == AutoencoderQwenConfig()
    assert AutoencoderQwenConfig.from_dict({}, "nothing") == AutoencoderQwenConfig()
