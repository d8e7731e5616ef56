"""LoRA files of Qwen-Image-Edit in diffusers' pipeline and PEFT, against the change alpha / r B A of the weights."""

from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cocoedit_jax.models import lora, lora_files, weights
from cocoedit_jax.models.lora_formats import unread_by_diffusers
from tests.models.qwen_shapes import qwen_shapes
from tests.parity.flux_cases import SEED, randomise, relative_error, to_numpy
from tests.parity.lora_cases import (
    adapter_effects,
    assert_same_adapter,
    assert_same_effects,
    draw_adapter,
    effects,
    write,
)

FORWARD = 1e-5
LAYERS, HEADS, HEAD_SIZE, TEXT = 2, 3, 16, 16
SHAPES = qwen_shapes(LAYERS, HEADS, HEAD_SIZE, TEXT)
EVERY_LINEAR_LAYER = (
    *lora.DEFAULT_TARGETS, "img_mod.1", "txt_mod.1", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj",
    "txt_mlp.net.2", "img_in", "txt_in", "norm_out.linear", "proj_out", "timestep_embedder.linear_1",
    "timestep_embedder.linear_2",
)  # fmt: skip
CONFIGS = {"attention": lora.LoraConfig(4, 8), "all": lora.LoraConfig(3, 7.5, EVERY_LINEAR_LAYER)}


class Qwen:
    """A tiny random transformer, plain or as Edit-2511, and one batch of inputs."""

    def __init__(self):
        import torch

        rng = np.random.default_rng([SEED, 4])
        self.zero_cond_t = bool(rng.integers(2))
        torch.manual_seed(0)
        model = self.build()
        randomise(model, rng)
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.inputs = {
            "hidden_states": torch.from_numpy(rng.standard_normal((2, 16 + 24, 64), np.float32)),
            "encoder_hidden_states": torch.from_numpy(rng.standard_normal((2, 5, TEXT), np.float32)),
            "encoder_hidden_states_mask": torch.arange(5)[None] < torch.tensor([[5], [3]]),
            "timestep": torch.from_numpy(rng.uniform(0, 1, 2).astype(np.float32)),
            "img_shapes": [[(1, 4, 4), (1, 4, 6)]] * 2,
            "return_dict": False,
        }

    def build(self):
        from diffusers import QwenImageTransformer2DModel

        return QwenImageTransformer2DModel(
            patch_size=2, in_channels=64, out_channels=16, num_layers=LAYERS, attention_head_dim=HEAD_SIZE,
            num_attention_heads=HEADS, joint_attention_dim=TEXT, axes_dims_rope=(8, 4, 4), zero_cond_t=self.zero_cond_t,
        ).eval()  # fmt: skip

    def fresh(self, changes=None):
        """The model, its weights changed by ``changes``."""
        import torch

        model = self.build()
        changed = {f"{name}.weight": torch.from_numpy(delta).float() for name, delta in (changes or {}).items()}
        assert changed.keys() <= self.state.keys()
        model.load_state_dict({k: v + changed[k] if k in changed else v for k, v in self.state.items()})
        return model

    def pipeline(self):
        """Without text encoder and autoencoder, which a LoRA does not touch."""
        from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline

        scheduler = FlowMatchEulerDiscreteScheduler()
        return QwenImageEditPlusPipeline(scheduler, None, None, None, None, self.fresh())  # type: ignore[arg-type]

    def run(self, model):
        import torch

        with torch.no_grad():
            return to_numpy(model(**self.inputs)[0])


@pytest.fixture(scope="module")
def qwen(torch_side):
    return Qwen()


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def test_shapes_are_the_models(qwen):
    import torch
    from diffusers import QwenImageTransformer2DModel

    found = {name: tuple(tensor.shape) for name, tensor in qwen.state.items()}
    assert weights.tensor_shapes(SHAPES) == found
    with torch.device("meta"):
        real = QwenImageTransformer2DModel()
    expected = {name: tuple(tensor.shape) for name, tensor in real.state_dict().items()}
    assert weights.tensor_shapes(qwen_shapes()) == expected
    assert len(expected) == 1933
    assert sum(leaf.size for leaf in jax.tree.leaves(qwen_shapes())) == 20_430_401_088
    linear = {name for name, module in real.named_modules() if isinstance(module, torch.nn.Linear)}
    assert all(any(name.endswith(f".{t}") or name == t for t in EVERY_LINEAR_LAYER) for name in linear)


@pytest.mark.parametrize("format", ["diffusers", "diffusers-baked", "kohya", "comfyui", "peft"])
def test_every_format_changes_the_output_as_the_weights_do(qwen, config, format, tmp_path, log):
    adapter = draw_adapter(SHAPES, config)
    expected = effects(adapter, config)
    file = write(tmp_path / "lora", adapter, config, format, model="qwen")
    if format == "peft":
        from peft import PeftModel

        name, model = "default", PeftModel.from_pretrained(qwen.fresh(), file.parent)
        assert_same_adapter(model, name, adapter, config)
    else:
        pipe = qwen.pipeline()
        pipe.load_lora_weights(file)
        name, model = "default_0", pipe.transformer
        if format == "diffusers":
            assert_same_adapter(model, name, adapter, config)
    assert not log()
    assert_same_effects(adapter_effects(model, name), expected)
    output, base = qwen.run(qwen.fresh(expected)), qwen.run(qwen.fresh())
    assert relative_error(qwen.run(model), output) < FORWARD
    assert relative_error(base, output) > 0.01
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

    adapter = draw_adapter(SHAPES, config)
    model = PeftModel.from_pretrained(qwen.fresh(), write(tmp_path, adapter, config, "peft", model="qwen").parent)
    model.save_pretrained(tmp_path / "peft")
    state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(model).items()}
    fields = {"r": config.rank, "lora_alpha": config.alpha, "target_modules": list(config.targets)}
    for name, metadata in (("with_alpha", fields), ("without_alpha", None)):
        QwenImageEditPlusPipeline.save_lora_weights(
            tmp_path / name, transformer_lora_layers=state, transformer_lora_adapter_metadata=metadata
        )
    for name, alpha in (("peft", config.alpha), ("with_alpha", config.alpha), ("without_alpha", config.rank)):
        loaded, loaded_config = lora_files.load_lora(tmp_path / name, transformer_params=SHAPES)
        assert (loaded_config.rank, loaded_config.alpha) == (config.rank, alpha)
        jax.tree.map(np.testing.assert_array_equal, loaded, adapter)


def rename(tensors, old, new):
    return {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}


def test_released_layout_is_read_at_scale_one_by_diffusers_and_at_either_by_us(qwen, tmp_path, log):
    """PEFT's names with another prefix, alpha left behind; half the strength of training."""
    config = CONFIGS["attention"]
    adapter = draw_adapter(SHAPES, config)
    tensors = load_file(write(tmp_path / "peft", adapter, config, "peft", model="qwen"))
    released = tmp_path / "adapter_model_converted.safetensors"
    save_file(rename(tensors, "base_model.model", "transformer"), released)
    pipe = qwen.pipeline()
    pipe.load_lora_weights(released)
    assert not log()
    for alpha, strength in ((None, 1.0), (config.rank, 1.0), (2 * config.rank, 2.0)):
        pipe.set_adapters(["default_0"], [strength])
        loaded, loaded_config = lora_files.load_lora(released, alpha=alpha)
        assert loaded_config.scale == strength
        output = qwen.run(qwen.fresh(effects(loaded, loaded_config)))
        assert relative_error(qwen.run(pipe.transformer), output) < FORWARD
    full = qwen.run(qwen.fresh(effects(adapter, config)))
    assert relative_error(output, full) == 0


@pytest.mark.parametrize("old, new, theirs", [
    ("base_model.model", "base_model.model", "nothing"),
    ("base_model.model.", "", "nothing"),
    ("base_model.model", "diffusion_model", "scale 1"),
])  # fmt: skip
def test_files_that_are_nearly_right(qwen, old, new, theirs, tmp_path, log):
    """What diffusers makes of them (without alpha); we read them all."""
    config = CONFIGS["all"]
    adapter = draw_adapter(SHAPES, config)
    path = tmp_path / "x.safetensors"
    save_file(rename(load_file(write(tmp_path / "peft", adapter, config, "peft", model="qwen")), old, new), path)
    pipe = qwen.pipeline()
    pipe.load_lora_weights(path)
    found = adapter_effects(pipe.transformer, "default_0")
    if theirs == "nothing":
        assert not found and len(log()) == 1
    else:
        assert_same_effects({k: v * config.scale for k, v in found.items()}, effects(adapter, config))
    loaded, loaded_config = lora_files.load_lora(path, alpha=config.alpha)
    assert loaded_config.scale == config.scale
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
