"""Whole edits: tiny random QwenImageEdit pipelines against our editor, from the same folder and the same noise."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cocoedit_jax.inference.edit import EditOptions, PictureEditor
from cocoedit_jax.models.layers import MODULATION
from cocoedit_jax.models.pipeline import BuildOptions
from cocoedit_jax.models.qwen_edit import build_qwen_edit, fitted_size, load_params, with_modulation_at
from cocoedit_jax.models.text import PrecomputedText
from cocoedit_jax.sharding.mesh import make_mesh
from cocoedit_jax.sharding.rules import sharded_shapes
from tests.parity.tiny_qwen import save_tiny_qwen
from tests.parity.tiny_qwen_text import EDIT, EDIT_PLUS, TinyProcessor, mark_pictures
from tests.parity.transformer_cases import SEED

PIXELS = 1e-3  # largest difference of a pixel in [0, 1]
PROMPT, NEGATIVE = "make the circle red", " "
AREA = 64 * 64  # stands for the megapixel of the real pipelines

# pipeline, 2511 variant, sizes (height, width) of the source pictures, of the edit, guidance
CASES = {
    "edit": (EDIT, False, [(70, 70)], (64, 64), 1.0),
    "edit_landscape": (EDIT, False, [(60, 130)], (32, 96), 3.0),
    "plus_one": (EDIT_PLUS, False, [(100, 60)], (64, 32), 1.0),
    "plus_two": (EDIT_PLUS, False, [(64, 64), (90, 50)], (48, 80), 2.5),
    "2511_two": (EDIT_PLUS, True, [(50, 90), (70, 70)], (64, 64), 1.0),
}


SLOW = ("edit_landscape", "plus_one")


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]
)
def case(request, torch_side, tmp_path_factory):
    return (*CASES[request.param], tmp_path_factory.mktemp(request.param))


def reference(folder, name, monkeypatch, areas=None):
    """diffusers' pipeline of ``folder``, with areas that a test can afford: ``AREA``, or what ``areas`` says."""
    import diffusers
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    chosen = lambda area: AREA if areas is None else areas.get(area, area)  # noqa: E731
    small = lambda calculate: lambda area, ratio: calculate(chosen(area), ratio)  # noqa: E731
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        monkeypatch.setattr(module, "calculate_dimensions", small(module.calculate_dimensions))
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder")
    mark_pictures(encoder)
    pipeline = getattr(diffusers, name)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=diffusers.AutoencoderKLQwenImage.from_pretrained(folder / "vae"),
        text_encoder=encoder,
        tokenizer=tokenizer,
        processor=TinyProcessor(tokenizer),  # type: ignore[arg-type]
        transformer=diffusers.QwenImageTransformer2DModel.from_pretrained(folder / "transformer"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_edits_equal_diffusers(case, monkeypatch):
    import torch

    name, zero_cond_t, sizes, target, guidance, path = case
    folder = save_tiny_qwen(path, SEED, name, zero_cond_t)
    pipeline = reference(folder, name, monkeypatch)
    rng = np.random.default_rng(SEED)
    pictures = [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in sizes]
    image = pictures if name == EDIT_PLUS else pictures[0]

    # The pipeline's own embeddings: those of torch_bridge have tests of their own.
    table, encode = {}, pipeline.encode_prompt
    given = {}

    def keep(*args, **kwargs):
        embeds, mask = encode(*args, **kwargs)
        given[kwargs["prompt"]] = embeds[0].numpy()
        return embeds, mask

    monkeypatch.setattr(pipeline, "encode_prompt", keep)
    height, width = target
    noise = rng.standard_normal((1, height * width // 256, 64)).astype(np.float32)
    guided = {"negative_prompt": NEGATIVE} if guidance > 1 else {}
    theirs = pipeline(
        image=image, prompt=PROMPT, height=height, width=width, num_inference_steps=3, true_cfg_scale=guidance,
        latents=torch.from_numpy(noise), output_type="np", **guided,
    ).images  # fmt: skip

    length = max(len(states) for states in given.values()) + 3  # padding must not matter
    for prompt, states in given.items():
        padded = np.full((length, states.shape[1]), 5, np.float32)
        padded[: len(states)] = states
        table[prompt] = {"text": padded, "mask": np.arange(length) < len(states)}
    editor = build_qwen_edit(folder, PrecomputedText.of(table), BuildOptions(dtype=jnp.float32))
    options = EditOptions(3, "euler", target, true_cfg=guidance, negative=NEGATIVE)
    assert editor.source_size((1050, 1050)) == (1024, 1024)
    sources = tuple(fitted_size(height, width, AREA) for height, width in sizes)
    place = partial(sharded_shapes, mesh=make_mesh({"fsdp": 2, "tensor": 2}))
    ours = {}
    for tabled in (False, True):
        if tabled:
            editor = with_modulation_at(editor, [editor.sigmas(3, editor.grid(*target))])
        params = load_params(folder, editor, place)
        assert (MODULATION in params) == tabled
        program = PictureEditor(editor, params, None, options)
        ours[tabled] = program([pictures], [PROMPT], jnp.asarray(noise), (target, sources))
        assert ours[tabled].shape == theirs.shape == (1, height, width, 3)
        assert np.abs(ours[tabled] - theirs).max() < PIXELS
    np.testing.assert_allclose(ours[True], ours[False], atol=1e-5)
    assert np.ptp(theirs) > 0.1


def test_other_sigmas_than_the_tables_are_refused(torch_side, tmp_path):
    folder = save_tiny_qwen(tmp_path, SEED)
    editor = build_qwen_edit(folder, PrecomputedText.of({}), BuildOptions(dtype=jnp.float32))
    grid = editor.grid(64, 64)
    editor.check_sigmas(editor.sigmas(7, grid))  # any will do
    tabled = with_modulation_at(editor, [editor.sigmas(4, grid), editor.sigmas(6, editor.grid(32, 64))])
    tabled.check_sigmas(editor.sigmas(4, grid))
    with pytest.raises(ValueError, match="modulation was computed for others"):
        tabled.check_sigmas(editor.sigmas(5, grid))


def test_tables_are_loaded_from_either_form(torch_side, tmp_path):
    """The same tables from safetensors and from the Orbax form, on a mesh, as from the whole parameters."""
    from flax import linen as nn

    from cocoedit_jax.models import modulation
    from cocoedit_jax.models.convert import convert

    folder = save_tiny_qwen(tmp_path / "model", SEED, zero_cond_t=True)
    convert(folder, tmp_path / "orbax", "orbax")
    editor = build_qwen_edit(folder, PrecomputedText.of({}), BuildOptions(dtype=jnp.float32))
    place = partial(sharded_shapes, mesh=make_mesh({"fsdp": 4, "tensor": 2}))
    whole = load_params(folder, editor, place)
    editor = with_modulation_at(editor, [editor.sigmas(4, editor.grid(64, 64))])
    assert editor.modulation_sigmas is not None and editor.modulation_sigmas[0] == 0.0
    _, part = modulation.split(whole["transformer"])
    expected = nn.unbox(modulation.tables(editor.transformer, part, editor.modulation_sigmas))
    for source in (folder, tmp_path / "orbax"):
        loaded = load_params(source, editor, place)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), loaded[MODULATION], expected)
        jax.tree.map(np.testing.assert_array_equal, loaded["transformer"], modulation.split(whole["transformer"])[0])
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), place(editor.abstract()))
        assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), loaded) == shapes
    assert dataclasses.replace(editor, modulation_sigmas=None).abstract().keys() == whole.keys()
