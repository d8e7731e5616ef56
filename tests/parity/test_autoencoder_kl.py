"""Our autoencoder against diffusers' AutoencoderKL on the same random weights: whole, tiled and in parts."""

import dataclasses
import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cocoedit_jax.models import weights
from cocoedit_jax.models.autoencoder_kl import (
    AttentionBlock,
    AutoencoderKL,
    Decoder,
    Encoder,
    GroupNorm,
    group_norm,
    mid_block,
)
from cocoedit_jax.models.autoencoder_kl_config import DIFFUSERS_DEFAULTS, AutoencoderKLConfig
from cocoedit_jax.models.autoencoder_layers import Downsample, ResampleBlock, ResnetBlock, Upsample
from tests.parity.autoencoder_cases import AutoencoderCase, draw_autoencoder, from_torch, to_torch
from tests.parity.transformer_cases import SEED, relative_error

TOLERANCE = 1e-5
NO_TIME = None  # the time embedding that diffusers' residual blocks ask for
FLUX_LIKE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (4, 8, 12, 12),
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 4,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
TWO_BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


@pytest.fixture(scope="module", params=range(3))
def model(request: pytest.FixtureRequest, torch_side: None) -> AutoencoderCase:
    return draw_autoencoder(request.param)


@pytest.fixture(scope="module")
def flux_like_model(torch_side: None) -> AutoencoderCase:
    """Factor 8, 16 channels, attention, no quantisation: FLUX's network with few channels."""
    return draw_autoencoder(0, **FLUX_LIKE)


@pytest.fixture
def case(model: AutoencoderCase) -> AutoencoderCase:
    return with_fresh_inputs(model)


@pytest.fixture
def flux_like(flux_like_model: AutoencoderCase) -> AutoencoderCase:
    return with_fresh_inputs(flux_like_model)


def with_fresh_inputs(case):
    """``case`` with inputs that do not depend on which tests ran before."""
    return dataclasses.replace(case, rng=np.random.default_rng([SEED, 1]))


def sides(case):
    """A height and a width in latent cells that differ."""
    height, width = case.rng.choice(np.arange(1, 5), 2, replace=False)
    return int(height), int(width)


def part(params, name):
    """The sub-tree at diffusers' module name."""
    for key in weights.module_path(name)[0]:
        params = params[key]
    return params


def check_block(case, module, name, channels, height, width, *further):
    """Our ``module`` on a random input against the reference's sub-module ``name``, which is given ``further`` too."""
    x = case.rng.standard_normal((2, height, width, channels), np.float32)
    out = jax.jit(module.apply)({"params": part(case.params, name)}, x)
    assert relative_error(out, from_torch(case.reference.get_submodule(name)(to_torch(x), *further))) < TOLERANCE


def test_encode(case):
    height, width = sides(case)
    images = case.images(2, height * case.ours.factor, width * case.ours.factor)
    latents = jax.jit(case.ours.encode)(case.params, images)
    assert latents.shape == (2, height, width, case.ours.channels)
    assert relative_error(latents, case.encode_reference(images)) < TOLERANCE


def test_decode(case):
    height, width = sides(case)
    latents = case.latents(2, height, width)
    images = jax.jit(case.ours.decode)(case.params, latents)
    assert images.shape == (2, height * case.ours.factor, width * case.ours.factor, 3)
    assert relative_error(images, case.decode_reference(latents)) < TOLERANCE


def test_encoder_and_decoder(case):
    height, width = sides(case)
    factor = case.ours.factor
    check_block(case, Encoder(case.config), "encoder", 3, height * factor, width * factor)
    check_block(case, Decoder(case.config), "decoder", case.config.latent_channels, height, width)


def test_blocks(case):
    """The blocks of both halves, which between them have every change of channels and of size."""
    config, layers = case.config, case.config.layers_per_block
    norm, channels = group_norm(config, jnp.float32), config.block_out_channels
    for name, order, resample, extra in (
        ("encoder.down_blocks", channels, partial(Downsample, name="downsamplers.0"), 0),
        ("decoder.up_blocks", channels[::-1], partial(Upsample, name="upsamplers.0"), 1),
    ):
        inputs = (order[0], *order[:-1])
        for i, (before, after) in enumerate(zip(inputs, order, strict=True)):
            block = ResampleBlock(after, layers + extra, norm, resample if i + 1 < len(order) else None)
            check_block(case, block, f"{name}.{i}", before, 4, 6)
    check_block(case, mid_block(config), "decoder.mid_block", channels[-1], 3, 5)


def test_resnet_with_and_without_shortcut(flux_like):
    check_block(flux_like, ResnetBlock(8, partial(GroupNorm, 4)), "encoder.down_blocks.1.resnets.0", 4, 5, 3, NO_TIME)
    check_block(flux_like, ResnetBlock(8, partial(GroupNorm, 4)), "encoder.down_blocks.1.resnets.1", 8, 5, 3, NO_TIME)


@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
def test_change_of_size(flux_like, size):
    check_block(flux_like, Downsample(), "encoder.down_blocks.0.downsamplers.0", 4, *size)
    check_block(flux_like, Upsample(), "decoder.up_blocks.1.upsamplers.0", 12, *size)


@pytest.mark.parametrize("backend", ["auto", "xla", "blocked"])
def test_attention(flux_like, backend):
    check_block(flux_like, AttentionBlock(4, backend=backend), "decoder.mid_block.attentions.0", 12, 5, 3)


def test_group_norm_far_from_zero(flux_like):
    """Where the mean is large, a variance by a difference of squares would be lost."""
    name = "encoder.conv_norm_out"
    x = flux_like.rng.standard_normal((2, 7, 5, 12), np.float32) + 1000
    out = jax.jit(GroupNorm(4).apply)({"params": part(flux_like.params, name)}, x)
    assert relative_error(out, from_torch(flux_like.reference.get_submodule(name)(to_torch(x)))) < 1e-4


@pytest.mark.parametrize("index, extra", [(0, (5, -1)), (1, (8, 9))])
def test_tiled_decode(torch_side, index, extra):
    """Up to three tiles a side, of which the last ones are cut off by the border; one side may fit a single tile."""
    case = draw_autoencoder(index, block_out_channels=(4, 8), norm_num_groups=4, layers_per_block=1, **TWO_BLOCKS)
    tile = 8
    height, width = (tile + n for n in extra)
    ours = AutoencoderKL(case.config, tile_size=tile * case.ours.factor)
    case.reference.enable_tiling()
    case.reference.tile_latent_min_size, case.reference.tile_sample_min_size = tile, tile * case.ours.factor
    latents = case.latents(2, height, width)
    tiled = jax.jit(ours.decode)(case.params, latents)
    assert relative_error(tiled, case.decode_reference(latents)) < TOLERANCE
    # Tiles see less than the whole, so agreement with the exact decoder would mean that nothing was tiled.
    case.reference.disable_tiling()
    assert relative_error(tiled, case.decode_reference(latents)) > 1e-3


def test_bfloat16(flux_like):
    ours = AutoencoderKL(flux_like.config, dtype=jnp.bfloat16)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), flux_like.params)
    images, latents = flux_like.images(1, 32, 16), flux_like.latents(1, 4, 2)
    encoded, decoded = jax.jit(ours.encode)(params, images), jax.jit(ours.decode)(params, latents)
    assert encoded.dtype == decoded.dtype == jnp.float32
    # 8 significant bits, about thirty convolutions of random weights.
    assert relative_error(encoded, flux_like.encode_reference(images)) < 0.1
    assert relative_error(decoded, flux_like.decode_reference(latents)) < 0.1


def test_weights_round_trip(case):
    state, back = case.reference.state_dict(), weights.to_diffusers(case.params)
    assert state.keys() == back.keys()
    for name in state:
        np.testing.assert_array_equal(back[name], state[name].numpy(), err_msg=name)


def test_real_names_and_shapes(torch_side):
    """FLUX.1's autoencoder, without its weights."""
    import torch
    from diffusers import AutoencoderKL as Reference

    config = AutoencoderKLConfig()
    with torch.device("meta"):
        reference = Reference(**{name: getattr(config, name) for name in DIFFUSERS_DEFAULTS})
    expected = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    assert weights.tensor_shapes(AutoencoderKL().abstract_params()) == expected


def test_config_is_read_as_diffusers_reads_it(case):
    import diffusers

    raw = dict(case.reference.config)
    assert AutoencoderKLConfig.from_dict(raw, "config.json") == case.config
    parameters = inspect.signature(diffusers.AutoencoderKL.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if name in DIFFUSERS_DEFAULTS}
    assert defaults == DIFFUSERS_DEFAULTS


def test_pipeline_round_trip(flux_like):
    """Encoding and decoding one after the other, with the pipelines' scaling in between."""
    images = flux_like.images(1, 24, 40)
    ours = flux_like.ours
    back = jax.jit(lambda p, x: ours.decode(p, ours.encode(p, x)))(flux_like.params, images)
    assert relative_error(back, flux_like.decode_reference(flux_like.encode_reference(images))) < 2 * TOLERANCE
