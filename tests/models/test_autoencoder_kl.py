import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import weights
from cocoedit_jax.models.autoencoder import Autoencoder
from cocoedit_jax.models.autoencoder_kl import AutoencoderKL
from cocoedit_jax.models.autoencoder_kl_config import AutoencoderKLConfig
from cocoedit_jax.models.flux import FluxConfig
from cocoedit_jax.models.quickstart import QuickstartConfig, build_editor
from cocoedit_jax.models.text import Instruction
from cocoedit_jax.sharding.mesh import DATA, batch_sharding, make_mesh, replicated
from cocoedit_jax.sharding.rules import parameter_shardings

CONFIG = AutoencoderKLConfig(
    block_out_channels=(4, 8),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    latent_channels=3,
    norm_num_groups=2,
)
# The published file, with what diffusers writes beside the shape.
RAW = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.30.0", "force_upcast": True, "sample_size": 1024} | {
    name: list(value) if isinstance(value, tuple) else value
    for name, value in dataclasses.asdict(AutoencoderKLConfig()).items()
}


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    abstract = AutoencoderKL(CONFIG).abstract_params()
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), abstract)


def draw_images(batch, height, width):
    return np.random.default_rng(1).random((batch, height, width, 3), np.float32)


def draw_latents(batch, height, width):
    return np.random.default_rng(2).standard_normal((batch, height, width, CONFIG.latent_channels), np.float32)


def test_real_size():
    autoencoder: Autoencoder = AutoencoderKL()
    assert (autoencoder.factor, autoencoder.channels) == (8, 16)
    shapes = weights.tensor_shapes(AutoencoderKL().abstract_params())
    assert len(shapes) == 244
    assert sum(np.prod(shape) for shape in shapes.values()) == 83_819_683
    assert shapes["encoder.down_blocks.1.resnets.0.conv_shortcut.weight"] == (256, 128, 1, 1)
    assert shapes["encoder.conv_out.weight"] == (32, 512, 3, 3)
    assert shapes["decoder.mid_block.attentions.0.to_out.0.weight"] == (512, 512)
    assert shapes["decoder.up_blocks.2.upsamplers.0.conv.weight"] == (256, 256, 3, 3)
    assert "decoder.up_blocks.3.upsamplers.0.conv.weight" not in shapes


def test_every_parameter_is_replicated_by_the_table():
    boxed = jax.eval_shape(AutoencoderKL(CONFIG).init, jax.random.key(0))
    assert all(
        isinstance(x, nn.LogicallyPartitioned)
        for x in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    )
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    assert all(s.is_fully_replicated for s in jax.tree.leaves(parameter_shardings(boxed, mesh)))


def test_fresh_parameters_are_usable():
    autoencoder = AutoencoderKL(dataclasses.replace(CONFIG, use_quant_conv=True, use_post_quant_conv=True))
    params = nn.unbox(jax.jit(autoencoder.init)(jax.random.key(0)))
    images = draw_images(1, 4, 6)
    latents = jax.jit(autoencoder.encode)(params, images)
    assert latents.shape == (1, 2, 3, 3)
    decoded = jax.jit(autoencoder.decode)(params, latents)
    assert decoded.shape == images.shape
    assert np.isfinite(decoded).all() and np.ptp(decoded) > 0


@pytest.mark.parametrize("batch, slice_size", [(6, 1), (6, 4), (5, 3)])
def test_slices_give_what_the_whole_batch_gives(params, batch, slice_size):
    whole, sliced = AutoencoderKL(CONFIG, slice_size=batch), AutoencoderKL(CONFIG, slice_size=slice_size)
    for name, x in (("encode", draw_images(batch, 6, 4)), ("decode", draw_latents(batch, 3, 2))):
        expected, out = (jax.jit(getattr(a, name))(params, x) for a in (whole, sliced))
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def compiled_decode(autoencoder, params, x, mesh=None):
    shardings = (replicated(mesh), batch_sharding(mesh)) if mesh else None
    return jax.jit(autoencoder.decode, in_shardings=shardings).lower(params, x).compile()


def temporary_bytes(autoencoder, params, x):
    memory = compiled_decode(autoencoder, params, x).memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def test_slices_and_tiles_save_memory(params):
    latents = draw_latents(4, 32, 32)
    config = dataclasses.replace(CONFIG, mid_block_add_attention=False)  # the CPU's attention is sliced in any case
    whole = temporary_bytes(AutoencoderKL(config, slice_size=4), params, latents)
    sliced = temporary_bytes(AutoencoderKL(config), params, latents)
    tiled = temporary_bytes(AutoencoderKL(config, tile_size=16), params, latents)
    assert sliced < whole / 2
    assert tiled < sliced


@pytest.mark.parametrize("size, tiled", [((8, 8), False), ((3, 8), False), ((9, 3), True)])
def test_only_pictures_larger_than_a_tile_are_tiled(params, size, tiled):
    latents = draw_latents(1, *size)
    exact, other = (
        jax.jit(autoencoder.decode).lower(params, latents).as_text()
        for autoencoder in (AutoencoderKL(CONFIG), AutoencoderKL(CONFIG, tile_size=16))
    )
    assert (exact != other) == tiled


def test_every_device_decodes_its_own_images(params):
    """Within ``shard_map``; a loop over a batch that is split automatically would gather it on every device."""
    mesh = make_mesh({DATA: 4})
    latents = draw_latents(8, 3, 2)
    # The blocked attention of the CPU loops over samples itself.
    autoencoder = AutoencoderKL(CONFIG, attention_backend="xla")
    split = jax.shard_map(
        autoencoder.decode, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec(DATA)), out_specs=PartitionSpec(DATA)
    )
    own = jax.jit(split).lower(params, latents).compile()
    program = own.as_text() or ""
    assert "while" in program
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in program
    assert "all-gather" in (compiled_decode(autoencoder, params, latents, mesh).as_text() or "")
    out = jax.jit(split)(params, latents)
    expected = jax.jit(AutoencoderKL(CONFIG, slice_size=8).decode)(params, latents)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_the_editor_takes_it(params):
    """Images of 8 x 12 px are 4 x 6 latent cells, 2 x 3 tokens of 2 x 2 cells."""
    shape = FluxConfig(12, 1, 0, 6, 2, 5, 4, False, (2, 2, 2))
    autoencoder = AutoencoderKL(CONFIG)
    quickstart = build_editor(QuickstartConfig(shape, ("red",), 2, patch=2, image_size=8))
    editor = dataclasses.replace(quickstart, autoencoder=autoencoder)
    variables = nn.unbox(jax.jit(editor.init)(jax.random.key(0))) | {"autoencoder": params}
    images, grid = draw_images(2, 8, 12), editor.grid(8, 12)
    conditioning = jax.jit(editor.encode)(
        variables, images, editor.text_inputs([Instruction("red"), Instruction("red red")])
    )
    assert conditioning.source.shape == (2, 6, 12)
    decoded = jax.jit(lambda v, x: editor.decode(v, x, grid))(variables, conditioning.source)
    expected = jax.jit(lambda p, x: autoencoder.decode(p, autoencoder.encode(p, x)))(params, images)
    np.testing.assert_allclose(decoded, expected, rtol=1e-5, atol=1e-5)


def test_image_size_is_checked(params):
    with pytest.raises(UserError, match="image size 6x5 px.*multiples of 2"):
        AutoencoderKL(CONFIG).encode(params, draw_images(1, 6, 5))


def test_published_config():
    assert AutoencoderKLConfig.from_dict(RAW, "vae/config.json") == AutoencoderKLConfig()


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "down_block_types=.*4 times 'DownEncoderBlock2D'"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "up_block_types=.*4 times 'UpDecoderBlock2D'"),
        ({"block_out_channels": [128, 100, 512, 512]}, r"block_out_channels=.*100.*norm_num_groups=32"),
        ({"block_out_channels": []}, r"block_out_channels=\(\); expected a tuple"),
        ({"block_out_channels": 64}, "block_out_channels=64; expected a tuple"),
        ({"layers_per_block": 0}, "layers_per_block=0; expected a whole number"),
        ({"latent_channels": "16"}, "latent_channels='16'; expected a whole number"),
        ({"norm_num_groups": 0}, "norm_num_groups=0; expected a whole number"),
        ({"in_channels": 4}, "in_channels=4; expected 3"),
        ({"out_channels": 1}, "out_channels=1; expected 3"),
        ({"act_fn": "gelu"}, "act_fn='gelu'; expected 'silu'"),
        ({"scaling_factor": 0}, "scaling_factor=0; expected a number"),
        ({"scaling_factor": float("nan")}, "scaling_factor=nan; expected a number"),
        ({"shift_factor": "0"}, "shift_factor='0'; expected a number or null"),
        ({"latents_mean": [0.0] * 16}, "latents_mean=.*expected null"),
        ({"latents_std": [1.0] * 16}, "latents_std=.*expected null"),
        ({"use_quant_conv": "no"}, "use_quant_conv='no'; expected true or false"),
        ({"mid_block_add_attention": None}, "mid_block_add_attention=None; expected true or false"),
        ({"_class_name": "AutoencoderKLQwenImage"}, "_class_name='AutoencoderKLQwenImage'; expected 'AutoencoderKL'"),
        ({"time_shift": 1}, "time_shift=1; unknown key"),
    ],
)
def test_config_that_is_not_implemented_is_refused(change, expected):
    with pytest.raises(UserError, match=f"vae/config.json: (?s:.)*{expected}"):
        AutoencoderKLConfig.from_dict(RAW | change, "vae/config.json")


def test_all_refusals_come_together():
    with pytest.raises(UserError, match="2 value") as error:
        AutoencoderKLConfig(act_fn="relu", in_channels=1)
    assert "act_fn='relu'" in str(error.value) and "in_channels=1" in str(error.value)


@pytest.mark.parametrize(
    "setting, expected",
    [
        ({"slice_size": 0}, "slice_size=0"),
        ({"tile_size": 500}, "tile_size=500; expected a multiple of 32 px"),
        ({"tile_size": 0}, "tile_size=0"),
        ({"tile_size": 32.0}, "tile_size=32.0"),
    ],
)
def test_settings_are_checked(setting, expected):
    with pytest.raises(UserError, match=expected):
        AutoencoderKL(**setting)
