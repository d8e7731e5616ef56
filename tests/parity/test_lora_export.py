"""Our adapter files in the programs they are for: diffusers' Kontext pipeline and PEFT; and theirs in ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cocoedit_jax.errors import UserError
from cocoedit_jax.flow.packing import pack, position_ids
from cocoedit_jax.flow.schedule import flow_match_sigmas
from cocoedit_jax.flow.solvers import sample
from cocoedit_jax.models import lora, lora_files, weights
from cocoedit_jax.models.flux import FluxConfig, FluxTransformer
from cocoedit_jax.models.layers import LORA
from tests.parity.flux_cases import draw_case
from tests.parity.lora_cases import LATENT_CHANNELS, assert_same_adapter, build_pipeline, random_adapter
from tests.parity.transformer_cases import relative_error

# The adapter also matters in part: two of the targets must not bring the others back.
TARGETS = {"all": lora.DEFAULT_TARGETS, "some": ("attn.to_v", "attn.to_add_out")}
LATENT_SIDE = 8


@pytest.fixture(params=TARGETS)
def config(request):
    return lora.LoraConfig(rank=3, alpha=7.5, targets=TARGETS[request.param])


@pytest.fixture
def kontext(torch_side):
    case = draw_case(2, in_channels=4 * LATENT_CHANNELS)
    case.reference = case.fresh_reference()  # diffusers' model as it is
    return case


@pytest.fixture
def adapter(kontext, config):
    return random_adapter(kontext, config)


@pytest.fixture
def folder(tmp_path, adapter, config):
    lora_files.save_lora(tmp_path, adapter, config, {"step": "80"})
    return tmp_path


def test_pipeline_loads_every_key_and_edits_as_ours(kontext, adapter, config, folder):
    import torch

    pipe = build_pipeline(kontext.reference)
    pipe.load_lora_weights(folder)
    assert_same_adapter(pipe.transformer, "default_0", adapter, config)
    variables = {"params": kontext.params(), LORA: lora.fold_scale(adapter, config)}
    assert relative_error(kontext.apply(variables), kontext.run_reference()) < 1e-4

    rng, steps = np.random.default_rng(0), 3
    noise, source = rng.standard_normal((2, 1, LATENT_SIDE, LATENT_SIDE, LATENT_CHANNELS), np.float32)
    expected = pipe(
        image=torch.from_numpy(source.transpose(0, 3, 1, 2)),  # the pipeline takes latents for an image as they are
        latents=torch.from_numpy(np.array(pack(jnp.asarray(noise), 2))),
        prompt_embeds=torch.from_numpy(kontext.text[:1]),
        pooled_prompt_embeds=torch.from_numpy(kontext.pooled[:1]),
        height=8 * LATENT_SIDE,
        width=8 * LATENT_SIDE,
        max_area=(8 * LATENT_SIDE) ** 2,
        _auto_resize=False,
        num_inference_steps=steps,
        guidance_scale=2.5,
        output_type="latent",
        return_dict=False,
    )[0]

    side, packed = LATENT_SIDE // 2, pack(jnp.asarray(source), 2)
    grids = [position_ids(side, side, index) for index in (0, 1)]
    ids = np.concatenate([np.zeros((kontext.num_text, 3), np.int32), *grids])

    def velocity(z, sigma):
        return FluxTransformer(kontext.config).apply(
            variables,
            jnp.concatenate([z, packed], axis=1),
            kontext.text[:1],
            kontext.pooled[:1],
            jnp.broadcast_to(sigma, (1,)),
            jnp.full((1,), 2.5),
            ids,
            side * side,
        )

    ours = sample(velocity, pack(jnp.asarray(noise), 2), flow_match_sigmas(steps, side * side), "euler")
    assert relative_error(ours, expected) < 1e-4


def test_peft_loads_every_key(kontext, adapter, config, folder):
    import torch
    from peft import LoraConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    model = PeftModel.from_pretrained(kontext.reference, folder / lora_files.PEFT_FOLDER)
    assert_same_adapter(model, "default", adapter, config)
    variables = {"params": kontext.params(), LORA: lora.fold_scale(adapter, config)}
    assert relative_error(kontext.apply(variables), kontext.run_reference()) < 1e-4

    other = kontext.fresh_reference()
    inject_adapter_in_model(LoraConfig.from_pretrained(folder / lora_files.PEFT_FOLDER), other)
    tensors = load_file(folder / lora_files.PEFT_FOLDER / lora_files.PEFT_FILE)
    result = set_peft_model_state_dict(other, {k.removeprefix("base_model.model."): v for k, v in tensors.items()})
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora" in key]
    assert_same_adapter(other, "default", adapter, config)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_our_loader_reads_what_diffusers_and_peft_write(kontext, adapter, config, folder, tmp_path):
    from diffusers import FluxKontextPipeline
    from peft import PeftModel, get_peft_model_state_dict

    model = PeftModel.from_pretrained(kontext.reference, folder / lora_files.PEFT_FOLDER)
    model.save_pretrained(tmp_path / "theirs_peft")
    state = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(model).items()}
    fields = {"r": config.rank, "lora_alpha": config.alpha, "target_modules": list(config.targets)}
    for name, metadata in (("with_alpha", fields), ("without_alpha", None)):
        FluxKontextPipeline.save_lora_weights(
            tmp_path / name,
            transformer_lora_layers=state,
            transformer_lora_adapter_metadata=metadata,
        )
    for path, alpha in (
        (folder, config.alpha),
        (folder / lora_files.PEFT_FOLDER, config.alpha),
        (tmp_path / "theirs_peft", config.alpha),
        (tmp_path / "with_alpha", config.alpha),
        (tmp_path / "without_alpha", config.rank),
    ):
        loaded, loaded_config = lora_files.load_lora(path)
        assert (loaded_config.rank, loaded_config.alpha) == (config.rank, alpha)
        jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
        again = lora.init_adapter(jax.random.key(0), kontext.abstract(), loaded_config)
        assert jax.tree.structure(again) == jax.tree.structure(adapter)
    assert lora_files.load_lora(tmp_path / "without_alpha", alpha=7.5)[1].alpha == 7.5
    with pytest.raises(UserError, match="does not fit|no such linear layer"):
        lora.check_fits(adapter, draw_case(3, num_layers=1, num_single_layers=1).abstract(), "adapter")


@pytest.fixture(scope="module")
def real_size():
    config, token = FluxConfig(), jnp.zeros((1, 2, 64))
    arguments = token, jnp.zeros((1, 1, 4096)), jnp.zeros((1, 768)), jnp.zeros(1), jnp.zeros(1), np.zeros((3, 3)), 1
    return nn.unbox(jax.eval_shape(lambda key: FluxTransformer(config).init(key, *arguments), jax.random.key(0)))[
        "params"
    ]


def test_real_size_has_the_published_tensors(torch_side, real_size):
    import torch
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        reference = FluxTransformer2DModel(guidance_embeds=True)
    expected = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    assert weights.tensor_shapes(real_size) == expected
    assert len(expected) == 1160
    assert sum(leaf.size for leaf in jax.tree.leaves(real_size)) == 11_901_408_320


def test_real_size_adapter(real_size):
    adapter = jax.eval_shape(lambda key: lora.init_adapter(key, real_size, lora.LoraConfig()), jax.random.key(0))
    assert len(weights.tensor_shapes(adapter)) == 2 * 266
    assert sum(leaf.size for leaf in jax.tree.leaves(adapter)) == 52_297_728
