"""The tiny pipeline that other tests rely on is one that diffusers runs."""

import numpy as np
import pytest

from tests.parity.tiny_kontext import save_tiny_kontext
from tests.parity.transformer_cases import SEED


@pytest.fixture
def edit(torch_side):
    import torch
    from diffusers import FluxKontextPipeline
    from PIL import Image

    def run(folder, prompt="make the circle red"):
        pipeline = FluxKontextPipeline.from_pretrained(folder, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        pixels = np.random.default_rng(SEED).integers(0, 256, (32, 48, 3), np.uint8)
        edited = pipeline(
            image=Image.fromarray(pixels),  # type: ignore[arg-type]
            prompt=prompt,
            height=32,
            width=48,
            max_area=32 * 48,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
            _auto_resize=False,
        )
        return np.asarray(edited.images)  # pyright: ignore[reportAttributeAccessIssue]

    return run


def test_an_edit_depends_on_the_prompt_and_the_seed(edit, tmp_path):
    folder = save_tiny_kontext(tmp_path / "a", SEED)
    image = edit(folder)
    assert image.shape == (1, 32, 48, 3) and np.isfinite(image).all() and image.std() > 0.01
    np.testing.assert_array_equal(edit(save_tiny_kontext(tmp_path / "b", SEED)), image)
    assert np.abs(edit(folder, "remove the blue square") - image).max() > 1e-4
    assert np.abs(edit(save_tiny_kontext(tmp_path / "c", SEED + 1)) - image).max() > 1e-2
