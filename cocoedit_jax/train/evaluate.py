"""Held-out evaluation: the same records, noise and sampler for every policy, so that differences are paired."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cocoedit_jax.data.scene_judge import judge_batch
from cocoedit_jax.data.scene_spec import SceneSpec
from cocoedit_jax.reporting.pictures import sample_grid
from cocoedit_jax.rewards.judge import Judge, JudgeRequest, judge_scores
from cocoedit_jax.rewards.pixel import masked_psnr, masked_ssim
from cocoedit_jax.sharding import processes
from cocoedit_jax.sharding.mesh import replicated
from cocoedit_jax.sharding.shares import divide, local_rows
from cocoedit_jax.train.loading import load_shares
from cocoedit_jax.train.rollout import make_encoder, make_sampler, sample_keys
from cocoedit_jax.train.setup import Setup

METRICS = ("judge", "psnr_outside", "ssim_outside", "change_inside", "no_edit")
# Without a scene description, an edit that changes its region by less than this (mean absolute, of 1) is no edit.
NO_EDIT_CHANGE = 0.02
_NOISE_SEED = 1234567


@dataclass
class Evaluation:
    """Per-record metrics, each ``[N]`` (NaN where unknown), and the edited images with what they came from.

    Of several processes, each has the images and records that it judged, and the metrics of all.
    """

    metrics: dict[str, np.ndarray]
    images: list[np.ndarray]  # edited [H, W, 3], in the order of the records
    records: list[dict[str, Any]]
    index: np.ndarray | None = None  # of those among all [n]; None: the first ones

    @property
    def count(self) -> int:
        """Records evaluated."""
        return len(self.metrics["judge"])

    @property
    def to_json(self) -> dict[str, list[float]]:
        """The metrics as plain lists."""
        return {name: [float(v) for v in values] for name, values in self.metrics.items()}

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean and standard error of every metric."""
        return {name: mean_se(values) for name, values in self.metrics.items()}

    def difference(self, base: "Evaluation") -> dict[str, dict[str, float]]:
        """Mean and standard error of the paired difference to ``base``."""
        return {name: mean_se(values - base.metrics[name]) for name, values in self.metrics.items()}


def mean_se(values: np.ndarray) -> dict[str, float]:
    """Mean and standard error over the known values."""
    known = values[np.isfinite(values)]
    if not len(known):
        return {"mean": float("nan"), "se": float("nan")}
    se = float(known.std(ddof=1) / np.sqrt(len(known))) if len(known) > 1 else float("nan")
    return {"mean": float(known.mean()), "se": se}


class Evaluator:
    """Edits the first ``limit`` held-out records with any adapter."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self._samplers: dict[int, Any] = {}
        self._encode = make_encoder(setup.editor, setup.rollout_mesh)

    def _sampler(self, bucket: int) -> Any:
        if bucket not in self._samplers:
            setup, options = self._setup, self._setup.config.evaluation
            grid = setup.editor.grid(*setup.framing.sizes[bucket])
            sigmas = setup.editor.sigmas(options.steps, grid)
            self._samplers[bucket] = make_sampler(setup.editor, grid, sigmas, options.solver, setup.rollout_mesh)
        return self._samplers[bucket]

    def __call__(self, adapter: Any, limit: int, progress: Callable[[int], object] = lambda n: None) -> Evaluation:
        """``adapter`` has its scale folded in, or is None for the base model."""
        setup, size = self._setup, self._setup.config.evaluation.batch_size
        adapter = None if adapter is None else jax.device_put(adapter, replicated(setup.rollout_mesh))
        chosen = range(min(limit, len(setup.held_out_records)))
        by_bucket: dict[int, list[int]] = {}
        for index in chosen:
            by_bucket.setdefault(setup.held_out_records[index].bucket, []).append(index)
        metrics = {name: np.full(len(chosen), np.nan) for name in METRICS}
        shown: dict[int, tuple[np.ndarray, dict[str, Any]]] = {}
        for bucket, indices in by_bucket.items():
            for start in range(0, len(indices), size):
                part = indices[start : start + size]
                # A short last batch repeats its last record, so that every batch has one shape.
                padded = part + [part[-1]] * (size - len(part))
                measured, own = self._batch(adapter, bucket, padded, len(part))
                for name, values in measured.items():
                    metrics[name][part] = values
                shown |= own
                progress(len(part))
        order = sorted(shown)
        images, records = [shown[i][0] for i in order], [shown[i][1] for i in order]
        return Evaluation(metrics, images, records, np.asarray(order, np.int64))

    def _batch(
        self, adapter: Any, bucket: int, indices: Sequence[int], count: int
    ) -> tuple[dict[str, np.ndarray], dict[int, tuple[np.ndarray, dict[str, Any]]]]:
        """Metrics of the first ``count`` of ``indices``; image and record of those that this process judged."""
        setup = self._setup
        shares = divide(np.arange(len(indices)), len(indices), setup.rollout_mesh)
        _, loaded, text = load_shares(setup.editor, setup.held_out, setup.held_out_records, indices, shares)
        params = setup.base.on(setup.rollout_mesh)
        conditioning = self._encode(params, shares, loaded["image"], text)
        keys = sample_keys(jax.random.key(_NOISE_SEED), np.asarray(indices))
        _, images = self._sampler(bucket)(params, adapter, conditioning, keys)
        own = shares.judged(0)
        edited = np.asarray(local_rows(images, own))
        rows = np.searchsorted(shares.groups, own)
        batch = {k: v[rows] if isinstance(v, np.ndarray) else [v[r] for r in rows] for k, v in loaded.items()}

        def results() -> dict[str, Any]:
            found = measure(edited, batch, setup.judge) if len(own) else {}
            return {"rows": own.tolist()} | {name: values.tolist() for name, values in found.items()}

        parts = [part for part in processes.gather("evaluate", results) if part["rows"]]
        order = np.argsort(np.concatenate([part["rows"] for part in parts]))
        metrics = {k: np.concatenate([np.asarray(part[k], np.float64) for part in parts])[order] for k in METRICS}
        fields = ("image", "edit_mask", "prompt", "id", "edit_type", "extra")
        shown = {
            indices[row]: (edited[i], {k: batch[k][i] for k in fields}) for i, row in enumerate(own) if row < count
        }
        return {name: values[:count] for name, values in metrics.items()}, shown


def measure(edited: np.ndarray, batch: dict[str, Any], judge: Judge) -> dict[str, np.ndarray]:
    """``METRICS`` of edits ``[B, H, W, 3]`` of the records in ``batch``, each ``[B]``."""
    source, mask = batch["image"], batch["edit_mask"]
    requests = [
        JudgeRequest(*fields)
        for fields in zip(source, edited, batch["prompt"], batch["id"], batch["extra"], strict=True)
    ]
    scores, _ = judge_scores(judge, requests)
    pixels = jnp.asarray(edited), jnp.asarray(source), jnp.asarray(1 - mask)
    change = (np.abs(edited - source).mean(-1) * mask).sum((1, 2)) / np.maximum(mask.sum((1, 2)), 1)
    return {
        "judge": scores,
        "psnr_outside": np.asarray(masked_psnr(*pixels)),
        "ssim_outside": np.asarray(masked_ssim(*pixels)),
        "change_inside": change,
        "no_edit": _no_edit(batch["extra"], edited, change),
    }


def paste_source(evaluation: Evaluation, judge: Judge) -> Evaluation:
    """The same edits with the source pasted back outside the edit mask: what a user with a perfect mask could do."""
    metrics: dict[str, list[float]] = {name: [] for name in METRICS}
    images = []
    for edited, record in zip(evaluation.images, evaluation.records, strict=True):
        mask = record["edit_mask"][..., None]
        pasted = mask * edited + (1 - mask) * record["image"]
        batch = {k: v[None] if isinstance(v, np.ndarray) else [v] for k, v in record.items()}
        for name, value in measure(pasted[None], batch, judge).items():
            metrics[name].append(float(value[0]))
        images.append(pasted)
    return Evaluation({k: np.asarray(v) for k, v in metrics.items()}, images, evaluation.records, evaluation.index)


def _no_edit(extra: list[dict[str, Any]], edited: np.ndarray, change: np.ndarray) -> np.ndarray:
    """1 where the instruction was ignored: by the scene's own measure, or by the change inside the mask."""
    if all("scene" in fields for fields in extra):
        return judge_batch([SceneSpec.from_json(fields["scene"]) for fields in extra], edited).no_edit.astype(float)
    return (change < NO_EDIT_CHANGE).astype(float)


def before_after(base: Evaluation, trained: Evaluation, rows: int = 8) -> np.ndarray:
    """Source, base and trained edits of the first held-out records, with judge score and PSNR under each; of those
    whose images are here."""
    count = min(rows, len(base.records))
    index = range(len(base.records)) if base.index is None else base.index
    shape = base.images[0].shape
    chosen = [i for i in range(len(base.records)) if base.images[i].shape == shape][:count]
    columns = [
        ("source", np.stack([base.records[i]["image"] for i in chosen])),
        ("base", np.stack([base.images[i] for i in chosen])),
        ("trained", np.stack([trained.images[i] for i in chosen])),
    ]

    def note(e: Evaluation, i: int) -> str:
        return f"judge {e.metrics['judge'][index[i]]:.2f}, {e.metrics['psnr_outside'][index[i]]:.1f} dB"

    notes = [None, [note(base, i) for i in chosen], [note(trained, i) for i in chosen]]
    masks = np.stack([base.records[i]["edit_mask"] for i in chosen])
    return sample_grid(columns, masks=masks, instructions=[base.records[i]["prompt"] for i in chosen], notes=notes)
