"""SAM 2 as a segmenter of annotation: by the package ``sam2``, or by transformers' Sam2Model.

Both take ``(RGB picture, box in its pixels)`` and return bool ``[H, W]``; a picture is encoded once for all its boxes.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cocoedit_jax.annotation.boxes import Box
from cocoedit_jax.errors import UserError
from cocoedit_jax.models.hub import resolve_model
from torch_bridge import require_torch
from torch_bridge.loading import default_device

# Part of a checkpoint's file name -> configuration inside the package sam2.
CONFIGS = {
    f"{version}_hiera_{size}": f"configs/{version}/{version}_hiera_{short}.yaml"
    for version in ("sam2.1", "sam2")
    for size, short in (("tiny", "t"), ("small", "s"), ("base_plus", "b+"), ("large", "l"))
}
_INSTALL = (
    "install it with: pip install 'cocoedit-jax[sam2]'; where that fetches a second PyTorch or fails to build, with:"
    " pip install 'torch>=2.13,<2.14' setuptools && pip install --no-deps 'torchvision>=0.28,<0.29' &&"
    " SAM2_BUILD_CUDA=0 pip install --no-deps --no-build-isolation 'sam2>=1.1,<2' &&"
    " pip install 'hydra-core>=1.3.2' 'iopath>=0.1.10'; or use --config.mask.segmenter=sam2-transformers, which needs"
    " none of them"
)
# ImageNet statistics, as SAM 2 was trained with.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Sam2Segmenter:
    """The image predictor of the package ``sam2``.

    Args:
        checkpoint: file such as sam2.1_hiera_large.pt (Meta's release).
        config: configuration inside the package; empty: by the checkpoint's name, see ``CONFIGS``.
        device: "cpu", "cuda" or "cuda:1"; empty: the GPU if there is one.

    Raises:
        UserError: ``sam2`` or a package it needs is missing, or no such checkpoint or configuration.
    """

    def __init__(self, checkpoint: str = "", config: str = "", device: str = ""):
        path = Path(checkpoint).expanduser()
        if not checkpoint or not path.is_file():
            raise UserError(
                f"segmenter sam2: checkpoint {checkpoint!r} is no file; expected one as"
                """ --config.mask.options="{'checkpoint': 'sam2.1_hiera_large.pt'}\""""
            )
        config = config or next((value for part, value in CONFIGS.items() if part in path.name), "")
        if not config:
            raise UserError(
                f"segmenter sam2: no configuration known for {path.name}; name it in mask.options: 'config'"
            )
        build, predictor = import_sam2()
        device = device or default_device()
        try:
            model = build(config, str(path), device=device)
        except Exception as error:  # of hydra, torch and sam2 itself, which have no common class
            raise UserError(f"segmenter sam2: {path} does not load as {config}: {error}") from error
        self._predictor = predictor(model)
        self._image: Image.Image | None = None

    def __call__(self, image: Image.Image, box: Box) -> np.ndarray:
        if self._image is not image:
            self._image = None  # if encoding fails, the next call must not use half of it
            self._predictor.set_image(np.array(image.convert("RGB")))
            self._image = image
        masks, _, _ = self._predictor.predict(box=np.asarray(box, np.float32), multimask_output=False)
        return np.asarray(masks[0]) > 0


class TransformersSam2Segmenter:
    """transformers' Sam2Model, with the preprocessing done here: its own needs torchvision.

    Args:
        model: folder, or repository in the Hugging Face cache, such as facebook/sam2.1-hiera-large.
        device: as above. dtype: "float32" or "bfloat16", of weights and computation.

    Raises:
        UserError: transformers is missing, no such model, or one that does not load.
    """

    def __init__(self, model: str = "facebook/sam2.1-hiera-large", device: str = "", dtype: str = "float32"):
        self._torch = require_torch("transformers")
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"segmenter sam2-transformers: dtype {dtype!r}, expected float32 or bfloat16")
        from transformers import Sam2Model

        folder = resolve_model(model)
        self._device, self._dtype = device or default_device(), getattr(self._torch, dtype)
        try:
            loaded = Sam2Model.from_pretrained(folder, local_files_only=True, dtype=self._dtype)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise UserError(f"segmenter sam2-transformers: {folder} does not load as Sam2Model: {error}") from error
        self._model: Any = loaded.to(self._device).eval()  # pyright: ignore[reportArgumentType]
        self._side = int(self._model.config.prompt_encoder_config.image_size)
        self._image: Image.Image | None = None
        self._embeddings: Any = None

    def __call__(self, image: Image.Image, box: Box) -> np.ndarray:
        torch = self._torch
        with torch.inference_mode():
            if self._image is not image:
                self._image = None
                self._embeddings = self._model.get_image_embeddings(self._pixels(image))
                self._image = image
            # The picture is squeezed into a square of this side, and the box with it.
            scale = torch.tensor([self._side / image.width, self._side / image.height] * 2)
            boxes = (torch.tensor(box) * scale).to(self._device, self._dtype)[None, None]
            found = self._model(image_embeddings=self._embeddings, input_boxes=boxes, multimask_output=False)
            logits = found.pred_masks[:, 0].float()  # [1, 1, side / 4, side / 4]
            logits = _resized(torch, logits, (image.height, image.width), antialias=False)
        return (logits[0, 0] > 0).cpu().numpy()

    def _pixels(self, image: Image.Image) -> Any:
        torch = self._torch
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
        pixels = _resized(torch, pixels, (self._side, self._side), antialias=True)
        mean, std = (torch.tensor(values)[None, :, None, None] for values in (_MEAN, _STD))
        return ((pixels - mean) / std).to(self._device, self._dtype)


def _resized(torch: Any, tensor: Any, size: tuple[int, int], *, antialias: bool) -> Any:
    return torch.nn.functional.interpolate(tensor, size, mode="bilinear", align_corners=False, antialias=antialias)


def import_sam2() -> tuple[Any, Any]:
    """``build_sam2`` and ``SAM2ImagePredictor``. Raises UserError, with the steps to install what is missing."""
    require_torch()
    for name in ("torchvision", "hydra", "iopath", "sam2"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"segmenter sam2: the package {name} is missing; {_INSTALL}")
    try:
        build = importlib.import_module("sam2.build_sam").build_sam2
        return build, importlib.import_module("sam2.sam2_image_predictor").SAM2ImagePredictor
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(f"segmenter sam2: cannot be imported ({error}); {_INSTALL}") from error
