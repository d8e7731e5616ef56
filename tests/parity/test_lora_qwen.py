"""LoRA files of Qwen-Image-Edit in diffusers' pipeline and PEFT, against the change alpha / r B A of the weights."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cocoedit_jax.models import lora, lora_files, weights
from cocoedit_jax.models.layers import LORA
from cocoedit_jax.models.lora_formats import unread_by_diffusers
from cocoedit_jax.models.lora_names import MODELS
from tests.models.qwen_shapes import qwen_shapes
from tests.parity.lora_cases import (
    adapter_effects,
    assert_same_adapter,
    assert_same_effects,
    draw_adapter,
    effects,
    random_adapter,
    write,
)
from tests.parity.qwen_cases import draw_qwen_case
from tests.parity.transformer_cases import relative_error, round_frequencies, to_numpy

FORWARD = 1e-5
EVERY_LINEAR_LAYER = (
    *lora.DEFAULT_TARGETS, "img_mod.1", "txt_mod.1", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj",
    "txt_mlp.net.2", "img_in", "txt_in", "norm_out.linear", "proj_out", "timestep_embedder.linear_1",
    "timestep_embedder.linear_2",
)  # fmt: skip
CONFIGS = {"attention": lora.LoraConfig(4, 8), "all": lora.LoraConfig(3, 7.5, EVERY_LINEAR_LAYER)}


@pytest.fixture
def qwen(torch_side):
    """A tiny random transformer of the 2511 variant, with ragged texts."""
    return draw_qwen_case(3)


def build_pipeline(transformer):
    """Without text encoder and autoencoder, which a LoRA does not touch."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline

    scheduler = FlowMatchEulerDiscreteScheduler()
    return QwenImageEditPlusPipeline(scheduler, None, None, None, None, transformer)  # type: ignore[arg-type]


def run(case, model):
    return to_numpy(dataclasses.replace(case, reference=model).run_reference())


def run_changed(case, changes):
    """Output of the PyTorch model, its weights changed by ``changes``."""
    import torch

    model, state = case.fresh_reference(), case.state()
    assert {f"{name}.weight" for name in changes} <= state.keys()
    state |= {f"{name}.weight": (state[f"{name}.weight"] + delta).astype(np.float32) for name, delta in changes.items()}
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    round_frequencies(model, scale=1000.0)
    return run(case, model)


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def test_every_linear_layer_has_a_name(torch_side):
    import torch
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        real = QwenImageTransformer2DModel()
    linear = {name for name, module in real.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(linear) == 60 * 14 + 6
    assert linear == {name for name in linear if MODELS["qwen"].layers_of(name) == (name,)}
    config = lora.LoraConfig(1, 1, EVERY_LINEAR_LAYER)
    adapter = jax.eval_shape(lambda key: lora.init_adapter(key, qwen_shapes(), config), jax.random.key(0))
    assert {name.partition(".lora_")[0] for name in weights.tensor_shapes(adapter)} == linear


@pytest.mark.parametrize("format", ["diffusers", "diffusers-baked", "kohya", "comfyui", "peft"])
def test_every_format_changes_the_output_as_the_weights_do(qwen, config, format, tmp_path, log):
    adapter = random_adapter(qwen, config)
    expected = effects(adapter, config)
    file = write(tmp_path / "lora", adapter, config, format, model="qwen")
    if format == "peft":
        from peft import PeftModel

        name, model = "default", PeftModel.from_pretrained(qwen.reference, file.parent)
        assert_same_adapter(model, name, adapter, config)
    else:
        pipe = build_pipeline(qwen.reference)
        pipe.load_lora_weights(file)
        name, model = "default_0", pipe.transformer
        if format == "diffusers":
            assert_same_adapter(model, name, adapter, config)
    assert not log()
    assert_same_effects(adapter_effects(model, name), expected)
    output = run_changed(qwen, expected)
    assert relative_error(run(qwen, model), output) < FORWARD
    assert relative_error(run_changed(qwen, {}), output) > 0.01
    ours = qwen.apply({"params": qwen.params(), LORA: lora.fold_scale(adapter, config)})
    assert relative_error(ours, output) < FORWARD
    assert not unread_by_diffusers(expected, format, "qwen")


@pytest.mark.parametrize("format", ["kohya", "comfyui"])
def test_diffusers_reads_every_name_at_real_depth(torch_side, format, tmp_path):
    from diffusers import QwenImageEditPlusPipeline

    config = lora.LoraConfig(1, 1, EVERY_LINEAR_LAYER)
    adapter = draw_adapter(qwen_shapes(60, 1, 6, 3, 4), config)
    layers = lora_files.adapter_layers(adapter, config)
    states: list[Any] = [
        QwenImageEditPlusPipeline.lora_state_dict(lora_files.write_lora(tmp_path / name, layers, config, name))
        for name in ("diffusers-baked", format)
    ]
    assert len(states[0]) == 2 * (60 * 14 + 6) and states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        np.testing.assert_array_equal(tensor, states[1][key], err_msg=key)


def test_our_loader_reads_what_diffusers_and_peft_write(qwen, config, tmp_path):
    from diffusers import QwenImageEditPlusPipeline
    from peft import PeftModel, get_peft_model_state_dict

    adapter = random_adapter(qwen, config)
    model = PeftModel.from_pretrained(qwen.reference, write(tmp_path, adapter, config, "peft", model="qwen").parent)
    model.save_pretrained(tmp_path / "peft")
    state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(model).items()}
    fields = {"r": config.rank, "lora_alpha": config.alpha, "target_modules": list(config.targets)}
    for name, metadata in (("with_alpha", fields), ("without_alpha", None)):
        QwenImageEditPlusPipeline.save_lora_weights(
            tmp_path / name, transformer_lora_layers=state, transformer_lora_adapter_metadata=metadata
        )
    for name, alpha in (("peft", config.alpha), ("with_alpha", config.alpha), ("without_alpha", config.rank)):
        loaded, loaded_config = lora_files.load_lora(tmp_path / name, transformer_params=qwen.abstract())
        assert (loaded_config.rank, loaded_config.alpha) == (config.rank, alpha)
        jax.tree.map(np.testing.assert_array_equal, loaded, adapter)


def rename(tensors, old, new):
    return {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}


def test_released_layout_is_read_at_scale_one_by_diffusers_and_at_either_by_us(qwen, tmp_path, log):
    """PEFT's names with another prefix, alpha left behind; half the strength of training."""
    config = CONFIGS["attention"]
    adapter = random_adapter(qwen, config)
    tensors = load_file(write(tmp_path / "peft", adapter, config, "peft", model="qwen"))
    released = tmp_path / "adapter_model_converted.safetensors"
    save_file(rename(tensors, "base_model.model", "transformer"), released)
    pipe = build_pipeline(qwen.reference)
    pipe.load_lora_weights(released)
    assert not log()
    for alpha, strength in ((None, 1.0), (config.rank, 1.0), (2 * config.rank, 2.0)):
        pipe.set_adapters(["default_0"], [strength])
        loaded, loaded_config = lora_files.load_lora(released, alpha=alpha)
        assert loaded_config.scale == strength
        output = run_changed(qwen, effects(loaded, loaded_config))
        assert relative_error(run(qwen, pipe.transformer), output) < FORWARD
    full = run_changed(qwen, effects(adapter, config))
    assert relative_error(output, full) == 0


@pytest.mark.parametrize("old, new, theirs", [
    ("base_model.model", "base_model.model", "nothing"),
    ("base_model.model.", "", "nothing"),
    ("base_model.model", "diffusion_model", "scale 1"),
])  # fmt: skip
def test_files_that_are_nearly_right(qwen, old, new, theirs, tmp_path, log):
    """What diffusers makes of them (without alpha); we read them all."""
    config = CONFIGS["all"]
    adapter = random_adapter(qwen, config)
    path = tmp_path / "x.safetensors"
    save_file(rename(load_file(write(tmp_path / "peft", adapter, config, "peft", model="qwen")), old, new), path)
    pipe = build_pipeline(qwen.reference)
    pipe.load_lora_weights(path)
    found = adapter_effects(pipe.transformer, "default_0")
    if theirs == "nothing":
        assert not found and len(log()) == 1
    else:
        assert_same_effects({k: v * config.scale for k, v in found.items()}, effects(adapter, config))
    loaded, loaded_config = lora_files.load_lora(path, alpha=config.alpha)
    assert loaded_config.scale == config.scale
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
