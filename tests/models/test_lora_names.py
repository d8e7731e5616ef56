import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import weights
from cocoedit_jax.models.lora_names import MODELS, choose, identify, only
from tests.models.qwen_shapes import qwen_shapes

LINEAR1 = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
ATTENTION = [f"transformer_blocks.{i}.attn.to_q" for i in range(19)]


@pytest.mark.parametrize("name, layers", [
    ("double_blocks.3.img_attn.qkv", [f"transformer_blocks.3.attn.to_{x}" for x in "qkv"]),
    ("double_blocks_3_txt_attn_qkv", [f"transformer_blocks.3.attn.add_{x}_proj" for x in "qkv"]),
    ("double_blocks.0.img_attn.proj", ["transformer_blocks.0.attn.to_out.0"]),
    ("double_blocks_18_txt_mlp_2", ["transformer_blocks.18.ff_context.net.2"]),
    ("double_blocks.0.txt_mod.lin", ["transformer_blocks.0.norm1_context.linear"]),
    ("single_blocks_37_linear1", [f"single_transformer_blocks.37.{x}" for x in LINEAR1]),
    ("single_blocks.0.linear2", ["single_transformer_blocks.0.proj_out"]),
    ("single_blocks.0.modulation.lin", ["single_transformer_blocks.0.norm.linear"]),
    ("guidance_in_out_layer", ["time_text_embed.guidance_embedder.linear_2"]),
    ("final_layer.adaLN_modulation.1", ["norm_out.linear"]),
    ("final_layer_linear", ["proj_out"]),
    ("transformer_blocks.2.attn.to_out.0", ["transformer_blocks.2.attn.to_out.0"]),
    ("single_transformer_blocks_2_proj_out", ["single_transformer_blocks.2.proj_out"]),
    ("x_embedder", ["x_embedder"]),
    ("double_blocks.0.img_attn.norm.query_norm", []),
    ("single_blocks.0.img_attn.qkv", []),
    ("transformer_blocks.0.proj_mlp", []),
    ("double_blocks.x.img_attn.qkv", []),
])  # fmt: skip
def test_layers_of_flux(name, layers):
    assert list(MODELS["flux"].layers_of(name)) == layers

    for layer in layers:
        found = MODELS["flux"].original_of(layer)
        assert found is not None
        there, place = found
        assert MODELS["flux"].layers_of(there)[place] == layer


def test_layers_of_qwen_are_the_linear_layers_of_its_transformer():
    kernels = [name for name, shape in weights.tensor_shapes(qwen_shapes(2)).items() if len(shape) == 2]
    assert len(kernels) == 6 + 2 * 14
    for name in kernels:
        name = name.removesuffix(".weight")
        for dressed in (name, name.replace(".", "_")):
            assert MODELS["qwen"].layers_of(dressed) == (name,)
        assert MODELS["qwen"].original_of(name) == (name, 0)
    for name in ("transformer_blocks.60.attn.to_q", "transformer_blocks.0.txt_mlp.net.1", "txt_norm", "x_embedder",
                 "transformer_blocks.0.ff.net.2", "double_blocks.0.img_attn.qkv", "attn.to_q"):  # fmt: skip
        assert not MODELS["qwen"].layers_of(name) and MODELS["qwen"].original_of(name) is None


@pytest.mark.parametrize("names, model", [
    ([*ATTENTION, "transformer_blocks.19.attn.to_q"], "qwen"),
    ([*ATTENTION, "single_transformer_blocks.0.attn.to_q"], "flux"),
    ([*ATTENTION, "transformer_blocks.0.img_mod.1"], "qwen"),
    ([*ATTENTION, "transformer_blocks_0_ff_net_2"], "flux"),
    (["double_blocks.0.img_attn.qkv", "img_in"], "flux"),  # Black Forest Labs' name
    ([*ATTENTION, "img_in"], "qwen"),  # names of one layout only
    ([*ATTENTION, "double_blocks.1.txt_attn.qkv"], "flux"),
    (["transformer_blocks.59.attn.to_out.0", "something.else"], "qwen"),
])  # fmt: skip
def test_model_by_names(names, model):
    other = next(key for key in MODELS if key != model)
    assert identify(names) == (model,) and only(names) == choose("file", names) == choose("file", names, model) == model
    expected = f"^file: a LoRA of {MODELS[model].title} .*; expected one of {MODELS[other].title}$"
    with pytest.raises(UserError, match=expected):
        choose("file", names, other)


def test_names_that_leave_the_model_open():
    for names in (ATTENTION, ["proj_out", "norm_out_linear"]):
        assert choose("file", names) is None is only(names)
        assert [choose("file", names, key) for key in MODELS] == list(MODELS)
    for names in (["img_in"], ["img_in", "txt_in"]):  # other layers in either
        with pytest.raises(
            UserError, match=f"file: {', '.join(names)} may be of FLUX or Qwen-Image; .*model=flux or model=qwen"
        ):
            choose("file", names)
        assert choose("file", names, "qwen") == "qwen"
    with pytest.raises(
        UserError, match="file: transformer_blocks.0.ff.net.2, transformer_blocks.0.img_mod.1 may be of"
    ):
        choose("file", ["transformer_blocks.0.ff.net.2", "transformer_blocks.0.img_mod.1", "proj_out"])


def test_names_of_no_model():
    unet = ["down_blocks_0_attentions_0_proj_in", "blocks.0.cross_attn.k", "transformer_blocks.60.attn.to_q"]
    with pytest.raises(
        UserError, match="file: no layer of FLUX or Qwen-Image; it adapts blocks.0.cross_attn.k, down_bl"
    ):
        choose("file", unet)
    with pytest.raises(UserError, match="model='sdxl'; expected one of flux, qwen"):
        choose("file", ATTENTION, "sdxl")
