"""What Qwen-Image-Edit's editor adds to its transformer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cocoedit_jax.models.autoencoder_qwen import AutoencoderQwen
from cocoedit_jax.models.autoencoder_qwen_config import AutoencoderQwenConfig
from cocoedit_jax.models.editor import Conditioning
from cocoedit_jax.models.qwen import QwenConfig, QwenTransformer, abstract_params
from cocoedit_jax.models.qwen_edit import QwenEditor, fitted_size, with_modulation_at
from cocoedit_jax.models.text import PrecomputedText, TextStates
from cocoedit_jax.train.plan import QWEN_SCHEDULE, published_editor

CONFIG = QwenConfig(16, 1, 6, 2, 8, (2, 2, 2))
VAE = AutoencoderQwenConfig(
    base_dim=4, z_dim=4, dim_mult=(1, 2), num_res_blocks=1, temperal_downsample=(True,), latents_mean=(0.0,) * 4,
    latents_std=(1.0,) * 4,
)  # fmt: skip
EDITOR = QwenEditor(QwenTransformer(CONFIG), AutoencoderQwen(VAE), PrecomputedText.of({}), schedule=QWEN_SCHEDULE)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(0.5 * rng.standard_normal(x.shape), jnp.float32)  # noqa: E731
    return {"transformer": jax.tree.map(draw, abstract_params(CONFIG))}


def velocity(editor, params, text, mask, sources=((4, 8), (12, 4))):
    """Of an edit of 8 x 8 pixels and sources of sizes of their own."""
    rng = np.random.default_rng(1)
    grid, grids = editor.grid(8, 8), tuple(editor.grid(*size) for size in sources)
    draw = lambda tokens: jnp.asarray(rng.standard_normal((2, tokens, 16)), jnp.float32)  # noqa: E731
    source = draw(sum(g.tokens for g in grids))
    conditioning = Conditioning(source, TextStates(jnp.asarray(text), None, jnp.asarray(mask)))
    out = editor.velocity(params, None, draw(grid.tokens), jnp.asarray([0.3, 0.9]), conditioning, grid, grids)
    assert out.shape == (2, grid.tokens, 16)
    return np.asarray(out)


def test_padding_counts_only_where_it_is_asked_for(params):
    text = np.random.default_rng(2).standard_normal((2, 5, 8)).astype(np.float32)
    mask = np.arange(5) < np.array([[3], [5]])
    other = np.where(mask[..., None], text, np.float32(7))
    masked = velocity(EDITOR, params, text, mask)
    np.testing.assert_allclose(velocity(EDITOR, params, other, mask), masked, atol=1e-6)
    released = dataclasses.replace(EDITOR, text_mask=False)
    attended = velocity(released, params, text, mask)
    assert np.abs(attended[0] - masked[0]).max() > 1e-3
    np.testing.assert_allclose(attended[1], masked[1], atol=1e-5)  # has no padding
    assert np.abs(velocity(released, params, other, mask)[0] - attended[0]).max() > 1e-3


def test_every_source_has_its_own_place(params):
    """The same tokens in pictures of another shape, or in one picture, are not the same."""
    text, mask = np.ones((2, 3, 8), np.float32), np.ones((2, 3), bool)
    two = velocity(EDITOR, params, text, mask)
    assert np.abs(velocity(EDITOR, params, text, mask, ((8, 4), (12, 4))) - two).max() > 1e-4
    assert np.abs(velocity(EDITOR, params, text, mask, ((20, 4),)) - two).max() > 1e-4


def test_sizes_of_edits():
    """A megapixel with the last picture's shape; every source with its own."""
    editor = published_editor("qwen_image_edit")
    assert editor.edit_size([(512, 512), (500, 1000)]) == fitted_size(500, 1000) == (736, 1440)
    assert editor.edit_size([(500, 1000), (512, 512)]) == editor.source_size((90, 90)) == (1024, 1024)
    assert editor.source_size((1000, 500)) == (1440, 736)
    assert editor.max_sources == 3


def test_tables_hold_the_sigmas_that_are_visited_exactly():
    """Training and sampling hold sigmas in float32; the last one, 0, is nobody's but the source images' of 2511."""
    for kind, clean in (("qwen_image_edit", False), ("qwen_image_edit_2511", True)):
        editor = published_editor(kind)
        levels = [editor.sigmas(steps, editor.grid(512, size)) for steps, size in ((10, 512), (10, 768), (20, 512))]
        tabled = with_modulation_at(editor, levels)
        known = np.asarray(tabled.modulation_sigmas, np.float32)
        wanted = {float(x) for sigmas in levels for x in np.asarray(sigmas[:-1], np.float32)}
        assert set(known.tolist()) == wanted | ({0.0} if clean else set())
        assert (np.diff(known) > 0).all()
        for sigmas in levels:
            tabled.check_sigmas(sigmas)
        with pytest.raises(ValueError, match="computed for others"):
            tabled.check_sigmas(levels[0] + 2e-6)


def test_schedule_at_512_pixels():
    editor = published_editor("qwen_image_edit")
    expected = [1, 0.9290, 0.8515, 0.7666, 0.6733, 0.5701, 0.4555, 0.3274, 0.1833, 0.02, 0]
    np.testing.assert_allclose(editor.sigmas(10, editor.grid(512, 512)), expected, atol=6e-5)
