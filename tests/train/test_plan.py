"""Ahead-of-time compilation of the optimizer step: a tiny one against what it must hold, the real one by shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cocoedit_jax.models import lora
from cocoedit_jax.models.autoencoder_kl import AutoencoderKL
from cocoedit_jax.models.flux import FluxConfig, FluxTransformer
from cocoedit_jax.models.kontext import KontextEditor
from cocoedit_jax.models.quickstart import build_editor
from cocoedit_jax.models.text import PrecomputedText
from cocoedit_jax.nft.presets import preset
from cocoedit_jax.sharding.mesh import make_mesh
from cocoedit_jax.sharding.rules import sharded_shapes
from cocoedit_jax.train.plan import StepShape, abstract_state, lower_step, memory
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


def real_editor() -> KontextEditor:
    transformer = FluxTransformer(FluxConfig(), dtype=jnp.bfloat16, remat="full", attention_backend="xla")
    return KontextEditor(transformer, AutoencoderKL(), PrecomputedText.of({}))


def test_the_real_model_by_shape():
    """Counts of the published checkpoint: 11.9 billion parameters in 1160 tensors, 83.8 million in 244."""
    from cocoedit_jax.models.weights import tensor_shapes

    params = nn.unbox(real_editor().abstract())
    for part, tensors, parameters in (("transformer", 1160, 11_901_408_320), ("autoencoder", 244, 83_819_683)):
        shapes = tensor_shapes(params[part])
        assert len(shapes) == tensors
        assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters
    adapter = jax.eval_shape(
        lambda key: lora.init_adapter(key, params["transformer"], lora.LoraConfig(32, 64)), jax.random.key(0)
    )
    assert sum(x.size for x in jax.tree.leaves(adapter)) == 52_297_728
    assert len(tensor_shapes(adapter)) == 2 * 266


@pytest.mark.slow
def test_the_real_step_lowers_on_a_mesh():
    lowered = lower_step(
        real_editor(), preset("cocoedit"), lora.LoraConfig(32, 64), StepShape(micro_batch=2, samples=4),
        make_mesh({"data": 2, "fsdp": 4}),
    )  # fmt: skip
    assert "while" in lowered.as_text()
