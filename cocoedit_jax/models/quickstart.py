"""The quickstart's editor: the FLUX Kontext classes at a size that trains on two CPU cores, and its files on disk.

A base is a folder with ``config.json`` and ``model.safetensors`` (diffusers names under ``transformer.`` and
``text.``).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from flax import linen as nn

from cocoedit_jax.errors import UserError
from cocoedit_jax.models import weights
from cocoedit_jax.models.autoencoder import IdentityAutoencoder
from cocoedit_jax.models.flux import FluxConfig, FluxTransformer
from cocoedit_jax.models.kontext import KontextEditor
from cocoedit_jax.models.text import TableTextEncoder, WordTable, WordTokenizer

CLASS_NAME = "CoCoEditQuickstartEditor"
_PARTS = ("transformer", "text")


@dataclasses.dataclass(frozen=True)
class QuickstartConfig:
    """Everything needed to rebuild the editor around its weights."""

    transformer: FluxConfig
    vocabulary: tuple[str, ...]
    max_words: int
    patch: int
    image_size: int

    def to_json(self) -> str:
        return json.dumps({"_class_name": CLASS_NAME, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "QuickstartConfig":
        raw = json.loads(text)
        raw.pop("_class_name")
        shape = raw.pop("transformer")
        transformer: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in shape.items()}
        return cls(FluxConfig(**transformer), tuple(raw.pop("vocabulary")), **raw)


def build_editor(config: QuickstartConfig, *, remat: str = "none", attention_backend: str = "auto") -> KontextEditor:
    """The editor of ``config``; parameters are held outside."""
    shape = config.transformer
    tokenizer = WordTokenizer(config.vocabulary, config.max_words)
    return KontextEditor(
        transformer=FluxTransformer(shape, remat=remat, attention_backend=attention_backend),
        autoencoder=IdentityAutoencoder(),
        text=WordTable(
            tokenizer,
            TableTextEncoder(
                tokenizer.num_ids, config.max_words, shape.joint_attention_dim, shape.pooled_projection_dim
            ),
        ),
        patch=config.patch,
    )


def save_base(folder: Path, config: QuickstartConfig, params: Any, metadata: dict[str, str]) -> None:
    """Writes the base; ``metadata`` (how it was made) goes into the safetensors header."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for part in _PARTS:
        tensors |= {f"{part}.{name}": value for name, value in weights.to_diffusers(params[part]).items()}
    weights.save_safetensors(folder / "model.safetensors", tensors, metadata)
    (folder / "config.json").write_text(config.to_json() + "\n")


def load_base(folder: Path, *, remat: str = "none", attention_backend: str = "auto") -> tuple[KontextEditor, Any]:
    """The editor and its parameters.

    Raises:
        UserError: the folder or a file in it is absent or does not fit.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"model.path={str(folder)!r}: no config.json there; expected a base written by launch.pretrain")
    try:
        config = QuickstartConfig.from_json(path.read_text())
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a {CLASS_NAME} configuration ({error})") from error
    editor = build_editor(config, remat=remat, attention_backend=attention_backend)
    abstract = nn.unbox(editor.abstract())
    file = folder / "model.safetensors"
    tensors, _ = weights.load_safetensors(file)
    params: dict[str, Any] = {"autoencoder": {}}
    for part in _PARTS:
        own = {k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")}
        params[part] = weights.from_diffusers(own, abstract[part], str(file))
    return editor, params
