import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import lora, lora_bfl, lora_files, weights
from cocoedit_jax.models.flux import FluxConfig, FluxTransformer
from cocoedit_jax.models.lora_formats import FORMATS
from cocoedit_jax.models.lora_names import MODELS

INPUTS = jnp.ones((1, 2, 3)), jnp.ones((1, 1, 5)), jnp.ones((1, 4)), jnp.ones(1), jnp.ones(1), np.ones((3, 3), int), 1
# All linear layers of the blocks, and some outside of them.
MANY = (
    *lora.DEFAULT_TARGETS, "proj_mlp", "proj_out", "ff.net.0.proj", "ff_context.net.2", "norm1.linear", "norm.linear",
    "norm_out.linear", "x_embedder", "text_embedder.linear_2",
)  # fmt: skip
CONFIGS = {
    "default": lora.LoraConfig(rank=4, alpha=6),
    "few": lora.LoraConfig(rank=3, alpha=3.3, targets=("attn.to_v", "attn.add_k_proj", "attn.to_out.0")),
    "many": lora.LoraConfig(rank=2, alpha=1, targets=MANY),
}


def make_adapter(config, shape=FluxConfig(3, 2, 3, 24, 2, 5, 4, True, (8, 8, 8))):  # noqa: B008 - frozen
    params = jax.eval_shape(lambda key: FluxTransformer(shape).init(key, *INPUTS), jax.random.key(0))["params"]
    adapter = jax.eval_shape(lambda key: lora.init_adapter(key, nn.unbox(params), config), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), adapter)


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def default():
    return CONFIGS["default"]


@pytest.fixture
def trained(default):
    return make_adapter(default)


def write(path, adapter, config, format, **options):
    return lora_files.write_lora(path, lora_files.adapter_layers(adapter, config), config, format, **options)


def effects(layers):
    """{layer: change of its weight [out, in]}."""
    return {name: x.scale * x.b.astype(np.float64) @ x.a for name, x in layers.items()}


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_round_trips(config, format, tmp_path):
    adapter = make_adapter(config)
    file = write(tmp_path / "lora", adapter, config, format)
    found = lora_files.read_lora(file)
    assert found.format == format and found.dtype == "float32" and not found.notes
    assert found.size == sum(x.size for x in jax.tree.leaves(adapter))
    loaded, loaded_config = lora_files.load_lora(file, format)
    baked = format == "diffusers-baked"
    assert (loaded_config.rank, loaded_config.alpha) == (config.rank, config.rank if baked else config.alpha)
    expected = lora.fold_scale(adapter, config) if baked else adapter
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


@pytest.mark.parametrize("dtype, error", [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_half_precision(trained, default, tmp_path, dtype, error):
    file = write(tmp_path / "lora.safetensors", trained, default, "kohya", dtype=dtype)
    tensors, _ = weights.load_safetensors(file)
    assert {str(x.dtype) for x in tensors.values() if x.ndim == 2} == {dtype}
    assert {(str(x.dtype), x.ndim) for name, x in tensors.items() if name.endswith(".alpha")} == {("float32", 0)}
    loaded, config = lora_files.load_lora(file)
    assert config.alpha == default.alpha
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=error, atol=1e-7), loaded, trained)


def test_numbers_beyond_half_precision_are_refused(trained, default, tmp_path):
    trained["transformer_blocks"]["attn"]["to_q"]["lora_B"] += 1e5
    with pytest.raises(UserError, match="diffusers in float16.*2 tensor.*\n.*attn.to_q.lora_B.weight: not finite"):
        write(tmp_path / "x", trained, default, "diffusers", dtype="float16")
    assert not (tmp_path / "x").exists()


def test_what_training_writes(trained, default, tmp_path):
    folder = tmp_path / "lora" / "step_000080"
    lora_files.save_lora(folder, trained, default, {"step": "80"})
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "README.md", "peft/adapter_config.json", "peft/adapter_model.safetensors", "pytorch_lora_weights.safetensors",
    ]  # fmt: skip
    peft = folder / lora_files.PEFT_FOLDER
    for path in (folder, folder / lora_files.DIFFUSERS_FILE, peft, peft / lora_files.PEFT_FILE):
        loaded, loaded_config = lora_files.load_lora(path)
        assert loaded_config == default
        jax.tree.map(np.testing.assert_array_equal, loaded, trained)
    assert lora_files.load_lora(folder, alpha=8)[1].alpha == 8


def test_headers(trained, default, tmp_path):
    lora_files.save_lora(tmp_path, trained, default, {"step": "80"})
    tensors, header = weights.load_safetensors(tmp_path / lora_files.DIFFUSERS_FILE)
    assert (header["format"], header["step"]) == ("pt", "80")
    assert json.loads(header["lora_adapter_metadata"]) == {
        "transformer.r": 4,
        "transformer.lora_alpha": 6,
        "transformer.target_modules": list(lora.DEFAULT_TARGETS),
    }
    assert tensors["transformer.single_transformer_blocks.2.attn.to_k.lora_A.weight"].shape == (4, 48)
    peft, _ = weights.load_safetensors(tmp_path / "peft" / lora_files.PEFT_FILE)
    assert {k.replace("base_model.model.", "transformer.") for k in peft} == set(tensors)
    for format in FORMATS[1:]:  # recorded in one place only
        _, header = weights.load_safetensors(write(tmp_path / format, trained, default, format))
        assert header == {"format": "pt"}


@pytest.mark.parametrize("format, name", [
    ("kohya", "lora_unet_double_blocks_1_img_attn_qkv.lora_down.weight"),
    ("kohya", "lora_unet_single_blocks_2_linear1.alpha"),
    ("comfyui", "diffusion_model.double_blocks.1.img_attn.qkv.lora_down.weight"),
    ("comfyui", "diffusion_model.single_blocks.2.linear1.lora_up.weight"),
])  # fmt: skip
def test_names_of_the_original_layout(trained, default, tmp_path, format, name):
    tensors, _ = weights.load_safetensors(write(tmp_path, trained, default, format))
    assert name in tensors
    assert len(tensors) == 3 * (2 * 4 + 3)


def rewrite(folder, change, header=None, name=lora_files.DIFFUSERS_FILE):
    tensors, old_header = weights.load_safetensors(folder / lora_files.DIFFUSERS_FILE)
    change(tensors)
    weights.save_safetensors(folder / name, tensors, old_header if header is None else header)


def test_unmatched_keys_are_named_together(trained, default, tmp_path):
    write(tmp_path, trained, default, "diffusers")
    block = "transformer.transformer_blocks.0.attn"

    def change(tensors):
        tensors["lora_unet_x.alpha"] = np.ones(1, np.float32)
        tensors["vae.x.lora_A.weight"] = np.ones((2, 2), np.float32)
        tensors[f"{block}.to_q.lora_C.weight"] = tensors[f"{block}.to_q.lora_A.weight"]
        del tensors[f"{block}.to_k.lora_A.weight"]
        tensors[f"{block}.to_v.lora_A.weight"] = np.ones((3, 48), np.float32)
        for half, shape in (("A", (0, 48)), ("B", (48, 0))):
            tensors[f"{block}.to_q.lora_{half}.weight"] = np.ones(shape, np.float32)
        tensors[f"{block}.to_out.0.lora_B.weight"] = np.full((48, 4), np.nan, np.float32)
        tensors["transformer.transformer_blocks.attn.to_q.lora_A.weight"] = np.ones((2, 2), np.float32)
        tensors["transformer.transformer_blocks.attn.to_q.lora_B.weight"] = np.ones((2, 2), np.float32)

    rewrite(tmp_path, change)
    with pytest.raises(UserError) as error:
        lora_files.read_lora(tmp_path)
    for part in (
        "lora_unet_x.alpha",
        "vae.x.lora_A.weight (2, 2): expected transformer.LAYER.lora_A.weight",
        f"{block}.to_q.lora_C.weight",
        f"{block}.to_k.lora_B.weight: its other half is missing",
        f"{block}.to_v.lora_A.weight, {block}.to_v.lora_B.weight: ranks 3 and 4; expected the same",
        f"{block}.to_q.lora_A.weight, {block}.to_q.lora_B.weight: ranks 0 and 0; expected the same, above 0",
        f"{block}.to_out.0.lora_B.weight: not finite",
        "transformer_blocks.attn.to_q: FLUX has no such layer",
    ):
        assert part in str(error.value), part


def test_unmatched_keys_of_the_original_layout(trained, default, tmp_path):
    write(tmp_path, trained, default, "kohya")

    def change(tensors):
        for half, shape in (("down", (4, 48)), ("up", (100, 4))):
            tensors[f"lora_unet_double_blocks_0_img_attn_x.lora_{half}.weight"] = np.ones(shape, np.float32)
            tensors[f"lora_unet_double_blocks_7_img_attn_qkv.lora_{half}.weight"] = np.ones(shape, np.float32)
            tensors[f"lora_unet_transformer_blocks_0_attn_to_q.lora_{half}.weight"] = np.ones(shape, np.float32)
        tensors["lora_vae_model.lora_down.weight"] = np.ones((4, 4), np.float32)

    rewrite(tmp_path, change)
    with pytest.raises(UserError) as error:
        lora_files.read_lora(tmp_path)
    for part in (
        "lora_unet_double_blocks_0_img_attn_x: FLUX has no such layer",
        "lora_unet_double_blocks_7_img_attn_qkv: 100 output rows for 48 input columns; expected q | k | v",
        "holds transformer_blocks.0.attn.to_q, and another key does too",
        "lora_vae_model.lora_down.weight",
    ):
        assert part in str(error.value), part


def test_stacks_must_be_whole_for_a_model_and_need_not_be_for_conversion(trained, default, tmp_path):
    write(tmp_path, trained, default, "diffusers")
    rewrite(tmp_path, lambda tensors: [tensors.pop(k) for k in list(tensors) if "transformer_blocks.0.attn.to_v" in k])
    with pytest.raises(UserError, match=r"transformer_blocks.attn.to_v.lora_A: layers \[1\]; expected all from 0 on"):
        lora_files.load_lora(tmp_path)
    found = lora_files.read_lora(tmp_path)
    again = lora_files.read_lora(lora_files.write_lora(tmp_path / "k", found.layers, found.config, "kohya"))
    assert again.layers.keys() == found.layers.keys()


def test_rank_that_differs_from_the_header(trained, default, tmp_path):
    write(tmp_path, trained, default, "diffusers")
    rewrite(tmp_path, lambda _: None, {lora_files.METADATA_KEY: json.dumps({"transformer.r": 8})})
    with pytest.raises(UserError, match=r"rank 4 in single_transformer_blocks.0.attn.to_k.*; its configuration says 8"):
        lora_files.load_lora(tmp_path)


@pytest.mark.parametrize("key", ["r", "lora_alpha", "x.r"])
def test_header_without_the_prefix_is_refused(trained, default, tmp_path, key):
    """diffusers fails on it; taking it for alpha = rank would halve the strength."""
    write(tmp_path, trained, default, "diffusers")
    rewrite(tmp_path, lambda _: None, {lora_files.METADATA_KEY: json.dumps({key: 4})})
    with pytest.raises(UserError, match="starts with 'transformer.'"):
        lora_files.read_lora(tmp_path)


def test_patterns_of_peft(trained, default, tmp_path):
    """PEFT's patterns match ends of names, as its own get_pattern_key does."""
    write(tmp_path, trained, default, "peft")
    path = tmp_path / lora_files.PEFT_CONFIG
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"alpha_pattern": {"to_q": 12, "transformer_blocks.0.attn.to_k": 2}}))
    found, plain = lora_files.read_lora(tmp_path), lora_files.adapter_layers(trained, default)
    for name, effect in effects(found.layers).items():
        factor = 2 if name.endswith("to_q") else 1 / 3 if name == "transformer_blocks.0.attn.to_k" else 1
        np.testing.assert_allclose(effect, factor * effects({name: plain[name]})[name], rtol=1e-5, atol=1e-6)
    path.write_text(json.dumps(written | {"rank_pattern": {"to_q": 2}}))
    with pytest.raises(UserError, match="rank 4 in .*to_q.* its configuration says 2"):
        lora_files.read_lora(tmp_path)


@pytest.mark.parametrize("field", ["use_dora", "use_rslora", "lora_bias", "modules_to_save"])
def test_other_kinds_of_lora_are_refused(trained, default, tmp_path, field):
    write(tmp_path, trained, default, "peft")
    path = tmp_path / lora_files.PEFT_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: ["x"]}))
    with pytest.raises(UserError, match=field):
        lora_files.load_lora(tmp_path)


def test_unreadable_configuration_and_other_files(trained, default, tmp_path):
    with pytest.raises(UserError, match="no LoRA adapter there"):
        lora_files.load_lora(tmp_path)
    write(tmp_path, trained, default, "diffusers")
    write(tmp_path / "peft", trained, default, "peft")
    config = tmp_path / "peft" / lora_files.PEFT_CONFIG
    for text in ("{", "[]", '{"lora_alpha": "64"}'):
        config.write_text(text)
        with pytest.raises(UserError, match="configuration is not readable"):
            lora_files.load_lora(tmp_path / "peft")
    config.unlink()
    with pytest.raises(UserError, match="configuration is not readable"):
        lora_files.load_lora(tmp_path / "peft")
    assert lora_files.load_lora(tmp_path / "peft", alpha=6)[1].alpha == 6
    with pytest.raises(UserError, match="no LoRA of FLUX or Qwen-Image in kohya format; it holds transformer.single"):
        lora_files.read_lora(tmp_path, "kohya")
    with pytest.raises(UserError, match="format='lycoris'; expected one of diffusers"):
        lora_files.read_lora(tmp_path, "lycoris")
    with pytest.raises(UserError, match="header records alpha"):
        lora_files.read_lora(tmp_path, "diffusers-baked")
    for alpha in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="alpha=.*; expected a number above 0"):
            lora_files.read_lora(tmp_path, alpha=alpha)
    rewrite(tmp_path, dict.clear)
    with pytest.raises(UserError, match="no LoRA of FLUX or Qwen-Image in any known format; it holds no tensors"):
        lora_files.load_lora(tmp_path)
    for name in "ab":
        write(tmp_path / "two" / f"{name}.safetensors", trained, default, "kohya")
    with pytest.raises(UserError, match="2 .safetensors files there, name one"):
        lora_files.read_lora(tmp_path / "two")


def test_files_of_the_released_code_lose_alpha(trained, capsys, tmp_path):
    """Trained at alpha = 2 rank, they load at alpha = rank: half the strength."""
    config = lora.LoraConfig(4, 8)
    write(tmp_path, trained, config, "diffusers")
    name = "adapter_model_converted.safetensors"
    rewrite(tmp_path, lambda _: None, {}, name)
    loaded, loaded_config = lora_files.load_lora(tmp_path / name)
    assert loaded_config.scale == 1 and "give alpha=8" in capsys.readouterr().err
    assert lora_files.load_lora(tmp_path / name, alpha=8)[1].scale == 2
    assert not capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, loaded, trained)
    (tmp_path / name).rename(tmp_path / "other.safetensors")  # anyone's file without alpha: scale 1 is meant
    assert lora_files.load_lora(tmp_path / "other.safetensors")[1].scale == 1
    assert not capsys.readouterr().err


KOHYA = "lora_unet_double_blocks_{}_{}"


def kohya_file(path, rng, ranks, alphas):
    """A file as kohya's trainer writes it, dense and with its own rank and alpha per layer; and what it changes."""
    tensors, expected = {}, {}
    for i in range(2):
        for j, (name, parts) in enumerate({"img_attn_qkv": ("to_q", "to_k", "to_v"), "txt_attn_proj": ("to_add_out",),
                                           "img_attn_proj": ("to_out.0",)}.items()):  # fmt: skip
            rank, alpha, stem = ranks[j], alphas[j], KOHYA.format(i, name)
            down = rng.standard_normal((rank, 8), np.float32)
            up = rng.standard_normal((8 * len(parts), rank), np.float32)
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            if alpha is not None:
                tensors[f"{stem}.alpha"] = np.asarray(alpha, np.float32)
            delta = (alpha or rank) / rank * up.astype(np.float64) @ down
            for part, rows in zip(parts, np.split(delta, len(parts)), strict=True):
                expected[f"transformer_blocks.{i}.attn.{part}"] = rows
    weights.save_safetensors(path, tensors, {"ss_network_dim": "4"})
    return expected


@pytest.mark.parametrize("ranks, alphas, scale", [
    ((4, 4, 4), (2, 2, 2), 0.5),
    ((4, 4, 4), (None, None, None), 1),
    ((3, 6, 2), (6, 12, 4), 2),
    ((5, 4, 4), (2, None, 8), 1),
], ids=["one alpha", "no alpha", "ranks differ", "alphas differ"])  # fmt: skip
def test_alphas_and_ranks_of_each_layer(tmp_path, ranks, alphas, scale, capsys):
    path = tmp_path / "kohya.safetensors"
    expected = kohya_file(path, np.random.default_rng(0), ranks, alphas)
    found = lora_files.read_lora(path)
    assert found.format == "kohya" and found.header == {}
    assert found.config.rank == max(ranks) and found.config.scale == scale
    assert (
        {x.a.shape[0] for x in found.layers.values()} == {x.b.shape[1] for x in found.layers.values()} == {max(ranks)}
    )
    assert bool(found.notes) == (len(set(ranks)) > 1)
    actual = effects(found.layers)
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
    adapter, config = lora_files.load_lora(path)
    assert bool(capsys.readouterr().err) == bool(found.notes)
    assert set(adapter) == {"transformer_blocks"} and len(jax.tree.leaves(adapter)) == 10
    assert config.targets == tuple(sorted(expected))
    doubled = effects(lora_files.read_lora(path, alpha=2 * ranks[0]).layers)["transformer_blocks.1.attn.to_k"]
    once = effects(lora_files.read_lora(path, alpha=ranks[0]).layers)["transformer_blocks.1.attn.to_k"]
    np.testing.assert_allclose(doubled, 2 * once, rtol=1e-5)


@pytest.mark.parametrize("prefix, change", [
    ("", lambda name: name),  # transformer.save_lora_adapter
    ("lora_transformer_", lambda name: name.replace(".", "_")),  # OneTrainer
    ("lora_unet_", lambda name: name.replace(".", "_")),  # kohya's names for diffusers' model
    ("diffusion_model.", lambda name: name),
])  # fmt: skip
def test_diffusers_names_under_other_prefixes(trained, default, tmp_path, prefix, change):
    layers = lora_files.adapter_layers(trained, default)
    tensors = {}
    for name, x in layers.items():
        stem = prefix + change(name)
        tensors |= {f"{stem}.lora_A.weight": x.a, f"{stem}.lora_B.weight": x.b}
        tensors[f"{stem}.alpha"] = np.asarray(x.alpha, np.float32)
    weights.save_safetensors(tmp_path / "x.safetensors", tensors)
    loaded, config = lora_files.load_lora(tmp_path)
    assert (config.rank, config.alpha) == (4, 6)
    jax.tree.map(np.testing.assert_array_equal, loaded, trained)


def test_original_names_under_peft_prefix(trained, default, tmp_path):
    """As fal's Kontext trainer writes them."""
    fused = lora_bfl.fuse(MODELS["flux"], lora_files.adapter_layers(trained, default))
    tensors = {}
    for name, x in fused.items():
        tensors |= {f"base_model.model.{name}.lora_A.weight": x.a, f"base_model.model.{name}.lora_B.weight": x.b}
    weights.save_safetensors(tmp_path / "fal.safetensors", tensors)
    assert (
        effects(lora_files.read_lora(tmp_path, alpha=6).layers).keys()
        == lora_files.adapter_layers(trained, default).keys()
    )
    jax.tree.map(np.testing.assert_array_equal, lora_files.load_lora(tmp_path, alpha=6)[0], trained)


def test_places_to_write(trained, default, tmp_path):
    assert write(tmp_path / "a.safetensors", trained, default, "kohya").name == "a.safetensors"
    assert write(tmp_path / "a", trained, default, "kohya").name == lora_files.DIFFUSERS_FILE
    with pytest.raises(UserError, match="format peft is a folder"):
        write(tmp_path / "b.safetensors", trained, default, "peft")
    write(tmp_path / "p", trained, default, "peft")
    (tmp_path / "p" / lora_files.PEFT_FILE).unlink()
    before = (tmp_path / "a.safetensors").read_bytes()
    for path, format in (("a.safetensors", "comfyui"), ("p", "peft")):
        with pytest.raises(UserError, match="exists; add --overwrite"):
            write(tmp_path / path, trained, default, format, overwrite=False)
    assert (tmp_path / "a.safetensors").read_bytes() == before
    for name, value in (("format", "x"), ("dtype", "int8")):
        with pytest.raises(UserError, match=f"{name}='{value}'"):
            write(tmp_path / "c", trained, default, **({"format": "kohya"} | {name: value}))
    assert not list(tmp_path.rglob("*.tmp"))


def test_text_encoders_are_left_out_with_a_note(trained, default, tmp_path):
    file = write(tmp_path, trained, default, "kohya")
    tensors, header = weights.load_safetensors(file)
    for half, shape in (("down", (4, 8)), ("up", (8, 4))):
        tensors[f"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_{half}.weight"] = np.ones(shape, np.float32)
    weights.save_safetensors(file, tensors, header)
    found = lora_files.read_lora(file)
    assert found.layers.keys() == lora_files.adapter_layers(trained, default).keys()
    assert any("2 tensor(s) of text encoders are left out: lora_te1_text_model" in note for note in found.notes)


def test_some_layers_of_a_stack(trained, default, tmp_path):
    """What adapts the first and last block only gets zeros between, given the model that it is for."""
    shape = FluxConfig(3, 2, 3, 24, 2, 5, 4, True, (8, 8, 8))
    layers = lora_files.adapter_layers(trained, default)
    some = {name: x for name, x in layers.items() if ".1." not in name}
    file = lora_files.write_lora(tmp_path / "some.safetensors", some, default, "diffusers")
    with pytest.raises(UserError, match=r"layers \[0, 2\]; expected all from 0 on"):
        lora_files.load_lora(file)
    params = nn.unbox(
        jax.eval_shape(lambda key: FluxTransformer(shape).init(key, *INPUTS), jax.random.key(0))["params"]
    )
    adapter, config = lora_files.load_lora(file, transformer_params=params)
    filled = lora_files.adapter_layers(adapter, config)
    assert filled.keys() == layers.keys()
    for name, x in filled.items():
        expected = x.scale * x.b @ x.a
        np.testing.assert_allclose(
            expected, layers[name].scale * layers[name].b @ layers[name].a * (name in some), rtol=1e-5
        )
    with pytest.raises(UserError, match="does not fit the kernel"):
        wider = jax.tree.map(lambda x: jax.ShapeDtypeStruct((*x.shape[:-1], x.shape[-1] + 1), x.dtype), params)
        lora_files.load_lora(file, transformer_params=wider)
