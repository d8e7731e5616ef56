"""Whole edits: a tiny random FluxKontextPipeline against our editor, from the same folder and the same noise."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cocoedit_jax.inference.edit import EditOptions, PictureEditor, edit_all
from cocoedit_jax.inference.requests import EditRequest, check_pictures
from cocoedit_jax.models.kontext import PREFERRED_SIZES, build_kontext, fitted_size, load_params, preferred_size
from cocoedit_jax.models.pipeline import BuildOptions
from cocoedit_jax.models.text import PrecomputedText
from cocoedit_jax.sharding.mesh import make_mesh
from cocoedit_jax.sharding.rules import sharded_shapes
from tests.parity.tiny_kontext import save_tiny_kontext

SEED = int(os.environ.get("PARITY_SEED", "0"))
PIXELS = 1e-3  # largest difference of a pixel in [0, 1]
PROMPTS = ["make the circle red", "remove the square"]


@pytest.fixture(scope="module")
def folder(torch_side, tmp_path_factory):
    return save_tiny_kontext(tmp_path_factory.mktemp("kontext"), seed=SEED)


@pytest.fixture(scope="module")
def pipeline(folder):
    from diffusers import FluxKontextPipeline

    pipe = FluxKontextPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(folder, pipeline, text_tokens=64, **options):
    """Our editor of the folder, with the pipeline's own text embeddings, on a mesh of four devices."""
    import torch

    with torch.no_grad():
        states, pooled, _ = pipeline.encode_prompt(PROMPTS, None, max_sequence_length=text_tokens)
    table = {p: {"text": states[i].numpy(), "pooled": pooled[i].numpy()} for i, p in enumerate(PROMPTS)}
    editor = build_kontext(folder, PrecomputedText.of(table), BuildOptions(dtype=jnp.float32), **options)
    mesh = make_mesh({"fsdp": 2, "tensor": 2})
    return editor, load_params(folder, editor, lambda tree: sharded_shapes(tree, mesh))


def picture(rng, height, width):
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def pixels(path):
    with Image.open(path) as file:
        return np.asarray(file, np.int32)


@pytest.mark.parametrize("size", [(64, 64), (48, 96), pytest.param((96, 32), marks=pytest.mark.slow)], ids=str)
def test_edits_equal_diffusers(folder, pipeline, size):
    import torch

    rng = np.random.default_rng(SEED)
    height, width = size
    guidance = float(rng.uniform(1, 5))
    editor, params = load(folder, pipeline, guidance=guidance)
    # The picture has its own size, so that source and target grids differ.
    source = picture(rng, 80, 64)
    program = PictureEditor(editor, params, None, EditOptions(4, "euler", size, "own"))
    noise = np.stack([rng.standard_normal((editor.grid(*size).tokens, editor.token_channels)) for _ in PROMPTS])
    noise = noise.astype(np.float32)
    ours = program([[source], [source]], PROMPTS, jnp.asarray(noise), (size, ((80, 64),)))
    theirs = pipeline(
        image=source, prompt=PROMPTS, height=height, width=width, max_area=height * width, _auto_resize=False,
        num_inference_steps=4, guidance_scale=guidance, latents=torch.from_numpy(noise), max_sequence_length=64,
        output_type="np",
    ).images  # fmt: skip
    assert ours.shape == theirs.shape == (2, height, width, 3)
    assert np.abs(ours - theirs).max() < PIXELS
    assert np.abs(ours[0] - ours[1]).max() > PIXELS  # the instruction matters


def test_the_picture_is_resized_as_diffusers_does(folder, pipeline):
    import torch

    rng = np.random.default_rng(SEED + 1)
    size = (64, 48)
    editor, params = load(folder, pipeline)
    source = picture(rng, 75, 52)
    noise = rng.standard_normal((1, editor.grid(*size).tokens, editor.token_channels)).astype(np.float32)
    own = (75 // 16 * 16, 52 // 16 * 16)
    program = PictureEditor(editor, params, None, EditOptions(2, "euler", size, "own"))
    assert program.options.sizes(editor, [(75, 52)]) == (size, (own,))
    ours = program([[source]], PROMPTS[:1], jnp.asarray(noise), (size, (own,)))
    theirs = pipeline(
        image=source, prompt=PROMPTS[:1], height=64, width=48, max_area=64 * 48, _auto_resize=False,
        num_inference_steps=2, guidance_scale=2.5, latents=torch.from_numpy(noise), max_sequence_length=64,
        output_type="np",
    ).images  # fmt: skip
    assert np.abs(ours - theirs).max() < PIXELS


def test_edits_are_split_over_devices(folder, pipeline):
    """Two shares of samples on four devices: each device is given half of a batch that fills both."""
    editor, params = load(folder, pipeline)
    program = PictureEditor(editor, params, None, EditOptions(batch_size=3))
    assert (program.shards, program.batch_size) == (2, 4)
    count = lambda params, adapter, images, text, negative, noise: jnp.full(len(noise), len(noise))  # noqa: E731
    zeros = np.zeros((4, 1), np.float32)
    assert jax.jit(program._split(count))(params, None, [zeros], zeros, None, zeros).tolist() == [2] * 4


@pytest.mark.slow
def test_a_preferred_size_end_to_end(folder, pipeline):
    """The pipeline's own resizing of a portrait whose shape changes class when its sides are cut to multiples of 16."""
    import torch

    rng = np.random.default_rng(SEED + 2)
    size = (64, 48)
    editor, params = load(folder, pipeline)
    source = picture(rng, 1350, 1080)
    noise = rng.standard_normal((1, editor.grid(*size).tokens, editor.token_channels)).astype(np.float32)
    program = PictureEditor(editor, params, None, EditOptions(1, "euler", size))
    target, seen = program.options.sizes(editor, [(1350, 1080)])
    assert (target, seen) == (size, ((1184, 880),))
    ours = program([[source]], PROMPTS[:1], jnp.asarray(noise), (target, seen))
    theirs = pipeline(
        image=source, prompt=PROMPTS[:1], height=64, width=48, max_area=64 * 48, num_inference_steps=1,
        guidance_scale=2.5, latents=torch.from_numpy(noise), max_sequence_length=64, output_type="np",
    ).images  # fmt: skip
    assert np.abs(ours - theirs).max() < PIXELS


def test_sizes_are_diffusers(torch_side):
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.pipelines.flux import pipeline_flux_kontext as reference

    assert sorted((w, h) for h, w in PREFERRED_SIZES) == sorted(reference.PREFERRED_KONTEXT_RESOLUTIONS)
    rng = np.random.default_rng(SEED)
    processor = VaeImageProcessor(vae_scale_factor=16)
    for height, width in [(1350, 1080), *rng.integers(100, 3000, (200, 2)).tolist()]:
        cut_height, cut_width = processor.get_default_height_width(Image.new("L", (width, height)))
        aspect = cut_width / cut_height
        _, w, h = min((abs(aspect - w / h), w, h) for w, h in reference.PREFERRED_KONTEXT_RESOLUTIONS)
        assert preferred_size(height, width) == (h, w)
        aspect = width / height
        w, h = round((1024**2 * aspect) ** 0.5), round((1024**2 / aspect) ** 0.5)
        assert fitted_size(height, width, 16) == (h // 16 * 16, w // 16 * 16)


def test_a_batch_is_written_as_it_comes(folder, pipeline, tmp_path):
    rng = np.random.default_rng(SEED)
    editor, params = load(folder, pipeline)
    requests = []
    for number in range(3):
        path = tmp_path / f"in_{number}.png"
        picture(rng, 40, 40).save(path)
        requests.append(EditRequest((path,), PROMPTS[number % 2], tmp_path / "out" / f"{number}.png", seed=number))
    done = []
    options = EditOptions(2, "euler", (32, 32), "target", batch_size=2)
    sizes = check_pictures(requests)
    edit_all(PictureEditor(editor, params, None, options), requests, sizes, side_by_side=True, progress=done.append)
    assert done == [2, 1]
    assert pixels(tmp_path / "out/2.png").shape == (32, 32, 3)
    assert pixels(tmp_path / "out/2_side_by_side.png").shape == (32, 64, 3)
    # An edit depends on its own seed, not on its batch.
    alone = PictureEditor(editor, params, None, EditOptions(2, "euler", (32, 32), "target"))
    edit_all(alone, [EditRequest(requests[1].images, PROMPTS[1], tmp_path / "alone.png", seed=1)], sizes[1:2])
    pair = [pixels(tmp_path / name) for name in ("alone.png", "out/1.png")]
    assert np.abs(pair[0] - pair[1]).max() <= 1
    assert not list(tmp_path.rglob("*.tmp*"))
    assert jax.device_count() >= 4
