"""Every format of our LoRA files in diffusers and ComfyUI's arithmetic, and what becomes of the files that users have.

diffusers reads the original layout's ``linear1`` at FLUX's real width only, and silently leaves out layers outside of
the blocks there; so tiny models of double blocks, one single block of real width, and for ComfyUI the arithmetic alone.
"""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cocoedit_jax.models import lora, lora_files, weights
from cocoedit_jax.models.layers import LORA
from cocoedit_jax.models.lora_formats import unread_by_diffusers
from tests.parity.flux_cases import draw_case
from tests.parity.lora_cases import (
    adapter_effects,
    assert_same_adapter,
    assert_same_effects,
    build_pipeline,
    effects,
    random_adapter,
    write,
)
from tests.parity.transformer_cases import SEED, relative_error

FORWARD = 1e-5
BLOCKS = (
    *lora.DEFAULT_TARGETS, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "norm1.linear",
    "norm1_context.linear",
)  # fmt: skip
SINGLE = ("proj_mlp", "norm.linear", "single_transformer_blocks.0.proj_out", "single_transformer_blocks.1.proj_out")
FORMATS = ("diffusers", "diffusers-baked", "kohya", "comfyui")


def with_adapter(case, adapter, config):
    return case.apply({"params": case.params(), LORA: lora.fold_scale(adapter, config)})


@pytest.mark.parametrize("format", FORMATS)
def test_diffusers_loads_every_key_and_computes_as_ours(double_blocks, format, tmp_path, log):
    config = lora.LoraConfig(rank=3, alpha=7.5, targets=BLOCKS)
    adapter = random_adapter(double_blocks, config)
    pipe = build_pipeline(double_blocks.reference)
    pipe.load_lora_weights(write(tmp_path / "lora.safetensors", adapter, config, format))
    assert not log()
    assert_same_effects(adapter_effects(pipe.transformer, "default_0"), effects(adapter, config))
    if format == "diffusers":
        assert_same_adapter(pipe.transformer, "default_0", adapter, config)
    elif format == "diffusers-baked":
        one = lora.LoraConfig(config.rank, config.rank, config.targets)
        assert_same_adapter(pipe.transformer, "default_0", lora.fold_scale(adapter, config), one)
    else:  # diffusers moves alpha / r into A; each projection must have got its own block back
        ranks = {x.weight.shape[0] for n, x in pipe.transformer.named_modules() if n.endswith("lora_A.default_0")}
        assert ranks == {config.rank}
    assert relative_error(with_adapter(double_blocks, adapter, config), double_blocks.run_reference()) < FORWARD


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_single_blocks_at_any_width(torch_side, format, tmp_path):
    case = draw_case(2, num_layers=1, num_single_layers=2)
    config = lora.LoraConfig(rank=3, alpha=6, targets=(*BLOCKS, *SINGLE, "x_embedder", "norm_out.linear"))
    adapter = random_adapter(case, config)
    write(tmp_path, adapter, config, format)
    if format == "peft":
        from peft import PeftModel

        name, model = "default", PeftModel.from_pretrained(case.reference, tmp_path)
    else:
        pipe = build_pipeline(case.reference)
        pipe.load_lora_weights(tmp_path)
        name, model = "default_0", pipe.transformer
    assert_same_effects(adapter_effects(model, name), effects(adapter, config))
    assert relative_error(with_adapter(case, adapter, config), case.run_reference()) < FORWARD


def test_layers_outside_of_blocks_need_diffusers_names(double_blocks, tmp_path, log):
    """diffusers converts them without its prefix, and then passes over them: convert_lora says so."""
    config = lora.LoraConfig(2, 4, ("attn.to_q", "x_embedder", "norm_out.linear", "text_embedder.linear_1"))
    adapter = random_adapter(double_blocks, config)
    pipe = build_pipeline(double_blocks.reference)
    pipe.load_lora_weights(write(tmp_path / "x.safetensors", adapter, config, "kohya"), adapter_name="kohya")
    found, expected = adapter_effects(pipe.transformer, "kohya"), effects(adapter, config)
    assert expected.keys() - found.keys() == set(unread_by_diffusers(expected, "kohya"))
    assert len(expected) - len(unread_by_diffusers(expected, "kohya")) == 2 and not log()
    assert not unread_by_diffusers(expected, "diffusers-baked")
    pipe.unload_lora_weights()
    pipe.load_lora_weights(write(tmp_path / "y.safetensors", adapter, config, "diffusers-baked"), adapter_name="baked")
    assert_same_effects(adapter_effects(pipe.transformer, "baked"), expected)


@pytest.fixture(scope="module")
def real_width(torch_side):
    """One single block of FLUX's own width, which diffusers' reader of linear1 takes for granted."""
    return draw_case(
        1, in_channels=16, num_layers=0, num_single_layers=1, attention_head_dim=128, num_attention_heads=24,
        axes_dims_rope=(16, 56, 56), joint_attention_dim=8, pooled_projection_dim=8,
    )  # fmt: skip


@pytest.mark.parametrize("format, more", [("kohya", ()), ("comfyui", SINGLE[:3])])
def test_single_block_of_the_original_layout(real_width, format, more, tmp_path, log):
    config = lora.LoraConfig(rank=4, alpha=8, targets=(*lora.DEFAULT_TARGETS[:3], *more))
    adapter = jax.tree.map(lambda x: 0.1 * x, random_adapter(real_width, config))
    pipe = build_pipeline(real_width.reference)
    pipe.load_lora_weights(write(tmp_path / "x.safetensors", adapter, config, format), adapter_name=format)
    assert not log()
    found, expected = adapter_effects(pipe.transformer, format), effects(adapter, config)
    if not more:  # the block of zeros that makes the projections recognisable is a layer of its own to diffusers
        assert not found.pop("single_transformer_blocks.0.proj_mlp").any()
    assert_same_effects(found, expected)
    ranks = {x.weight.shape[0] for n, x in pipe.transformer.named_modules() if n.endswith(f"lora_A.{format}")}
    assert ranks == {config.rank}
    assert relative_error(with_adapter(real_width, adapter, config), real_width.run_reference()) < FORWARD
    pipe.delete_adapters(format)


# The original layout, written out once more: what ComfyUI patches, by its own key map ("diffusion_model." + module, or
# "lora_unet_" + the same with underscores; W += alpha / rank * up @ down).
ORIGINAL = {
    "transformer_blocks": ("double_blocks", {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "img_attn.proj": ("attn.to_out.0",),
        "txt_attn.proj": ("attn.to_add_out",),
        "img_mlp.0": ("ff.net.0.proj",),
        "img_mlp.2": ("ff.net.2",),
        "txt_mlp.0": ("ff_context.net.0.proj",),
        "txt_mlp.2": ("ff_context.net.2",),
        "img_mod.lin": ("norm1.linear",),
        "txt_mod.lin": ("norm1_context.linear",),
    }),
    "single_transformer_blocks": ("single_blocks", {
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "linear2": ("proj_out",),
        "modulation.lin": ("norm.linear",),
    }),
}  # fmt: skip


def original_effects(case, adapter, config):
    """{module of the original checkpoint: change of its weight}, by stacking those of diffusers' modules."""
    ours, shapes, out = effects(adapter, config), weights.tensor_shapes(case.abstract()), {}
    for stack, (original, table) in ORIGINAL.items():
        for i in range(getattr(case.config, "num_layers" if original == "double_blocks" else "num_single_layers")):
            for module, parts in table.items():
                names = [f"{stack}.{i}.{part}" for part in parts]
                if any(name in ours for name in names):
                    zeros = {name: np.zeros(shapes[f"{name}.weight"]) for name in names}
                    out[f"{original}.{i}.{module}"] = np.concatenate([(zeros | ours)[name] for name in names])
    return out


@pytest.mark.parametrize("format", ["kohya", "comfyui", "diffusers-baked"])
@pytest.mark.parametrize("targets", [lora.DEFAULT_TARGETS, (*BLOCKS, *SINGLE), ("attn.to_v", "proj_mlp")])
def test_arithmetic_of_comfyui(torch_side, targets, format, tmp_path):
    case = draw_case(2, num_layers=1, num_single_layers=2)
    config = lora.LoraConfig(rank=3, alpha=7.5, targets=targets)
    adapter = random_adapter(case, config)
    tensors = load_file(write(tmp_path / "x.safetensors", adapter, config, format))
    expected, change = original_effects(case, adapter, config), {"kohya": str.replace, "comfyui": lambda x, *_: x}
    if format == "diffusers-baked":  # ComfyUI knows diffusers' names for FLUX too, and no header
        expected, stems = effects(adapter, config), {name: f"transformer.{name}" for name in effects(adapter, config)}
        down, up = "lora_A", "lora_B"
    else:
        prefix = {"kohya": "lora_unet_", "comfyui": "diffusion_model."}[format]
        stems = {name: prefix + change[format](name, ".", "_") for name in expected}
        down, up = "lora_down", "lora_up"
    used = set()
    for name, stem in stems.items():
        a, b = (tensors[f"{stem}.{half}.weight"].astype(np.float64) for half in (down, up))
        alpha = tensors.get(f"{stem}.alpha")
        used |= {f"{stem}.{down}.weight", f"{stem}.{up}.weight"} | (set() if alpha is None else {f"{stem}.alpha"})
        delta = (1.0 if alpha is None else alpha.item() / a.shape[0]) * b @ a
        assert relative_error(delta, expected[name]) < 1e-6, name
    assert used == tensors.keys()


def test_names_at_real_depth(torch_side):
    """diffusers' reader walks 19 double and 38 single blocks."""
    case = draw_case(2, num_layers=19, num_single_layers=38, attention_head_dim=6, num_attention_heads=1,
                     axes_dims_rope=(2, 2, 2))  # fmt: skip
    config = lora.LoraConfig(1, 1)
    tensors = lora_files.encode(lora_files.adapter_layers(random_adapter(case, config), config), "kohya", "float32")
    double = ("img_attn_qkv", "txt_attn_qkv", "img_attn_proj", "txt_attn_proj")
    stems = [f"lora_unet_double_blocks_{i}_{name}" for i in range(19) for name in double]
    stems += [f"lora_unet_single_blocks_{i}_linear1" for i in range(38)]
    leaves = ("lora_down.weight", "lora_up.weight", "alpha")
    assert tensors.keys() == {f"{stem}.{leaf}" for stem in stems for leaf in leaves}


# --- files that users bring -------------------------------------------------------------------------------------------


def test_a_file_of_kohyas_trainer_acts_the_same_in_both(double_blocks, tmp_path, log):
    """Dense fused projections, an alpha per layer and two ranks, none of it made by our code."""
    from peft import PeftModel

    rng, tensors, width = np.random.default_rng([SEED, 2]), {}, double_blocks.config.hidden
    for i in range(2):
        for name, rows, columns, rank in (("img_attn_qkv", 3, 1, 4), ("txt_attn_qkv", 3, 1, 5), ("img_mlp_0", 4, 1, 4),
                                          ("txt_mlp_2", 1, 4, 4), ("txt_attn_proj", 1, 1, 5)):  # fmt: skip
            stem = f"lora_unet_double_blocks_{i}_{name}"
            tensors[f"{stem}.lora_down.weight"] = 0.3 * rng.standard_normal((rank, columns * width), np.float32)
            tensors[f"{stem}.lora_up.weight"] = 0.3 * rng.standard_normal((rows * width, rank), np.float32)
            tensors[f"{stem}.alpha"] = np.asarray(rng.integers(1, 9), np.float32)
    path = tmp_path / "theirs.safetensors"
    save_file(tensors, path)
    adapter, config = lora_files.load_lora(path)
    lora.check_fits(adapter, double_blocks.abstract(), str(path))
    assert config.rank == 5
    pipe = build_pipeline(double_blocks.reference)
    pipe.load_lora_weights(path)
    expected = effects(adapter, config)
    assert_same_effects(adapter_effects(pipe.transformer, "default_0"), expected)
    assert relative_error(with_adapter(double_blocks, adapter, config), double_blocks.run_reference()) < FORWARD

    pipe.unload_lora_weights()
    for format in ("diffusers", "comfyui"):  # and converted
        pipe.load_lora_weights(write(tmp_path / format, adapter, config, format), adapter_name=format)
        assert_same_effects(adapter_effects(pipe.transformer, format), expected)
        pipe.delete_adapters(format)
    assert not log()
    model = PeftModel.from_pretrained(double_blocks.fresh_reference(), write(tmp_path, adapter, config, "peft").parent)
    assert_same_effects(adapter_effects(model, "default"), expected)


def test_files_of_peft_and_diffusers_with_patterns(double_blocks, tmp_path):
    """Ranks and alphas by pattern: PEFT's folder, the pipeline's file, and the transformer's own without prefix."""
    import torch
    from diffusers import FluxKontextPipeline
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    reference = double_blocks.reference
    theirs = LoraConfig(
        r=4, lora_alpha=6, target_modules=["attn.to_q", "ff.net.2", "add_v_proj"],
        rank_pattern={"ff.net.2": 2}, alpha_pattern={"ff.net.2": 5, "transformer_blocks.1.attn.to_q": 1},
    )  # fmt: skip
    model = get_peft_model(double_blocks.fresh_reference(), theirs)
    rng = np.random.default_rng([SEED, 3])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.from_numpy(0.3 * rng.standard_normal(tuple(parameter.shape), np.float32)))
    model.save_pretrained(tmp_path / "peft")
    state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(model).items()}
    fields = {k: getattr(theirs, k) for k in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")}
    fields["target_modules"] = sorted(theirs.target_modules)
    FluxKontextPipeline.save_lora_weights(
        tmp_path / "pipeline", transformer_lora_layers=state, transformer_lora_adapter_metadata=fields
    )
    reference.load_lora_adapter({f"transformer.{k}": v for k, v in state.items()}, metadata=
                                {f"transformer.{k}": v for k, v in fields.items()}, adapter_name="x")  # fmt: skip
    reference.save_lora_adapter(tmp_path / "transformer", adapter_name="x")
    expected = adapter_effects(model, "default")
    assert len(expected) == 6
    for folder in ("peft", "pipeline", "transformer"):
        adapter, config = lora_files.load_lora(tmp_path / folder)
        assert_same_effects(effects(adapter, config), expected)


def test_fused_projections_without_the_block_of_zeros_mix_ranks(real_width, tmp_path):
    """Why linear1 has room for proj_mlp: three blocks alone are taken for a dense projection of rank 3 r."""
    from diffusers import FluxKontextPipeline

    config = lora.LoraConfig(rank=4, alpha=8, targets=lora.DEFAULT_TARGETS[:3])
    adapter = random_adapter(real_width, config)
    path = write(tmp_path / "x.safetensors", adapter, config, "kohya")
    ranks = lambda state: {v.shape[0] for k, v in state.items() if k.endswith("lora_A.weight")}  # noqa: E731
    assert ranks(FluxKontextPipeline.lora_state_dict(path)) == {4}
    stem, tensors = "lora_unet_single_blocks_0_linear1", load_file(path)
    down, up = tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"]
    three = {f"{stem}.lora_down.weight": down[:12], f"{stem}.lora_up.weight": np.ascontiguousarray(up[:, :12]),
             f"{stem}.alpha": np.asarray(24, np.float32)}  # fmt: skip
    save_file(three, tmp_path / "y.safetensors")
    assert ranks(FluxKontextPipeline.lora_state_dict(tmp_path / "y.safetensors")) == {12}
    loaded, loaded_config = lora_files.load_lora(tmp_path / "y.safetensors")
    assert (loaded_config.rank, loaded_config.alpha) == (4, 8)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
