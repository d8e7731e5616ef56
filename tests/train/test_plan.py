"""Ahead-of-time compilation of the optimizer step: a tiny one against what it must hold, the real one by shape."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from cocoedit_jax.models import lora
from cocoedit_jax.models.layers import MODULATION
from cocoedit_jax.models.quickstart import build_editor
from cocoedit_jax.models.qwen_edit import with_modulation_at
from cocoedit_jax.models.weights import tensor_shapes
from cocoedit_jax.nft.presets import preset
from cocoedit_jax.sharding.mesh import make_mesh
from cocoedit_jax.sharding.rules import sharded_shapes
from cocoedit_jax.train.plan import StepShape, abstract_state, lower_rollout, lower_step, memory, published_editor
from tests.train.tiny import SIZE, tiny_quickstart


def local_bytes(tree) -> int:
    """Bytes of a tree of placed shapes on one device."""
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_a_tiny_step_needs_its_parameters_state_and_batch():
    editor = build_editor(tiny_quickstart())
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    cfg, lora_cfg = preset("edit-r1"), lora.LoraConfig(2, 4)
    shape = StepShape(SIZE, SIZE, text_tokens=tiny_quickstart().max_words, samples=8, micro_batch=4)
    planned = memory(lower_step(editor, cfg, lora_cfg, shape, mesh).compile())
    params = sharded_shapes(editor.abstract(), mesh)
    state = abstract_state(params, cfg, lora_cfg, mesh)
    assert state.ema is not None
    held = local_bytes(params["transformer"]) + local_bytes(state)
    assert planned["arguments"] >= held
    assert planned["aliased"] >= 0.9 * local_bytes(state)  # the state is donated
    whole = sharded_shapes(editor.abstract(), make_mesh({"data": 1}))
    assert local_bytes(params["transformer"]) < 0.5 * local_bytes(whole["transformer"])


def test_a_tiny_rollout_gives_its_share_of_latents_and_pictures():
    editor, mesh = build_editor(tiny_quickstart()), make_mesh({"data": 2, "fsdp": 2})
    words = tiny_quickstart().max_words
    shape = StepShape(SIZE, SIZE, text_tokens=words, rollout_batch=8, sampler_steps=2, solver="euler")
    planned = memory(lower_rollout(editor, lora.LoraConfig(2, 4), shape, mesh).compile())
    latents = pictures = 2 * SIZE * SIZE * 3 * 4  # two samples on each device, and pixels are the latents
    assert latents + pictures <= planned["results"] < latents + pictures + 256
    assert planned["arguments"] >= local_bytes(sharded_shapes(editor.abstract(), mesh)["transformer"]) + latents


# tensors and parameters of the published checkpoint's transformer and (used) autoencoder, LoRA tensors and parameters
PUBLISHED = {
    "flux_kontext": ((1160, 11_901_408_320), (244, 83_819_683), (2 * 266, 52_297_728)),
    "qwen_image_edit": ((1933, 20_430_401_088), (186, 44_599_603), (2 * 480, 94_371_840)),
    "qwen_image_edit_2511": ((1933, 20_430_401_088), (186, 44_599_603), (2 * 480, 94_371_840)),
}


def count(tree) -> tuple[int, int]:
    shapes = tensor_shapes(tree)
    return len(shapes), sum(int(np.prod(shape)) for shape in shapes.values())


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_real_models_by_shape(kind):
    transformer, autoencoder, adapter = PUBLISHED[kind]
    editor = published_editor(kind)
    params = nn.unbox(editor.abstract())
    assert count(params["transformer"]) == transformer
    assert count(params["autoencoder"]) == autoencoder
    made = jax.eval_shape(
        lambda key: lora.init_adapter(key, params["transformer"], lora.LoraConfig(32, 64)), jax.random.key(0)
    )
    assert count(made) == adapter


def test_precomputed_modulation_leaves_two_thirds_of_qwen():
    editor = published_editor("qwen_image_edit")
    grid = editor.grid(512, 512)
    tabled = with_modulation_at(editor, [editor.sigmas(10, grid)])
    params = nn.unbox(tabled.abstract())
    in_bytes = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    assert in_bytes(nn.unbox(editor.abstract())["transformer"]) == pytest.approx(40.86e9, rel=1e-3)
    assert in_bytes(params["transformer"]) == pytest.approx(27.2e9, rel=2e-3)
    assert in_bytes(params[MODULATION]) == pytest.approx(10 * 2 * (60 * 12 + 2) * 3072, rel=1e-3)  # 10 sigmas, bf16


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flux_kontext", "qwen_image_edit_2511"])
def test_the_real_step_lowers_on_a_mesh(kind):
    lowered = lower_step(
        published_editor(kind), preset("cocoedit"), lora.LoraConfig(32, 64), StepShape(micro_batch=8, samples=16),
        make_mesh({"data": 2, "fsdp": 4}),
    )  # fmt: skip
    assert "while" in lowered.as_text()
