"""Which values a configuration may have. Everything that can be refused is refused before anything is computed."""

import math
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from cocoedit_jax.errors import UserError
from cocoedit_jax.flow.solvers import SOLVERS
from cocoedit_jax.models.attention import BACKENDS, CONTEXT_BACKENDS
from cocoedit_jax.models.blocks import REMAT_POLICIES
from cocoedit_jax.models.quantize import check_format, phase_formats
from cocoedit_jax.nft.presets import NFTConfig
from cocoedit_jax.rewards.registry import weighted_rewards
from cocoedit_jax.sharding.mesh import CONTEXT, sample_shards

# key -> smallest whole number
WHOLE = {
    "seed": 0, "data.resolution": 1, "data.generate": 0, "rollout.groups": 1, "rollout.group_size": 2,
    "rollout.batch_size": 1, "rollout.steps": 1, "rollout.refill": 0, "train.steps": 1, "train.micro_batch": 1,
    "lora.rank": 1, "evaluation.scenes": 1, "evaluation.batch_size": 1, "evaluation.every": 1,
    "evaluation.every_scenes": 1, "evaluation.steps": 1, "checkpoint.every": 1, "checkpoint.keep": 1,
}  # fmt: skip
# key -> bounds of a number, and whether it may reach the lower one
NUMBERS = {
    "train.learning_rate": (0.0, math.inf, False),
    "train.weight_decay": (0.0, math.inf, True),
    "train.max_grad_norm": (0.0, math.inf, False),
    "lora.alpha": (0.0, math.inf, False),
    "data.held_out": (0.0, 0.999, False),
    "max_unscored": (0.0, 1.0, True),
}
ADAPTERS = ("replicated", "sharded")  # values of train.adapters
BOOLEANS = ("data.strict",)


def value_of(config: ConfigDict, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return value


def _problem(config: ConfigDict, key: str, expected: str) -> str:
    return f"config.{key}={value_of(config, key)!r}; expected {expected}"


def _model_problems(model: ConfigDict) -> list[str]:
    """Of the fields that only some editors have."""
    dtypes = ("bfloat16", "float32")
    whole = lambda low, high: lambda x: type(x) is int and low <= x <= high  # noqa: E731
    flag = lambda x: isinstance(x, bool)  # noqa: E731
    qwen = model.kind == "qwen_image_edit"  # whose texts have a length of their own
    text_tokens = whole(0 if qwen else 1, 512)
    checks = {
        "dtype": (lambda x: x in dtypes, f"one of {list(dtypes)}"),
        "vae_dtype": (lambda x: x in dtypes, f"one of {list(dtypes)}"),
        "text_tokens": (text_tokens, "a whole number from 1 to 512" + (", or 0" if qwen else "")),
        "text_mask": (flag, "true or false"),
        "precompute_modulation": (flag, "true or false"),
        "vae_tile": (whole(0, 2**20), "a number of pixels, or 0"),
        "guidance": (lambda x: isinstance(x, int | float) and 0 <= x < math.inf, "a number, at least 0"),
    }
    problems = [
        f"config.model.{key}={model[key]!r}; expected {expected}"
        for key, (usable, expected) in checks.items()
        if key in model and not usable(model[key])
    ]
    if model.attention == "cudnn" and model.get("dtype", "float32") == "float32":
        problems.append("config.model.attention='cudnn'; expected another one: it has no float32")
    return problems


# Kernels that exist on one kind of device.
KERNEL_PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}


def _mesh_problems(config: ConfigDict, *meshes: Mesh) -> list[str]:
    """Of attention backends that the meshes cannot run."""
    name, platform = config.model.attention, meshes[0].devices.flat[0].platform
    if name in CONTEXT_BACKENDS and all(mesh.shape[CONTEXT] == 1 for mesh in meshes):
        return [_problem(config, "model.attention", "another one, or config.mesh.context above 1: it splits sequences")]
    needed = KERNEL_PLATFORMS.get(name, platform)
    return [] if needed == platform else [_problem(config, "model.attention", f"another one on a {platform}")]


def _quantize_problems(config: ConfigDict, mesh: Mesh) -> list[str]:
    """Of formats of the frozen base that there are not, or that the devices lack the arithmetic for."""
    try:
        rollout, train = phase_formats(config)
        for phase, name in (("rollout", rollout), ("train", train)):
            field = f"config.{phase if config[phase].get('quantize', '') else 'model'}.quantize"
            check_format(name, field, mesh.devices.flat[0])
    except UserError as error:
        return [str(error)]
    return []


def check_config(config: ConfigDict, rollout_mesh: Mesh, train_mesh: Mesh, kinds: tuple[str, ...]) -> NFTConfig:
    """The algorithm settings of a usable configuration; ``kinds`` are the editors there are.

    Raises:
        UserError: naming every key that is not usable, its value and what is expected.
    """
    choices = {
        "model.kind": kinds,
        "model.remat": tuple(REMAT_POLICIES),
        "model.attention": ("auto", *BACKENDS, *CONTEXT_BACKENDS),
        "rollout.solver": tuple(SOLVERS),
        "evaluation.solver": tuple(SOLVERS),
        "data.crop": ("center", "buckets"),
    }
    problems = [
        _problem(config, key, f"one of {sorted(allowed)}")
        for key, allowed in choices.items()
        if value_of(config, key) not in allowed
    ]
    for key, low in WHOLE.items():
        value = value_of(config, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            problems.append(_problem(config, key, f"a whole number, at least {low}"))
    for key, (low, high, closed) in NUMBERS.items():
        value = value_of(config, key)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not (low <= value <= high) or (value == low and not closed):
            problems.append(_problem(config, key, f"a number {'from' if closed else 'above'} {low:g} to {high:g}"))
    problems += [
        _problem(config, key, "true or false") for key in BOOLEANS if not isinstance(value_of(config, key), bool)
    ]
    problems += _model_problems(config.model) + _mesh_problems(config, rollout_mesh, train_mesh)
    problems += _quantize_problems(config, rollout_mesh)
    if problems:
        raise UserError("\n".join(problems))
    if config.train.get("adapters", "replicated") not in ADAPTERS:
        problems.append(_problem(config, "train.adapters", f"one of {list(ADAPTERS)}"))
    samples = config.rollout.groups * config.rollout.group_size
    if samples % config.rollout.batch_size:
        problems.append(
            _problem(
                config, "rollout.batch_size", f"a divisor of the {samples} samples of a step (groups x group_size)"
            )
        )
    problems += [
        _problem(
            config, key, f"a multiple of the {sample_shards(mesh)} shares (data x fsdp) that samples are split into"
        )
        for key, mesh in (
            ("rollout.batch_size", rollout_mesh),
            ("train.micro_batch", train_mesh),
            ("evaluation.batch_size", rollout_mesh),
        )
        if value_of(config, key) % sample_shards(mesh)
    ]
    if problems:
        raise UserError("\n".join(problems))
    algorithm = NFTConfig.from_dict(config.algorithm.to_dict())
    weighted_rewards(algorithm)
    return algorithm
