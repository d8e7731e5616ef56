import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cocoedit_jax.errors import UserError
from cocoedit_jax.flow.packing import pack
from cocoedit_jax.models import lora, weights
from cocoedit_jax.models.editor import Conditioning
from cocoedit_jax.models.flux import FluxConfig
from cocoedit_jax.models.kontext import KontextEditor
from cocoedit_jax.models.quickstart import QuickstartConfig, build_editor, load_base, save_base
from cocoedit_jax.models.text import Instruction

CONFIG = QuickstartConfig(
    FluxConfig(48, 1, 1, 6, 2, 5, 4, False, (2, 2, 2), theta=100.0), ("make", "circle", "red"), 4, patch=4, image_size=8
)
PROMPTS = [Instruction(prompt) for prompt in ["make circle red", "circle"]]


@pytest.fixture(scope="module")
def editor():
    return build_editor(CONFIG)


@pytest.fixture(scope="module")
def params(editor):
    abstract = nn.unbox(editor.abstract())
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), abstract)


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(np.random.default_rng(0).random((2, 8, 12, 3)), jnp.float32)


def test_grid(editor):
    grid = editor.grid(8, 12)
    assert (grid.height, grid.width, grid.token_shape, grid.tokens) == (8, 12, (2, 3), 6)
    assert editor.token_channels == 48
    sigmas = editor.sigmas(4, grid)
    assert sigmas.shape == (5,) and sigmas[0] == 1 and sigmas[-1] == 0
    with pytest.raises(ValueError, match="10x12 px: both sides must be multiples of 4"):
        editor.grid(10, 12)


def test_encode_and_decode(editor, params, images):
    conditioning = editor.encode(params, images, editor.text_inputs(PROMPTS))
    assert conditioning.source.shape == (2, 6, 48)
    assert conditioning.text.states.shape == (2, 4, 5) and conditioning.text.pooled.shape == (2, 4)
    np.testing.assert_array_equal(conditioning.guidance, [2.5, 2.5])
    np.testing.assert_allclose(editor.decode(params, conditioning.source, editor.grid(8, 12)), images, atol=1e-6)
    np.testing.assert_array_equal(conditioning.source, pack(images * 2.0 - 1.0, 4))


def test_conditioning_rows(editor, params, images):
    conditioning = editor.encode(params, images, editor.text_inputs(PROMPTS)).take(jnp.asarray([1, 1, 0]))
    assert isinstance(conditioning, Conditioning)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(conditioning)} == {3}
    np.testing.assert_array_equal(conditioning.text.states[0], conditioning.text.states[1])


jitted_velocity = jax.jit(KontextEditor.velocity, static_argnums=(0, 6))


def velocity(editor, params, adapter, images, t=0.5, guidance=None, **text):
    conditioning = editor.encode(params, images, editor.text_inputs(PROMPTS))
    conditioning = conditioning.replace(text=conditioning.text._replace(**text))
    if guidance is not None:
        conditioning = conditioning.replace(guidance=guidance)
    x_t = jnp.asarray(np.random.default_rng(1).standard_normal((2, 6, 48)), jnp.float32)
    return jitted_velocity(editor, params, adapter, x_t, jnp.full((2,), t), conditioning, editor.grid(8, 12))


def test_velocity_depends_on_all_its_inputs(editor, params, images):
    v = velocity(editor, params, None, images)
    assert v.shape == (2, 6, 48) and v.dtype == jnp.float32
    config = lora.LoraConfig(rank=2, alpha=4)
    adapter = jax.tree.map(lambda x: x + 0.1, lora.init_adapter(jax.random.key(0), params["transformer"], config))
    changed = {
        "adapter": velocity(editor, params, lora.fold_scale(adapter, config), images),
        "time": velocity(editor, params, None, images, t=0.6),
        "source": velocity(editor, params, None, 1 - images),
        "text": velocity(editor, params, None, images, states=jnp.ones((2, 4, 5))),
        "pooled": velocity(editor, params, None, images, pooled=jnp.ones((2, 4))),
    }
    for name, other in changed.items():
        assert not np.allclose(v, other, atol=1e-3), name
    # This model embeds no guidance.
    np.testing.assert_array_equal(velocity(editor, params, None, images, guidance=jnp.ones(2)), v)


def test_samples_do_not_touch_each_other(editor, params, images):
    v = velocity(editor, params, None, images)
    other = velocity(editor, params, None, images.at[1].set(0.0))
    np.testing.assert_allclose(v[0], other[0], atol=1e-5)
    assert not np.allclose(v[1], other[1], atol=1e-3)


def test_base_round_trip(editor, params, images, tmp_path):
    save_base(tmp_path / "base", CONFIG, params, {"seed": "3"})
    loaded_editor, loaded = load_base(tmp_path / "base", remat="full", attention_backend="xla")
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert (loaded_editor.transformer.remat, loaded_editor.transformer.attention_backend) == ("full", "xla")
    assert QuickstartConfig.from_json(CONFIG.to_json()) == CONFIG
    np.testing.assert_allclose(
        velocity(loaded_editor, loaded, None, images), velocity(editor, params, None, images), atol=1e-5
    )
    _, metadata = weights.load_safetensors(tmp_path / "base" / "model.safetensors")
    assert metadata["seed"] == "3"


def test_bad_bases_are_named(params, tmp_path):
    with pytest.raises(UserError, match="no config.json there"):
        load_base(tmp_path)
    save_base(tmp_path, CONFIG, params, {})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors: no such file"):
        load_base(tmp_path)
    raw = json.loads(CONFIG.to_json())
    for text in ("{", "[]", json.dumps(raw | {"patches": 1}), json.dumps({**raw, "transformer": {"heads": 2}})):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="not a CoCoEditQuickstartEditor configuration"):
            load_base(tmp_path)


def test_weights_of_another_shape_are_named(params, tmp_path):
    save_base(tmp_path, CONFIG, params, {})
    raw = json.loads(CONFIG.to_json())
    raw["transformer"]["joint_attention_dim"] = 9
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="wrong shape: context_embedder.weight"):
        load_base(tmp_path)
