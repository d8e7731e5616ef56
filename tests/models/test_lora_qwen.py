"""LoRA of Qwen-Image-Edit: files, names and size, on shapes alone."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import lora, lora_files, modulation, weights
from cocoedit_jax.models.lora_formats import FORMATS, unread_by_diffusers
from tests.models.qwen_shapes import qwen_shapes

SHAPES = qwen_shapes(2, heads=2, head_size=6, text=6, channels=8)
# All linear layers but those of the time embedding.
MANY = (
    *lora.DEFAULT_TARGETS, "img_mod.1", "txt_mod.1", "net.0.proj", "net.2", "img_in", "txt_in", "norm_out.linear",
    "proj_out",
)  # fmt: skip
CONFIGS = {"default": lora.LoraConfig(3, 6), "many": lora.LoraConfig(2, 5, MANY)}


def make_adapter(config, shapes=SHAPES):
    adapter = jax.eval_shape(lambda key: lora.init_adapter(key, shapes, config), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), adapter)


def write(path, adapter, config, format, **options):
    layers = lora_files.adapter_layers(adapter, config)
    return lora_files.write_lora(path, layers, config, format, model="qwen", **options)


def test_real_size():
    shapes = qwen_shapes()
    adapter = jax.eval_shape(lambda key: lora.init_adapter(key, shapes, lora.LoraConfig()), jax.random.key(0))
    tensors = weights.tensor_shapes(adapter)
    assert len(tensors) == 960
    assert sum(leaf.size for leaf in jax.tree.leaves(adapter)) == 94_371_840
    assert tensors["transformer_blocks.59.attn.to_out.0.lora_B.weight"] == (3072, 32)
    assert {name.partition(".attn.")[0] for name in tensors} == {f"transformer_blocks.{i}" for i in range(60)}
    lora.check_fits(adapter, shapes, "file")


def test_every_module_name_reads_back():
    names = {name.rpartition(".")[0] for name in weights.tensor_shapes(SHAPES)}
    for name in names:
        assert weights.module_name(*weights.module_path(name)) == name
    assert weights.module_path("transformer_blocks.7.img_mod.1") == (("transformer_blocks", "img_mod.1"), 7)
    expected = ("transformer_blocks", "txt_mlp", "net.0.proj"), 59
    assert weights.module_path("transformer_blocks.59.txt_mlp.net.0.proj") == expected


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_round_trips(name, format, tmp_path):
    config = CONFIGS[name]
    adapter = make_adapter(config)
    file = write(tmp_path / "lora", adapter, config, format)
    found = lora_files.read_lora(file)
    assert found.model == (None if name == "default" else "qwen")  # attention of the first blocks is FLUX's as well
    assert found.format == format and not found.notes
    assert found.size == sum(x.size for x in jax.tree.leaves(adapter))
    baked = format == "diffusers-baked"
    for model, shapes in (("qwen", None), (None, SHAPES)):
        loaded, loaded_config = lora_files.load_lora(file, model=model, transformer_params=shapes)
        assert (loaded_config.rank, loaded_config.alpha) == (config.rank, config.rank if baked else config.alpha)
        jax.tree.map(np.testing.assert_array_equal, loaded, lora.fold_scale(adapter, config) if baked else adapter)


@pytest.mark.parametrize("format, prefix, change", [
    ("kohya", "lora_unet_", lambda name: name.replace(".", "_")),
    ("comfyui", "diffusion_model.", lambda name: name),
])  # fmt: skip
def test_layers_are_not_renamed_or_fused(format, prefix, change, tmp_path):
    """The change of every weight, put together by hand from the file; no halves exchanged, nothing left over."""
    config = CONFIGS["many"]
    adapter = make_adapter(config)
    tensors, header = weights.load_safetensors(write(tmp_path / "x.safetensors", adapter, config, format))
    ours = weights.to_diffusers(adapter)
    names = {name.rpartition(".lora_")[0] for name in ours}
    assert len(names) == 4 + 2 * 14 and header == {"format": "pt"}
    for name in names:
        stem = prefix + change(name)
        alpha, down, up = (tensors.pop(f"{stem}.{leaf}") for leaf in ("alpha", "lora_down.weight", "lora_up.weight"))
        a, b = (ours[f"{name}.lora_{half}.weight"] for half in "AB")
        np.testing.assert_allclose(alpha / down.shape[0] * up @ down, 2.5 * b @ a, rtol=1e-5)
    assert not tensors
    assert not unread_by_diffusers(names, format)


def test_whole_depth_tells_the_model_by_attention_alone(tmp_path):
    config = lora.LoraConfig(1, 2)
    adapter = make_adapter(config, qwen_shapes(60, heads=1, head_size=6, text=3, channels=4))
    layers = lora_files.adapter_layers(adapter, config)
    assert len(layers) == 480
    for format in FORMATS:
        found = lora_files.read_lora(lora_files.write_lora(tmp_path / format, layers, config, format))
        assert found.model == "qwen" and found.layers.keys() == layers.keys()
    tensors, _ = weights.load_safetensors(tmp_path / "kohya" / lora_files.DIFFUSERS_FILE)
    assert "lora_unet_transformer_blocks_59_attn_add_k_proj.lora_up.weight" in tensors and len(tensors) == 3 * 480


def test_names_of_both_models_need_the_model_where_it_matters(tmp_path):
    config = CONFIGS["default"]
    layers = lora_files.adapter_layers(make_adapter(config), config)
    for format in ("kohya", "comfyui"):
        with pytest.raises(
            UserError, match=f"{format}: FLUX or Qwen-Image have all .* expected model=flux or model=qwen"
        ):
            lora_files.write_lora(tmp_path / "x.safetensors", layers, config, format)
    assert not list(tmp_path.iterdir())
    keys = {}
    for model in ("flux", "qwen"):
        file = lora_files.write_lora(tmp_path / model, layers, config, "comfyui", model=model)
        keys[model] = {key.split(".")[1] for key in weights.load_safetensors(file)[0]}
    assert keys == {"flux": {"double_blocks"}, "qwen": {"transformer_blocks"}}
    with pytest.raises(UserError, match="kohya: a LoRA of Qwen-Image .*; expected one of FLUX"):
        lora_files.write_lora(tmp_path, {"transformer_blocks.0.img_mod.1": layers.popitem()[1]}, config, "kohya",
                              model="flux")  # fmt: skip


@pytest.mark.parametrize("prefix, change, leaf", [
    ("", lambda name: name, "lora_{}.default.weight"),  # PEFT's names from memory
    ("", lambda name: name, "lora_{}.weight"),  # transformer.save_lora_adapter
    ("transformer.", lambda name: name, "lora_{}.weight"),
    ("lora_transformer_", lambda name: name.replace(".", "_"), "lora_{}.weight"),
    ("base_model.model.", lambda name: name, "lora_{}.weight"),
])  # fmt: skip
@pytest.mark.parametrize("name", CONFIGS)
def test_other_dresses(prefix, change, leaf, name, tmp_path):
    config = CONFIGS[name]
    adapter = make_adapter(config)
    tensors = {}
    for layer, x in lora_files.adapter_layers(adapter, config).items():
        tensors |= {f"{prefix}{change(layer)}.{leaf.format(half)}": f for half, f in (("A", x.a), ("B", x.b))}
    weights.save_safetensors(tmp_path / "x.safetensors", tensors)
    loaded, loaded_config = lora_files.load_lora(tmp_path, alpha=config.alpha, transformer_params=SHAPES)
    assert loaded_config.scale == config.scale
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)


def test_released_files_leave_the_scale_to_the_user(tmp_path, capsys):
    config = lora.LoraConfig(2, 4)
    adapter = make_adapter(config, qwen_shapes(20, heads=1, head_size=6, text=3))
    tensors, _ = weights.load_safetensors(write(tmp_path / "peft", adapter, config, "peft"))
    released = tmp_path / "adapter_model_converted.safetensors"
    tensors = {name.replace("base_model.model", "transformer"): tensor for name, tensor in tensors.items()}
    weights.save_safetensors(released, tensors)
    found = lora_files.read_lora(released)
    assert (found.model, found.config.scale) == ("qwen", 1) and len(found.notes) == 1
    for part in ("does not record its alpha", "scale 2", "ran at scale 1", "alpha=4 for", "alpha=2 for"):
        assert part in found.notes[0], part
    for alpha in (2, 4):
        loaded, loaded_config = lora_files.load_lora(released, alpha=alpha)
        assert loaded_config.scale == alpha / 2 and not capsys.readouterr().err
        jax.tree.map(np.testing.assert_array_equal, loaded, adapter)


def test_lora_of_the_other_model(tmp_path):
    config = lora.LoraConfig(2, 2, ("attn.to_q", "txt_mod.1"))
    file = write(tmp_path, make_adapter(config), config, "diffusers")
    flux = {"single_transformer_blocks": {"attn": SHAPES["transformer_blocks"]["attn"]}, "x_embedder": SHAPES["img_in"]}
    refused = f"^{re.escape(str(file))}: a LoRA of Qwen-Image .*; expected one of FLUX$"
    for options in ({"model": "flux"}, {"transformer_params": flux}):
        with pytest.raises(UserError, match=refused):
            lora_files.load_lora(file, **options)
    with pytest.raises(UserError, match=refused):
        lora_files.stack_layers(lora_files.read_lora(file), flux)
    assert lora_files.model_of(flux) == "flux" and lora_files.model_of(SHAPES) == "qwen"
    assert lora_files.model_of({"dense": SHAPES["img_in"]}) is None


def test_lora_of_no_model(tmp_path):
    pair = {"lora_down.weight": np.ones((2, 8), np.float32), "lora_up.weight": np.ones((8, 2), np.float32)}
    for stem in ("lora_unet_down_blocks_0_attentions_0_proj_in", "diffusion_model.blocks.0.cross_attn.k"):
        file = tmp_path / f"{stem}.safetensors"
        weights.save_safetensors(file, {f"{stem}.{leaf}": tensor for leaf, tensor in pair.items()})
        with pytest.raises(UserError, match="no layer of FLUX or Qwen-Image; it adapts"):
            lora_files.read_lora(file)


def test_some_blocks_of_a_file_fill_up_to_the_model(tmp_path):
    config = CONFIGS["many"]
    layers = lora_files.adapter_layers(make_adapter(config), config)
    some = {name: x for name, x in layers.items() if ".0." not in name.partition(".attn")[0]}
    assert 0 < len(some) < len(layers)
    file = lora_files.write_lora(tmp_path / "x.safetensors", some, config, "kohya")
    adapter, loaded_config = lora_files.load_lora(file, transformer_params=SHAPES)
    for name, x in lora_files.adapter_layers(adapter, loaded_config).items():
        np.testing.assert_array_equal(x.b, layers[name].b * (name in some))


@pytest.mark.parametrize("target, replaced", [
    ("attn.to_q", False), ("net.2", False), ("img_in", False), ("proj_out", False), ("img_mod.1", True),
    ("txt_mod.1", True), ("norm_out.linear", True), ("timestep_embedder.linear_2", True),
])  # fmt: skip
def test_layers_that_modulation_tables_replace(target, replaced):
    """A LoRA of these needs them: tables are left out where any_replaced says so."""
    config = lora.LoraConfig(1, 1, (target,))
    adapter = make_adapter(config)
    assert modulation.any_replaced(lora_files.adapter_layers(adapter, config)) == replaced
    rest, part = modulation.split(SHAPES)
    lora.check_fits(adapter, part if replaced else rest, "file")
    assert lora_files.model_of(rest) == "qwen"


def test_what_training_writes(tmp_path):
    config = CONFIGS["many"]
    base = "Qwen/Qwen-Image-Edit-2509"
    lora_files.save_lora(tmp_path, make_adapter(config), config, {"base_model": base})
    card = (tmp_path / "README.md").read_text()
    for part in (f"base_model: {base}\n", f"| Base model | {base} |", "| Architecture | Qwen-Image |",
                 "the base model is a Qwen-Image pipeline", f'from_pretrained("{base}")'):  # fmt: skip
        assert part in card, part
    assert "FLUX" not in card
    assert lora_files.load_lora(tmp_path)[1] == lora_files.load_lora(tmp_path / "peft")[1] == config
    attention = lora.LoraConfig(1, 2)
    for model, title in ((None, "FLUX or Qwen-Image"), ("qwen", "Qwen-Image"), ("flux", "FLUX")):
        lora_files.save_lora(tmp_path, make_adapter(attention), attention, model=model)
        assert f"| Architecture | {title} |" in (tmp_path / "README.md").read_text()
