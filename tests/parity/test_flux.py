"""Our FLUX transformer against diffusers' on the same random weights: whole and in parts, forward and LoRA gradient."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import lora, weights
from cocoedit_jax.models.blocks import BlockInputs, DoubleStreamBlock
from cocoedit_jax.models.flux import IMAGE, TEXT, SingleBlock, TimeTextEmbed
from cocoedit_jax.models.layers import LORA, Modulation, layer_norm, modulate, rope_table
from tests.parity.transformer_cases import relative_error

FORWARD, GRADIENT = 1e-5, 1e-4
BLOCK_OPTIONS = (jnp.float32, "auto")


def layer(params, stack, index):
    return jax.tree.map(lambda leaf: leaf[index], params[stack])


@pytest.fixture
def streams(case):
    """Random block inputs, ours and the reference's."""
    import torch

    rng, d = np.random.default_rng(0), case.config.hidden
    batch, n_image = case.hidden.shape[:2]
    shapes = {"x": (batch, n_image, d), "context": (batch, case.num_text, d), "temb": (batch, d)}
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return types.SimpleNamespace(
        **arrays,
        torch={name: torch.from_numpy(array) for name, array in arrays.items()},
        rope=rope_table(case.ids, case.config.axes_dims_rope, case.config.theta),
        reference_rope=case.reference.pos_embed(torch.from_numpy(case.ids).float()),
    )


def test_forward(case):
    out = case.apply({"params": case.params()})
    assert out.dtype == jnp.float32
    assert relative_error(out, case.run_reference()) < FORWARD


def test_double_block(case, streams):
    params = case.params()
    for i, block in enumerate(case.reference.transformer_blocks):
        expected_context, expected_x = block(
            streams.torch["x"], streams.torch["context"], streams.torch["temb"], streams.reference_rope
        )
        cfg = case.config
        ours = DoubleStreamBlock(cfg.hidden, cfg.mlp_hidden, cfg.num_attention_heads, IMAGE, TEXT, *BLOCK_OPTIONS)
        (x, context), _ = jax.jit(ours.apply)(
            {"params": layer(params, "transformer_blocks", i)},
            (streams.x, streams.context),
            BlockInputs(streams.temb, streams.rope),
        )
        assert relative_error(x, expected_x) < FORWARD
        assert relative_error(context, expected_context) < FORWARD


def test_single_block(case, streams):
    params = case.params()
    for i, block in enumerate(case.reference.single_transformer_blocks):
        expected = block(streams.torch["x"], streams.torch["context"], streams.torch["temb"], streams.reference_rope)
        out, _ = jax.jit(SingleBlock(case.config, *BLOCK_OPTIONS).apply)(
            {"params": layer(params, "single_transformer_blocks", i)},
            np.concatenate([streams.context, streams.x], axis=1),
            BlockInputs(streams.temb, streams.rope),
        )
        for ours, theirs in zip((out[:, : case.num_text], out[:, case.num_text :]), expected, strict=True):
            assert relative_error(ours, theirs) < FORWARD


def test_time_text_embed(case):
    import torch

    times = (case.t, case.guidance) if case.config.guidance_embeds else (case.t,)
    arguments = [torch.from_numpy(x) * 1000 for x in times] + [torch.from_numpy(case.pooled)]
    out = TimeTextEmbed(case.config, jnp.float32).apply(
        {"params": case.params()["time_text_embed"]}, jnp.asarray(case.t), jnp.asarray(case.guidance), case.pooled
    )
    assert relative_error(out, case.reference.time_text_embed(*arguments)) < FORWARD
    assert relative_error(out, case.fresh_reference().time_text_embed(*arguments)) < 5e-5


def test_rope(case, streams):
    for ours, theirs in zip(streams.rope, streams.reference_rope, strict=True):
        assert relative_error(np.repeat(ours, 2, axis=-1), theirs.float()) < 1e-6


def test_norm_out(case, streams):
    expected = case.reference.norm_out(streams.torch["x"], streams.torch["temb"])
    scale, shift = Modulation(2 * case.config.hidden, num_chunks=2).apply(
        {"params": case.params()["norm_out.linear"]}, streams.temb
    )
    assert relative_error(modulate(layer_norm(jnp.asarray(streams.x)), shift, scale), expected) < FORWARD


def lora_gradient(case, adapter, cotangent, **options):
    params = case.params()

    @jax.jit
    @jax.value_and_grad
    def loss(adapter):
        variables = {"params": params, LORA: lora.fold_scale(adapter, case.lora_config)}
        return jnp.sum(case.apply(variables, **options) * cotangent)

    return loss(adapter)


def test_lora_forward_and_gradient(case):
    import torch

    rng = np.random.default_rng(1)
    case.inject_adapter(rng)
    adapter = case.adapter()
    variables = {"params": case.params(), LORA: lora.fold_scale(adapter, case.lora_config)}
    expected = case.run_reference()
    assert relative_error(case.apply(variables), expected) < FORWARD

    cotangent = rng.standard_normal(expected.shape, np.float32)
    (expected * torch.from_numpy(cotangent)).sum().backward()
    gradients = {k: p.grad.numpy() for k, p in case.reference.named_parameters() if ".lora_" in k}
    _, ours = lora_gradient(case, adapter, cotangent)
    ours, theirs = weights.flatten(ours), weights.flatten(case.adapter_of(gradients))
    assert ours.keys() == theirs.keys()
    for path in ours:
        assert relative_error(ours[path], np.asarray(theirs[path])) < GRADIENT, path


def test_remat_policies_and_backends_agree(one_case):
    one_case.inject_adapter(np.random.default_rng(1))
    adapter = one_case.adapter()
    cotangent = np.ones((*one_case.hidden.shape[:1], one_case.num_target, one_case.config.in_channels), np.float32)
    # Every backend of this platform; the other policies are in tests/models/test_remat.py.
    pairs = [("none", "xla"), ("full", "blocked"), ("dots", "auto")]
    loss, gradient = lora_gradient(one_case, adapter, cotangent, remat=pairs[0][0], attention_backend=pairs[0][1])
    for remat, backend in pairs[1:]:
        other_loss, other = lora_gradient(one_case, adapter, cotangent, remat=remat, attention_backend=backend)
        np.testing.assert_allclose(other_loss, loss, rtol=1e-4, err_msg=f"{remat}, {backend}")
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
            assert relative_error(b, np.asarray(a)) < GRADIENT, (remat, backend)


@pytest.mark.parametrize("options, name", [({"remat": "all"}, "remat"), ({"attention_backend": "x"}, "backend")])
def test_unknown_options_are_named(one_case, options, name):
    with pytest.raises(KeyError, match=name):
        one_case.apply({"params": one_case.params()}, **options)


def test_bfloat16(one_case):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), one_case.params())
    out = one_case.apply({"params": params}, dtype=jnp.bfloat16)
    assert out.dtype == jnp.float32
    # 8 significant bits, a dozen layers of random weights.
    assert relative_error(out, one_case.run_reference()) < 0.1


def test_guidance_is_required_where_it_is_embedded(one_case):
    one_case.guidance = None
    with pytest.raises(ValueError, match="guidance"):
        one_case.apply({"params": one_case.params()})


def test_weights_round_trip(case):
    state, back = case.state(), weights.to_diffusers(case.params())
    assert state.keys() == back.keys()
    for name in state:
        np.testing.assert_array_equal(back[name], state[name], err_msg=name)


def test_weights_that_do_not_fit_are_all_named(one_case):
    state = one_case.state()
    missing, wrong = "norm_out.linear.bias", "single_transformer_blocks.0.proj_out.weight"
    del state[missing]
    state[wrong] = state[wrong][:, 1:]
    state["extra.weight"] = np.zeros((2, 3), np.float32)
    with pytest.raises(UserError) as error:
        weights.from_diffusers(state, one_case.abstract(), "file.safetensors")
    message = str(error.value)
    assert message.startswith("file.safetensors: 3 tensor(s)")
    for part in (f"missing: {missing}", "unexpected: extra.weight (2, 3)", f"wrong shape: {wrong}"):
        assert part in message
