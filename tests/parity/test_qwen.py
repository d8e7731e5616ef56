"""Our Qwen-Image transformer against diffusers' on the same random weights, of every variant, and its tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cocoedit_jax.models import lora, modulation, weights
from cocoedit_jax.models.layers import LORA, MODULATION, EmbedMLP, rope_table, sinusoidal_embedding
from cocoedit_jax.models.qwen import QwenTransformer, TimeEmbed
from tests.parity.qwen_cases import draw_qwen_case
from tests.parity.transformer_cases import NUM_CASES, relative_error

FORWARD, GRADIENT = 1e-5, 1e-4


@pytest.fixture(params=range(NUM_CASES))
def case(request, torch_side):
    return draw_qwen_case(request.param)


@pytest.fixture
def one_case(torch_side):
    """The 2511 variant with ragged texts and two source images."""
    return draw_qwen_case(3)


def test_forward(case):
    out = case.apply({"params": case.params()})
    assert out.dtype == jnp.float32
    assert relative_error(out, case.run_reference()) < FORWARD


def test_rope(case):
    import torch

    config = case.config
    images, text = case.reference.pos_embed([[(1, *grid) for grid in case.grids]], max_txt_seq_len=case.text.shape[1])
    cos, sin = rope_table(case.ids, config.axes_dims_rope, config.theta)
    expected = torch.cat([text, images])
    assert relative_error(cos, expected.real) < 1e-5
    assert relative_error(sin, expected.imag) < 1e-5


def test_time_embedding(case):
    import torch

    out = TimeEmbed(case.config.hidden, jnp.float32).apply(
        {"params": case.params()["time_text_embed"]}, jnp.asarray(case.t)
    )
    hidden = torch.zeros(1)
    assert relative_error(out, case.reference.time_text_embed(torch.from_numpy(case.t), hidden)) < FORWARD
    assert relative_error(out, case.fresh_reference().time_text_embed(torch.from_numpy(case.t), hidden)) < 5e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_time_features_are_rounded_as_the_model_ran(dtype, torch_side):
    """In bfloat16 the reference rounds sigma and frequencies: a third of the features is then another number."""
    import torch
    from diffusers.models.transformers.transformer_qwenimage import get_timestep_embedding

    sigmas = np.asarray([1.0, 0.937, 0.7, 0.6, 0.2, 0.02, 0.0], np.float32)
    levels = torch.from_numpy(sigmas).to(getattr(torch, dtype))
    expected = get_timestep_embedding(levels, 256, flip_sin_to_cos=True, downscale_freq_shift=0, scale=1000).numpy()
    features = jax.jit(lambda t: sinusoidal_embedding(t, 256, scale=1000.0, rounded_to=jnp.dtype(dtype)))
    np.testing.assert_allclose(features(sigmas), expected, atol=2e-4)
    other = sinusoidal_embedding(jnp.asarray(sigmas), 256, scale=1000.0)
    assert (relative_error(other, expected) > 0.1) == (dtype == "bfloat16")


def test_time_embedding_follows_the_dtype_of_the_transformer(one_case):
    params = {"params": one_case.params()["time_text_embed"]}
    found = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        out = TimeEmbed(one_case.config.hidden, dtype).apply(params, jnp.asarray(one_case.t))
        found[dtype] = np.asarray(out, np.float32)  # pyright: ignore[reportArgumentType]
    rounded = sinusoidal_embedding(jnp.asarray(one_case.t), 256, scale=1000.0, rounded_to=jnp.bfloat16)
    mlp = EmbedMLP(one_case.config.hidden)
    expected = np.asarray(mlp.apply({"params": params["params"]["timestep_embedder"]}, rounded))
    errors = [np.linalg.norm(x - expected) / np.linalg.norm(expected) for x in found.values()]
    assert errors[1] < 0.02 < errors[0]


def test_padding_is_ignored_where_it_is_masked(one_case):
    assert one_case.text_mask is not None and not one_case.text_mask.all()
    variables = {"params": one_case.params()}
    out = one_case.apply(variables)
    one_case.text = np.where(one_case.text_mask[..., None], one_case.text, 7)
    assert relative_error(one_case.apply(variables), np.asarray(out)) < 1e-6
    one_case.text_mask = None
    assert relative_error(one_case.apply(variables), np.asarray(out)) > 1e-3


def test_source_tokens_are_modulated_as_clean_ones(one_case):
    """The 2511 variant is not the 2509 one with another name."""
    variables = {"params": one_case.params()}
    plain = QwenTransformer(one_case.config.__class__(**{**vars(one_case.config), "zero_cond_t": False}))
    other = plain.apply(variables, *one_case.inputs)
    assert relative_error(one_case.apply(variables), np.asarray(other)) > 1e-3


def test_lora_forward_and_gradient(case):
    import torch

    rng = np.random.default_rng(1)
    case.inject_adapter(rng)
    adapter, params = case.adapter(), case.params()
    expected = case.run_reference()
    cotangent = rng.standard_normal(expected.shape, np.float32)

    @jax.jit
    def loss(adapter):
        out = case.transformer(case.config).apply(
            {"params": params, LORA: lora.fold_scale(adapter, case.lora_config)}, *case.inputs
        )
        return jnp.sum(out * cotangent), out

    gradients, out = jax.grad(loss, has_aux=True)(adapter)
    assert relative_error(out, expected) < FORWARD
    (expected * torch.from_numpy(cotangent)).sum().backward()
    theirs = {
        # The last block's text output reaches nothing, so its projection gets no gradient at all in PyTorch.
        name: np.zeros(parameter.shape, np.float32) if parameter.grad is None else parameter.grad.numpy()
        for name, parameter in case.reference.named_parameters()
        if ".lora_" in name
    }
    ours, theirs = weights.flatten(gradients), weights.flatten(case.adapter_of(theirs))
    assert ours.keys() == theirs.keys()
    for path in ours:
        if np.ptp(theirs[path]):
            assert relative_error(ours[path], np.asarray(theirs[path])) < GRADIENT, path
        else:
            np.testing.assert_array_equal(ours[path], theirs[path])


def tables_of(case, sigmas, dtype=jnp.float32):
    """Variables of the transformer with its modulation precomputed at ``sigmas``."""
    rest, part = modulation.split(case.params())
    tables = modulation.tables(QwenTransformer(case.config, dtype=dtype), part, sigmas)
    return {"params": rest, MODULATION: nn.unbox(tables)}


@pytest.mark.parametrize("index, remat", [(1, "none"), (3, "full")])
def test_tables_agree_with_the_layers(torch_side, index, remat):
    case = draw_qwen_case(index)
    sigmas = np.unique(np.concatenate([[0.0], case.t, [0.123, 1.0]]).astype(np.float32))
    whole, tabled = {"params": case.params()}, tables_of(case, sigmas)
    assert relative_error(case.apply(tabled, remat=remat), np.asarray(case.apply(whole))) < 1e-6
    sizes = [sum(x.size for x in jax.tree.leaves(tree["params"])) for tree in (whole, tabled)]
    d, layers = case.config.hidden, case.config.num_layers
    dropped = layers * 2 * 6 * d * (d + 1) + 2 * d * (d + 1) + 256 * d + d + d * d + d
    assert sizes[0] - sizes[1] == dropped


def test_gradients_pass_through_tables(one_case):
    rng = np.random.default_rng(1)
    one_case.inject_adapter(rng)
    adapter = one_case.adapter()
    tabled = tables_of(one_case, np.unique(np.concatenate([[0.0], one_case.t]).astype(np.float32)))

    def gradient(variables):
        def loss(adapter):
            out = one_case.transformer(one_case.config).apply({**variables, LORA: adapter}, *one_case.inputs)
            return jnp.sum(out**2)

        return jax.jit(jax.grad(loss))(adapter)

    whole, ours = gradient({"params": one_case.params()}), gradient(tabled)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4 * float(np.abs(a).max()))


def test_sigmas_that_no_table_has_give_nan(one_case):
    tabled = tables_of(one_case, [0.0, *one_case.t[1:].tolist()])
    out = np.asarray(one_case.apply(tabled))
    assert np.isnan(out[0]).all() and np.isfinite(out[1:]).all()


def test_bfloat16(one_case):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), one_case.params())
    out = one_case.apply({"params": params}, dtype=jnp.bfloat16)
    assert out.dtype == jnp.float32
    one_case.reference = one_case.fresh_reference().bfloat16()
    expected = one_case.run_reference("bfloat16")
    assert relative_error(out, expected) < 0.15


def test_weights_round_trip(case):
    state, back = case.state(), weights.to_diffusers(case.params())
    assert state.keys() == back.keys()
    for name in state:
        np.testing.assert_array_equal(back[name], state[name], err_msg=name)
