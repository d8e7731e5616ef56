"""What a run holds on one device while it samples or trains: what its program takes, and what lies beside it."""

import math
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AbstractMesh

from cocoedit_jax.models.editor import Editor
from cocoedit_jax.models.quantize import same_storage
from cocoedit_jax.planning.workload import Candidate, Workload
from cocoedit_jax.sharding.mesh import AXES
from cocoedit_jax.sharding.rules import partition_spec
from cocoedit_jax.train.plan import abstract_state, prepared
from cocoedit_jax.train.step import TrainState

_ENCODING = ("encoder", "quant_conv")  # of an autoencoder; sampling only decodes

_traced: dict[Any, Any] = {}


def planned_editor(workload: Workload, candidate: Candidate, phase: str) -> Editor:
    """The editor of the phase as it is trained: in its format, without what precomputed modulation leaves out."""
    editor = workload.editor(candidate.remat, "xla", candidate.quantize_in(phase))
    return prepared(editor, workload.shape(candidate))[0]


def _shape_key(editor: Any) -> tuple[Any, ...]:
    """All that the shapes of an editor's parameters depend on."""
    transformer, sigmas = editor.transformer, getattr(editor, "modulation_sigmas", None)
    return repr(transformer.config), str(transformer.dtype), repr(editor.autoencoder), editor.quantize, sigmas


def abstract_of(editor: Editor) -> Any:
    """``editor.abstract()``, traced once for each kind of editor: tracing a whole model takes seconds."""
    key = _shape_key(editor)
    if key not in _traced:
        _traced[key] = editor.abstract()
    return _traced[key]


def _state_of(workload: Workload, editor: Editor, candidate: Candidate) -> TrainState:
    """Shapes and placement of the training state, traced once as by ``abstract_of``."""
    mesh: Any = _mesh(candidate)
    sharded = candidate.adapters == "sharded"
    key = ("state", *_shape_key(editor), workload.lora, workload.algorithm.ema_decay > 0, mesh, sharded)
    if key not in _traced:
        params = nn.unbox(abstract_of(editor))
        _traced[key] = abstract_state(params, workload.algorithm, workload.lora, mesh, sharded=sharded)
    return _traced[key]


def _bytes(x: Any) -> int:
    return x.size * x.dtype.itemsize


def weights(abstract: Any, candidate: Candidate) -> tuple[float, float]:
    """Bytes of boxed parameters in all, and on one device by the rule table."""
    mesh: Any = _mesh(candidate)
    whole = local = 0.0
    for leaf in jax.tree.leaves(abstract, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
        names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else (None,) * leaf.ndim
        value = leaf.value if isinstance(leaf, nn.LogicallyPartitioned) else leaf
        axes = [axis for axis in partition_spec(names, value.shape, mesh) if axis]
        whole, local = whole + _bytes(value), local + _bytes(value) / math.prod(mesh.shape[axis] for axis in axes)
    return whole, local


def _mesh(candidate: Candidate) -> AbstractMesh:
    sizes = dict(candidate.sizes)
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)


def adapter_bytes(workload: Workload, editor: Editor, candidate: Candidate) -> float:
    """Of one copy of the adapters, whole."""
    return float(sum(_bytes(x) for x in jax.tree.leaves(_state_of(workload, editor, candidate).theta)))


def _state_bytes(workload: Workload, editor: Editor, candidate: Candidate) -> float:
    """Of the training state on one device: trained and old adapters, their average, two moments."""
    state: list[Any] = jax.tree.leaves(_state_of(workload, editor, candidate))
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in state))


def held(workload: Workload, candidate: Candidate, phase: str) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes on one device while ``phase`` is run, by name: what its program uses of its arguments, and what the run
    (``train.trainer``) holds beside them.

    - ``base``: of this phase; ``other base`` that of the other phase, where it stores other numbers.
    - ``adapters``: the training state; ``sampling adapter``: the copy that samples, folded and whole.
    - ``decoder``, ``encoders``: of the autoencoder and the text side, in neither program where they are not used.
    - ``samples``: conditioning, latents and pictures: of the program's samples, or of the step's beside it. Every
      record's conditioning stays whole on every device until the step ends, that of a batch until it is sampled;
      latents and pictures stay in shares until all are drawn.
    """
    editor, config = planned_editor(workload, candidate, phase), workload.config
    abstract = abstract_of(editor)
    local = lambda tree: weights(tree, candidate)[1]  # noqa: E731
    vae = abstract["autoencoder"]
    encoding = {name: vae[name] for name in _ENCODING if name in vae}
    decoder = local({name: tree for name, tree in vae.items() if name not in encoding})
    encoders = local(encoding) + local(abstract["text"])
    state = _state_bytes(workload, planned_editor(workload, candidate, "train"), candidate)
    size, grid = config.data.resolution, editor.grid(config.data.resolution, config.data.resolution)
    latent, record = 4.0 * grid.tokens * editor.token_channels, _conditioning_bytes(workload, editor)
    step_records = config.rollout.groups * record

    beside = {}
    other = "train" if phase == "rollout" else "rollout"
    if not same_storage(candidate.quantize_in(other), candidate.quantize_in(phase)):
        beside["other base"] = local(abstract_of(planned_editor(workload, candidate, other))["transformer"])
    arguments = {"base": local(editor.network(abstract))}
    if phase == "rollout":
        arguments |= {"decoder": decoder, "sampling adapter": adapter_bytes(workload, editor, candidate)}
        arguments["samples"] = candidate.per_shard * record
        devices = math.prod(dict(candidate.sizes).values())
        drawn = workload.samples * (latent / candidate.shards + 12.0 * size**2 / devices)  # RGB, float32
        batch = (candidate.batch - candidate.per_shard) * record  # of other devices' samples
        beside |= {"adapters": state, "encoders": encoders, "samples": step_records + batch + drawn}
    else:
        micro_batches = math.ceil(workload.samples / candidate.batch)
        rows = 4.0 * grid.height * grid.width + 4.0 * grid.tokens * 2  # mask; r and weight of tokens
        arguments |= {"adapters": state, "samples": micro_batches * candidate.per_shard * (record + latent + rows)}
        beside |= {"encoders": encoders + decoder, "samples": step_records}
    return arguments, beside


def with_beside(
    found: dict[str, Any], workload: Workload, candidate: Candidate, phase: str, available: float | None
) -> dict[str, Any]:
    """``found`` of a phase's program, with what the run holds beside it counted in ``need`` and ``memory``, told as
    ``held_beside``; ``over`` where that is more than is ``available`` (None: not known)."""
    parts = held(workload, candidate, phase)[1]
    beside = sum(parts.values())
    out = {**found, "held_beside": parts}
    if "memory" in out:
        out["memory"] = {**out["memory"], "beside": beside, "total": out["memory"]["total"] + beside}
    if out.get("need") is not None:
        out["need"] += beside
        if available is not None:
            out["fits"] = out["fits"] and out["need"] <= available
            if not out["fits"]:
                out["over"] = max(0.0, out["need"] - available)
    return out


def _conditioning_bytes(workload: Workload, editor: Editor) -> float:
    """Of one sample: packed source, text states and what goes with them."""
    size, model = workload.config.data.resolution, editor.transformer.config
    width = jax.numpy.dtype(editor.transformer.dtype).itemsize
    text = width * (workload.text_tokens() * model.joint_attention_dim + (model.pooled_features or 0))
    return 4.0 * editor.grid(size, size).tokens * editor.token_channels + text
