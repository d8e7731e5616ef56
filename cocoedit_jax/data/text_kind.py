"""What the text embeddings of a data folder depend on beside the encoder: the lengths of FLUX, the template and the
framing of Qwen, whose encoder sees the picture that is to be edited."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cocoedit_jax.data.images import Framing
from cocoedit_jax.data.records import TEXT_CACHE
from cocoedit_jax.errors import UserError

MODEL_INDEX = "model_index.json"
# By the pipeline that model_index.json names.
QWEN_TEMPLATES = {"QwenImageEditPipeline": "edit", "QwenImageEditPlusPipeline": "edit_plus"}


@dataclass(frozen=True)
class TextKind:
    """Made by `flux_kind` and `qwen_kind`.

    Attributes:
        encoder: "flux" or "qwen", as ``launch.prepare_data --encode`` takes it.
        max_length: tokens S of every entry (FLUX: T5 tokens, padding included); None: entries are as long as they are.
        template: "edit" or "edit_plus", see `QWEN_TEMPLATES`; None: the encoder sees no picture.
        resolution, crop: the `Framing` in which the encoder sees pictures.
    """

    encoder: str
    max_length: int | None = None
    template: str | None = None
    resolution: int | None = None
    crop: str | None = None

    @property
    def sees_pictures(self) -> bool:
        return self.template is not None

    @property
    def name(self) -> str:
        """Of the cache's folder: flux-128, qwen-edit_plus-512-center."""
        parts = (self.encoder, self.max_length, self.template, self.resolution, self.crop)
        return "-".join(str(part) for part in parts if part is not None)

    def folder(self, data_dir: Path | str) -> Path:
        """Where the cache of a data folder lies."""
        return Path(data_dir) / TEXT_CACHE / self.name

    def command(self, data_dir: Path | str, min_bucket_records: int = 1) -> str:
        """The command that makes, completes or repairs the cache of a data folder.

        Args:
            min_bucket_records: what buckets of training hold at least (`read_records`): others frame some pictures.
        """
        flags = {
            "encode": self.encoder,
            "model": "MODEL_DIR",
            "out": shlex.quote(str(data_dir)),
            "max_length": self.max_length,
            "resolution": self.resolution,
            "crop": self.crop,
            "groups": min_bucket_records if self.crop == "buckets" and min_bucket_records > 1 else None,
        }
        given = " ".join(f"--{name}={value}" for name, value in flags.items() if value is not None)
        return f"python -m launch.prepare_data {given}"


def flux_kind(max_length: int) -> TextKind:
    """FLUX: entries are of prompts, with `max_length` T5 tokens."""
    return TextKind("flux", max_length=max_length)


def qwen_kind(template: str, framing: Framing) -> TextKind:
    """Qwen-Image-Edit: entries are of prompts and pictures, framed as in training."""
    if template not in QWEN_TEMPLATES.values():
        raise UserError(f"template: {template!r} given, expected one of {', '.join(QWEN_TEMPLATES.values())}")
    return TextKind("qwen", template=template, resolution=framing.resolution, crop=framing.crop)


def read_index(model_dir: Path | str) -> dict[str, Any] | None:
    """model_index.json of a diffusers pipeline; None where there is none. Raises UserError when it is not one."""
    path = Path(model_dir) / MODEL_INDEX
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        _ = index["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the index of a diffusers pipeline ({error!r})") from error
    return index


def qwen_template(model_dir: Path | str) -> str:
    """ "edit" or "edit_plus", whichever the pipeline in `model_dir` uses.

    Raises:
        UserError: model_index.json is missing or names another pipeline.
    """
    index = read_index(model_dir)
    name = index and index["_class_name"]
    if name not in QWEN_TEMPLATES:
        found = f"_class_name is {name!r}" if name else "no such file"
        path = Path(model_dir) / MODEL_INDEX
        raise UserError(f"{path}: {found}; expected the index of {' or '.join(QWEN_TEMPLATES)}")
    return QWEN_TEMPLATES[name]
