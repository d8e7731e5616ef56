import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import weights
from cocoedit_jax.models.autoencoder import Autoencoder
from cocoedit_jax.models.autoencoder_qwen import AutoencoderQwen
from cocoedit_jax.models.autoencoder_qwen_config import AutoencoderQwenConfig
from cocoedit_jax.models.autoencoder_qwen_weights import load_params, stored_shapes, unused_parameters
from cocoedit_jax.sharding.mesh import DATA, make_mesh
from cocoedit_jax.sharding.rules import parameter_shardings

CONFIG = AutoencoderQwenConfig(
    base_dim=4,
    z_dim=3,
    dim_mult=(1, 2),
    num_res_blocks=1,
    temperal_downsample=(True,),
    latents_mean=(0.1, -0.2, 0.3),
    latents_std=(1.0, 2.0, 0.5),
)


def raw_config(config):
    """As diffusers writes it."""
    fields = dataclasses.asdict(config).items()
    return {"_class_name": "AutoencoderKLQwenImage", "_diffusers_version": "0.34.0.dev0", "dropout": 0.0} | {
        name: list(value) if isinstance(value, tuple) else value for name, value in fields
    }


RAW = raw_config(AutoencoderQwenConfig())


@pytest.fixture(scope="module")
def params():
    return nn.unbox(jax.jit(AutoencoderQwen(CONFIG).init)(jax.random.key(0)))


def draw_images(batch, height, width):
    return np.random.default_rng(1).random((batch, height, width, 3), np.float32)


def count(shapes):
    return sum(math.prod(shape) for shape in shapes.values())


def test_real_size():
    autoencoder: Autoencoder = AutoencoderQwen()
    assert (autoencoder.factor, autoencoder.channels) == (8, 16)
    config = AutoencoderQwenConfig()
    used, stored = weights.tensor_shapes(AutoencoderQwen().abstract_params()), stored_shapes(config)
    unused = unused_parameters(config)
    assert len(stored) == 194
    assert count(stored) == 126_892_531
    assert count(used) == 44_599_603
    assert count(used) + count(unused) == count(stored)
    assert stored["encoder.down_blocks.3.conv_shortcut.weight"] == (192, 96, 1, 1, 1)
    assert stored["encoder.down_blocks.8.resample.1.weight"] == (384, 384, 3, 3)
    assert stored["decoder.mid_block.attentions.0.norm.gamma"] == (384, 1, 1)
    assert stored["decoder.up_blocks.1.resnets.0.conv1.weight"] == (384, 192, 3, 3, 3)
    assert used["decoder.up_blocks.1.resnets.0.conv1.weight"] == (384, 192, 3, 3)
    assert unused["decoder.up_blocks.1.resnets.0.conv1.weight"] == (384, 192, 2, 3, 3)
    whole = {name for name in unused if name not in used}
    homes = (f"encoder.down_blocks.{i}" for i in (5, 8)), (f"decoder.up_blocks.{i}.upsamplers.0" for i in (0, 1))
    assert whole == {f"{m}.time_conv.{leaf}" for group in homes for m in group for leaf in ("weight", "bias")}


def test_fresh_parameters_are_usable_and_replicated(params):
    autoencoder = AutoencoderQwen(CONFIG)
    images = draw_images(1, 4, 6)
    latents = jax.jit(autoencoder.encode)(params, images)
    assert latents.shape == (1, 2, 3, 3)
    decoded = jax.jit(autoencoder.decode)(params, latents)
    assert decoded.shape == images.shape and np.isfinite(decoded).all() and np.ptp(decoded) > 0
    boxed = jax.eval_shape(autoencoder.init, jax.random.key(0))
    shardings = parameter_shardings(boxed, make_mesh({"fsdp": 2, "tensor": 4}))
    assert all(s.is_fully_replicated for s in jax.tree.leaves(shardings))


def test_every_device_encodes_its_own_images(params):
    mesh, images = make_mesh({DATA: 4}), draw_images(8, 4, 6)
    autoencoder = AutoencoderQwen(CONFIG, attention_backend="xla")
    split = jax.jit(
        jax.shard_map(
            autoencoder.encode,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(DATA)),
            out_specs=PartitionSpec(DATA),
        )
    )
    program = split.lower(params, images).compile().as_text() or ""
    assert "while" in program
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in program
    expected = jax.jit(AutoencoderQwen(CONFIG, slice_size=8).encode)(params, images)
    np.testing.assert_allclose(split(params, images), expected, rtol=1e-5, atol=1e-5)


def test_image_size_is_checked(params):
    with pytest.raises(UserError, match="image size 6x5 px.*multiples of 2"):
        AutoencoderQwen(CONFIG).encode(params, draw_images(1, 6, 5))


def test_settings_are_checked():
    with pytest.raises(UserError, match=r"AutoencoderQwen: 2 value(?s:.)*slice_size=0(?s:.)*tile_size=500.*32 px"):
        AutoencoderQwen(slice_size=0, tile_size=500)


def write_model(folder, **changes):
    """A file of ``CONFIG``'s tensors, full of ones; ``changes`` are other shapes, or None for no such tensor."""
    (folder / "config.json").write_text(json.dumps(raw_config(CONFIG)))
    shapes = stored_shapes(CONFIG) | {name.replace("__", "."): shape for name, shape in changes.items()}
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items() if shape is not None}
    weights.save_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors)


def test_what_is_not_used_may_be_absent(tmp_path):
    write_model(tmp_path, **{name: None for name in stored_shapes(CONFIG) if "time_conv" in name})
    loaded = load_params(tmp_path, AutoencoderQwen(CONFIG).abstract_params())
    assert all((x == 1).all() for x in jax.tree.leaves(loaded))


def test_all_misfits_come_together_in_the_shapes_of_the_file(tmp_path):
    write_model(
        tmp_path,
        encoder__conv_in__weight=None,
        decoder__conv_in__weight=(8, 3, 3, 3),
        decoder__norm_out__gamma=(4,),
        decoder__up_blocks__1__upsamplers__0__time_conv__bias=(8,),
    )
    with pytest.raises(UserError, match="4 problem") as error:
        load_params(tmp_path, AutoencoderQwen(CONFIG).abstract_params())
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert lines[0].startswith(f"{tmp_path}: ")
    assert lines[1:] == [
        "missing: encoder.conv_in.weight (4, 3, 3, 3, 3)",
        "unexpected: decoder.up_blocks.1.upsamplers.0.time_conv.bias (8,)",
        "wrong shape: decoder.conv_in.weight (8, 3, 3, 3), expected (8, 3, 3, 3, 3)",
        "wrong shape: decoder.norm_out.gamma (4,), expected (4, 1, 1, 1)",
    ]


def test_published_config():
    assert AutoencoderQwenConfig.from_dict(RAW, "vae/config.json") == AutoencoderQwenConfig()


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"base_dim": 1}, "base_dim=1; expected a whole number, at least 2"),
        ({"z_dim": 0}, "z_dim=0; expected a whole number"),
        ({"num_res_blocks": 2.0}, "num_res_blocks=2.0; expected a whole number"),
        ({"dim_mult": []}, r"dim_mult=\(\); expected a tuple"),
        ({"dim_mult": [1, 0.5, 4, 4]}, r"dim_mult=\(1, 0.5, 4, 4\); expected a tuple"),
        ({"attn_scales": [0.25]}, r"attn_scales=\(0.25,\); expected an empty list"),
        ({"temperal_downsample": [True]}, r"temperal_downsample=\(True,\); expected 3 times true or false"),
        ({"temperal_downsample": [0, 1, 1]}, r"temperal_downsample=\(0, 1, 1\); expected 3 times true or false"),
        ({"dim_mult": [1]}, "temperal_downsample=.*expected 0 times true or false"),
        ({"input_channels": 4}, "input_channels=4; expected 3"),
        ({"latents_mean": [0.0] * 15}, "latents_mean=.*expected one number per channel of a latent .z_dim=16"),
        ({"latents_mean": None}, "latents_mean=None; expected one number"),
        ({"latents_std": [1.0] * 15 + [0.0]}, "latents_std=.*expected one positive number per channel"),
        ({"_class_name": "AutoencoderKL"}, "_class_name='AutoencoderKL'; expected 'AutoencoderKLQwenImage'"),
        ({"is_residual": True}, "is_residual=True; unknown key"),
    ],
)
def test_config_that_is_not_implemented_is_refused(change, expected):
    with pytest.raises(UserError, match=f"vae/config.json: (?s:.)*{expected}"):
        AutoencoderQwenConfig.from_dict(RAW | change, "vae/config.json")


def test_all_refusals_come_together():
    with pytest.raises(UserError, match="2 value") as error:
        AutoencoderQwenConfig(attn_scales=(1.0,), input_channels=4)
    assert "attn_scales=(1.0,)" in str(error.value) and "input_channels=4" in str(error.value)
