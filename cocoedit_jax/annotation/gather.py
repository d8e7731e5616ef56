"""From finished shards to the data set: the filter, the output files, the pictures, and the sum that must come out."""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cocoedit_jax.annotation.filter import choose
from cocoedit_jax.annotation.record import DEAD, REJECTED, SCORES, Annotation, to_line
from cocoedit_jax.annotation.settings import Settings
from cocoedit_jax.annotation.stages import STAGES, final_prompt, read_fingerprint
from cocoedit_jax.annotation.store import ASIDE, IMAGES, Store, file_stem, items_hash
from cocoedit_jax.data.duplicates import find_duplicates, same_picture
from cocoedit_jax.data.prepare import place_file
from cocoedit_jax.data.records import METADATA
from cocoedit_jax.errors import UserError
from cocoedit_jax.reporting.telemetry import progress


@dataclass(frozen=True)
class Outcome:
    """How many went where. by_reason: of the rejected and the dead."""

    kept: int
    rejected: int
    dead: int
    by_reason: dict[str, int]

    def text(self) -> str:
        total = self.kept + self.rejected + self.dead
        lines = [f"{total} in = {self.kept} kept + {self.rejected} rejected + {self.dead} dead"]
        return "\n".join(lines + [f"  {count:>8} {reason}" for reason, count in self.by_reason.items()])


def unfinished(store: Store) -> Counter[str]:
    """How many annotations wait for each stage, over all shards."""
    waiting: Counter[str] = Counter()
    for number in range(store.count):
        for annotation in store.read(number):
            if annotation.status == "pending" and annotation.stage != STAGES[-1]:
                waiting[STAGES[STAGES.index(annotation.stage) + 1 if annotation.stage else 0]] += 1
    return waiting


def gather(store: Store, settings: Settings) -> Outcome:
    """Writes metadata.jsonl, rejected.jsonl, dead.jsonl, scores.jsonl and images/ from shards that are all done.

    metadata.jsonl comes last: with it, the data set is whole. May be called again with another filter.

    Raises:
        UserError: a picture that cannot be copied.
    """
    with store.alone():  # the last two of a job array may both come here
        return _gather(store, settings)


def _gather(store: Store, settings: Settings) -> Outcome:
    names = {"kept": METADATA, "rejected": REJECTED, "dead": DEAD, "scores": SCORES}
    drafts = {kind: store.root / f".{name}.{os.getpid()}.tmp" for kind, name in names.items()}
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    images: set[str] = set()
    sources: dict[str, Path] = {}
    repeats = _find_repeats(store, settings)
    with ExitStack() as stack:
        files = {kind: stack.enter_context(path.open("w", encoding="utf-8")) for kind, path in drafts.items()}
        for number in progress(range(store.count), desc="  gather", unit="shard"):
            for annotation in store.read(number):
                chosen = choose(annotation, settings.filter)
                if annotation.item.id in repeats.of:
                    chosen = chosen.rejected("duplicate", f"of {repeats.of[annotation.item.id]}")
                if chosen.status == "pending":
                    raise RuntimeError(f"{chosen.item.id}: not done, after {chosen.stage!r}")
                counts[chosen.status] += 1
                sources[_image_name(annotation)] = Path(annotation.item.image)
                files["scores"].write(to_line(chosen))
                if chosen.status == "kept":
                    image = _place_image(store, chosen, settings)
                    images.add(image)
                    row = _metadata(store, chosen, image)
                    if annotation.item.id in repeats.looks:
                        row.setdefault("source_group", repeats.looks[annotation.item.id])
                    files["kept"].write(json.dumps(row, ensure_ascii=False) + "\n")
                else:
                    reasons[f"{chosen.status}: {chosen.reason}"] += 1
                    files[chosen.status].write(to_line(chosen))
        for file in files.values():
            _sync(file)
    for kind in ("scores", "rejected", "dead", "kept"):
        drafts[kind].replace(store.root / names[kind])
    for path in (store.root / IMAGES).iterdir():
        name = f"{IMAGES}/{path.name}"
        if name not in images and not path.name.endswith(".tmp"):  # those are for sweep()
            _take_out(path, sources.get(name), store.root / ASIDE / path.name)
    check_sum(store)
    outcome = Outcome(counts["kept"], counts["rejected"], counts["dead"], dict(reasons.most_common()))
    store.seal({"kept": outcome.kept, "rejected": outcome.rejected, "dead": outcome.dead, "reasons": outcome.by_reason})
    store.sweep()
    return outcome


@dataclass(frozen=True)
class _Repeats:
    """of: id of a duplicate -> id of what it repeats. looks: id -> hash of the first picture that looks like its own
    but is another file; training must not hold one of them out and learn from the other.
    """

    of: dict[str, str]
    looks: dict[str, str]


def _find_repeats(store: Store, settings: Settings) -> _Repeats:
    """Among what the filter keeps, the best-scored of each picture and instruction stays."""
    mode = settings.filter.duplicates
    ids, prompts, prints, quality = [], [], [], []
    for number in range(store.count):
        for annotation in store.read(number):
            chosen = choose(annotation, settings.filter)
            if chosen.status == "kept":
                ids.append(chosen.item.id)
                prompts.append(chosen.item.prompt)
                prints.append(read_fingerprint(chosen.attributes["fingerprint"]))
                quality.append(sum(score or 0.0 for score in chosen.scores.values()))
    if not ids:
        return _Repeats({}, {})
    bits, colour = None if mode == "exact" else settings.filter.near_bits, settings.filter.near_colour
    found = [] if mode == "keep" else find_duplicates(
        prints, prompts, threshold=bits, max_colour=colour, quality=quality
    )  # fmt: skip
    first = same_picture(prints, bits, colour)
    several = {root for index, root in enumerate(first) if prints[index].sha256 != prints[root].sha256}
    looks = {ids[i]: prints[root].sha256 for i, root in enumerate(first) if root in several}
    return _Repeats({ids[repeat.index]: ids[repeat.of] for repeat in found}, looks)


def check_sum(store: Store) -> None:
    """Every input is in exactly one of the output files. Raises RuntimeError otherwise."""
    items = [annotation.item for number in range(store.count) for annotation in store.read(number)]
    # What was given, as the manifest knows it: shards may agree with the output and both be wrong.
    if store.manifest.get("items") not in (None, items_hash(items)):  # None: laid out before the hash was kept
        raise RuntimeError(f"{store.root}: the shards hold other records than the input")
    expected = Counter(item.id for item in items)
    found = Counter(name for file in (METADATA, REJECTED, DEAD) for name in _ids(store.root / file))
    if sum(expected.values()) != store.total or expected != found:
        lost, extra = expected - found, found - expected
        raise RuntimeError(
            f"{store.root}: {store.total} in, {sum(found.values())} out; lost {sorted(lost)[:5]}, extra"
            f" {sorted(extra)[:5]}"
        )


def _ids(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["id"]


def _metadata(store: Store, annotation: Annotation, image: str) -> dict[str, Any]:
    """A line of metadata.jsonl. Further fields of the input stay, under their own names where these are free."""
    # The plan of the run, which --refilter's own settings may differ from: only what was scored is published.
    item, plan = annotation.item, store.manifest["plan"]
    said = {name: annotation.attributes.get(name) for name in ("target", "location", "attributes")}
    own = {
        "id": item.id,
        "prompt": final_prompt(annotation, plan["rewrite"]["use"]),
        "image": image,
        "mask": annotation.mask_file,
        "mask_semantics": "keep",
        "edit_type": item.edit_type,
        "original_prompt": item.prompt,
        "source": item.source,
        "original_image": item.image,
        "box": annotation.box,
        "mask_area": annotation.mask_area,
        "scores": annotation.scores,
        **{name: value for name, value in said.items() if value},
        "annotated_by": plan["models"]["name"],
    }
    return {**{k: v for k, v in item.extra.items() if k not in own}, **own}


def _image_name(annotation: Annotation) -> str:
    """Where the picture of a kept annotation lies in the data set."""
    image = annotation.item.image
    return f"{IMAGES}/{file_stem(image)}{Path(image).suffix.lower()}"


def _take_out(path: Path, source: Path | None, aside: Path) -> None:
    """Removes a picture that the present filter does not keep. Another one may: unless the original is still there as
    it was, this is the last copy, and goes to `aside`.
    """
    try:
        spare = source is not None and (source.samefile(path) or filecmp.cmp(source, path, shallow=False))
    except OSError:  # the original is gone, or cannot be read
        spare = False
    if spare:
        path.unlink()
    else:
        aside.parent.mkdir(exist_ok=True)
        path.replace(aside)


def _place_image(store: Store, annotation: Annotation, settings: Settings) -> str:
    source = Path(annotation.item.image)
    name = _image_name(annotation)
    target = store.root / name
    aside = store.root / ASIDE / target.name
    seen = read_fingerprint(annotation.attributes["fingerprint"]).sha256
    try:
        if not target.exists() and aside.exists():
            aside.replace(target)
        if target.exists() and (
            not source.exists()
            or target.stat().st_size == source.stat().st_size
            or hashlib.sha256(target.read_bytes()).hexdigest() == seen  # the original has changed since
        ):
            return name
        draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        draft.unlink(missing_ok=True)
        if settings.engine.images == "hardlink":
            target.unlink(missing_ok=True)
            place_file(source, target)
            return name
        shutil.copyfile(source, draft)
        draft.replace(target)
    except OSError as error:
        raise UserError(f"{source}: cannot be put into {store.root / IMAGES}: {error}") from error
    return name


def _sync(file: IO[str]) -> None:
    file.flush()
    os.fsync(file.fileno())
