"""The README.md beside a trained LoRA: what it is and how to load it, with the Hugging Face hub's front matter."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from cocoedit_jax.models import lora_names
from cocoedit_jax.models.lora import DEFAULT_TARGETS, LoraConfig

_TAGS = ("lora", "diffusers", "peft", "image-editing", "flow-matching", "reinforcement-learning", "cocoedit")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_REWARD, _WEIGHT = "reward/", "reward_weight/"


def _front_matter(base: str) -> str:
    lines = ["library_name: diffusers", "pipeline_tag: image-to-image"]
    # The hub refuses a base that is not a repository's name, which a relative path may look like.
    if _HUB_NAME.fullmatch(base) and not Path(base).exists():
        lines = [f"base_model: {base}", "base_model_relation: adapter", *lines]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in _TAGS), "---"])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _facts(cfg: LoraConfig, num_layers: int, base: str, info: Mapping[str, str], architecture: str) -> str:
    targets = "attention projections" if cfg.targets == DEFAULT_TARGETS else ", ".join(cfg.targets)
    rows = {
        "Base model": base,
        "Architecture": architecture,
        "Preset": info.get("preset", "not recorded"),
        "Step": info.get("step", "not recorded"),
        "Rank, alpha": f"{cfg.rank}, {cfg.alpha:g} (scale alpha / rank = {cfg.scale:g})",
        "Layers": f"{num_layers} linear layers: {targets}",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows.items())])


def _rewards(info: Mapping[str, str]) -> str:
    weights = {k.removeprefix(_WEIGHT): v for k, v in info.items() if k.startswith(_WEIGHT)}
    reached = {k.removeprefix(_REWARD): v for k, v in info.items() if k.startswith(_REWARD)}
    names = [*weights, *({"total"} & reached.keys())]  # reached also holds spreads
    if not names:
        return "No rewards are recorded."
    rows = [f"| {_cell(name)} | {weights.get(name, '')} | {reached.get(name, 'not measured')} |" for name in names]
    return "\n".join(["| Reward | Weight | Mean over the samples of this step |", "|---|---|---|", *rows])


def write(cfg: LoraConfig, num_layers: int, info: Mapping[str, str], model: str | None = None) -> str:
    """Text of the model card.

    Args:
        cfg: rank, alpha and targets of the adapter.
        num_layers: how many linear layers it adapts.
        info: ``base_model``, ``preset``, ``step``, ``reward_weight/NAME`` and ``reward/NAME``, as far as known.
        model: key in ``lora_names.MODELS``; None where the layers do not tell.
    """
    base = info.get("base_model", "not recorded")
    architecture = lora_names.titles([model] if model else lora_names.MODELS)
    return f"""{_front_matter(base)}

# LoRA for instruction-based image editing

Trained with CoCoEdit-JAX: online reinforcement learning with region-regularised rewards
([CoCoEdit, arXiv 2602.14068](https://arxiv.org/abs/2602.14068)). Edit masks were used in training only: inference needs
the picture and the instruction, no mask.

{_facts(cfg, num_layers, base, info, architecture)}

{_rewards(info)}

## Use

In CoCoEdit-JAX:

```python
from cocoedit_jax.models.lora_files import load_lora

adapter, config = load_lora("FOLDER")  # this folder
```

diffusers, where the base model is a {architecture} pipeline, takes rank and alpha from the file's header:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({json.dumps(base if "/" in base else "BASE")})
pipe.load_lora_weights("FOLDER")
```

PEFT, on the transformer alone:

```python
from peft import PeftModel

pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "FOLDER/peft")
```

ComfyUI does not read that header and would take alpha / rank = 1 instead of {cfg.scale:g}. Convert the file first
(`--format` also knows kohya, peft and diffusers-baked, which has alpha multiplied in for all that read diffusers'
names):

```bash
python -m launch.convert_lora --from=FOLDER --to=comfyui.safetensors --format=comfyui
```

## Licence

The base model's licence applies to this adapter; see the base model's page.
"""
