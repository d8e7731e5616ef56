"""What is to be run, from a run's configuration, and the ways to run it that are compared."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from cocoedit_jax.data.text_kind import MODEL_INDEX, qwen_template
from cocoedit_jax.errors import UserError
from cocoedit_jax.models import lora, quickstart
from cocoedit_jax.models.attention import BACKENDS, CONTEXT_BACKENDS
from cocoedit_jax.models.blocks import REMAT_POLICIES
from cocoedit_jax.models.editor import Editor
from cocoedit_jax.models.hub import resolve_model
from cocoedit_jax.models.pipeline import read_part
from cocoedit_jax.models.quantize import FORMATS, phase_formats
from cocoedit_jax.models.qwen import QwenConfig
from cocoedit_jax.nft.presets import NFTConfig
from cocoedit_jax.sharding.layouts import candidates, parse_layout
from cocoedit_jax.train.editors import PACKAGED_BASE
from cocoedit_jax.train.plan import StepShape, published_editor

PUBLISHED = ("flux_kontext", "qwen_image_edit")
# Where the configuration leaves the length open: Qwen's text states are those of a picture, and of the words.
# The picture, square: its sides at the template's area (torch_bridge.qwen_text.TEMPLATES: 1024, 384) in patches of
# 14 px merged 2 x 2, rounded: 1024 / 28 -> 37, 384 / 28 -> 14.
QWEN_PICTURE_STATES = {"edit": 37 * 37, "edit_plus": 14 * 14}
# The template's words, about ten, and an instruction's, about fifty: with edit_plus 256, to which the released training
# cuts and pads.
QWEN_WORD_STATES = 60


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a step.

    Attributes:
        layout: as in ``config.mesh.layout``, sizes included.
        sizes: of the mesh axes.
        per_shard: samples in a micro-batch, of each share of the samples; of the rollout's batches too.
        remat, attention: as in ``config.model``.
        adapters: as ``config.train.adapters``.
        quantize: formats of the frozen base in rollout and optimizer step (``quantize.phase_formats``).
    """

    layout: str
    sizes: tuple[tuple[str, int], ...]
    per_shard: int
    remat: str
    attention: str
    adapters: str = "replicated"
    quantize: tuple[str, str] = ("", "")

    def quantize_in(self, phase: str) -> str:
        return self.quantize[phase != "rollout"]

    @property
    def shards(self) -> int:
        sizes = dict(self.sizes)
        return sizes["data"] * sizes["fsdp"]

    @property
    def batch(self) -> int:
        """Samples in a micro-batch, over all devices."""
        return self.per_shard * self.shards


@dataclasses.dataclass(frozen=True)
class Workload:
    """One step of a run, independent of devices."""

    config: ConfigDict = dataclasses.field(repr=False)
    algorithm: NFTConfig
    lora: lora.LoraConfig

    @classmethod
    def of(cls, config: ConfigDict) -> "Workload":
        """That of a training configuration.

        Raises:
            UserError: an editor whose size is not known without its files, or a fault of the algorithm.
        """
        if config.model.kind not in (*PUBLISHED, "quickstart"):
            raise UserError(
                f"config.model.kind={config.model.kind!r}; expected one of {sorted((*PUBLISHED, 'quickstart'))}"
            )
        algorithm = NFTConfig.from_dict(config.algorithm.to_dict())
        return cls(config, algorithm, lora.LoraConfig(rank=config.lora.rank, alpha=config.lora.alpha))

    @property
    def samples(self) -> int:
        return self.config.rollout.groups * self.config.rollout.group_size

    @functools.cached_property
    def qwen(self) -> tuple[str, bool]:
        """Template (``QWEN_PICTURE_STATES``) and ``zero_cond_t`` of a Qwen-Image-Edit: by the files of its folder, and
        by its name where they are not there.

        Raises:
            UserError: files that training would not take either.
        """
        path = self.config.model.path
        template = "edit" if Path(path).name.lower() == "qwen-image-edit" else "edit_plus"  # the first one; 2509, 2511
        zero_cond_t = "2511" in path
        try:
            folder = resolve_model(path)
        except UserError:
            return template, zero_cond_t
        if (folder / MODEL_INDEX).is_file():
            template = qwen_template(folder)
        if (folder / "transformer").is_dir():
            zero_cond_t = read_part(folder, "transformer", QwenConfig.from_diffusers).zero_cond_t
        return template, zero_cond_t

    def editor(self, remat: str, attention: str, quantize: str = "") -> Editor:
        """The editor of the configuration, without its weights."""
        editor = self._editor(remat, attention)
        return dataclasses.replace(editor, quantize=quantize) if quantize else editor

    def _editor(self, remat: str, attention: str) -> Editor:
        model = self.config.model
        if model.kind == "quickstart":
            folder = Path(model.path) if model.path else PACKAGED_BASE
            try:
                base = quickstart.QuickstartConfig.from_json((folder / "config.json").read_text())
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"config.model.path={str(folder)!r}: no quickstart base there ({error})") from error
            return quickstart.build_editor(base, remat=remat, attention_backend=attention)
        kind = model.kind + ("_2511" if model.kind == "qwen_image_edit" and self.qwen[1] else "")
        editor = published_editor(kind, dtype=jnp.dtype(model.dtype), remat=remat, attention_backend=attention)
        autoencoder: Any = editor.autoencoder
        autoencoder = dataclasses.replace(
            autoencoder, dtype=jnp.dtype(model.vae_dtype), tile_size=model.vae_tile or None
        )
        return dataclasses.replace(editor, autoencoder=autoencoder)

    def text_tokens(self) -> int:
        model = self.config.model
        if model.kind == "quickstart":
            text: Any = self.editor("none", "xla").text
            return text.encoder.max_length
        return model.text_tokens or QWEN_PICTURE_STATES[self.qwen[0]] + QWEN_WORD_STATES

    def shape(self, candidate: Candidate) -> StepShape:
        """Sizes of a step that is run as ``candidate``."""
        config = self.config
        return StepShape(
            config.data.resolution,
            config.data.resolution,
            text_tokens=self.text_tokens(),
            text_mask=bool(config.model.get("text_mask", config.model.kind == "quickstart")),
            samples=self.samples,
            micro_batch=candidate.batch,
            precompute_modulation=bool(config.model.get("precompute_modulation", False)),
            sampler_steps=config.rollout.steps,
            rollout_batch=candidate.batch,
            solver=config.rollout.solver,
            sharded_adapters=candidate.adapters == "sharded",
        )


def choose_candidates(
    workload: Workload,
    devices: int,
    *,
    layouts: Sequence[str] = (),
    per_shard: Sequence[int] = (),
    remat: Sequence[str] = (),
    attention: Sequence[str] = (),
    adapters: str = "replicated",
    quantize: Sequence[str] = (),
) -> list[Candidate]:
    """Every combination of the given values; empty ones: all layouts of ``devices``, and for the others what the
    configuration says.

    Raises:
        UserError: naming every value that is not usable.
    """
    config = workload.config
    remats = list(remat) or [config.model.remat]
    backends = list(attention) or [config.model.attention]
    problems = [f"--remat={r}: expected some of {', '.join(REMAT_POLICIES)}" for r in remats if r not in REMAT_POLICIES]
    known = ("auto", *BACKENDS, *CONTEXT_BACKENDS)
    problems += [f"--attention={a}: expected some of {', '.join(known)}" for a in backends if a not in known]
    problems += [f"--per_shard={n}: expected whole numbers, at least 1" for n in per_shard if n < 1]
    formats = [phase_formats(config)]
    if quantize:
        problems += [
            f"--quantize={name}: expected some of none, {', '.join(FORMATS)}"
            for name in quantize
            if name not in ("none", *FORMATS)
        ]
        formats = [("", "") if name == "none" else (name, name) for name in quantize]
    if adapters not in ("replicated", "sharded"):
        problems.append(f"--adapters={adapters}: expected replicated or sharded")
    heads = workload.editor("none", "xla").transformer.config.num_attention_heads
    every = list(candidates(devices, heads=heads))
    chosen: list[tuple[str, dict[str, int]]] = [] if layouts else every
    for text in layouts:
        try:
            layout, given = parse_layout(text, "--layouts")
        except UserError as error:
            problems.append(str(error))
            continue
        sizes = layout.sizes(devices, given)
        fixed = 1
        for size in sizes.values():
            fixed *= size if size > 0 else 1
        if devices % fixed or (-1 not in sizes.values() and fixed != devices):
            problems.append(f"--layouts={text}: {sizes} does not fit {devices} devices")
            continue
        sizes = {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}
        if heads % sizes["tensor"]:
            problems.append(f"--layouts={text}: expected a tensor axis that divides {heads} attention heads")
        chosen.append((text, sizes))
    if problems:
        raise UserError("\n".join(problems))
    out = []
    for (text, sizes), backend, policy, form in itertools.product(chosen, backends, remats, formats):
        shards = sizes["data"] * sizes["fsdp"]
        counts = list(per_shard) or [max(1, config.train.micro_batch // shards)]
        out += [Candidate(text, tuple(sizes.items()), n, policy, backend, adapters, form) for n in counts]
    return out
