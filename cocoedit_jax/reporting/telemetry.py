"""What a run tells about itself while it goes: metrics.jsonl, TensorBoard, sample pictures, phase times, progress."""

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter
from tqdm import tqdm

from cocoedit_jax.errors import UserError

METRICS_FILE = "metrics.jsonl"
# JSON has no such numbers; they are written as these strings, so that a broken step is seen and not read as a gap.
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode_number(value: float) -> float | str:
    """A number as strict JSON holds it: itself, or one of the strings "nan", "inf" and "-inf"."""
    value = float(value)
    return value if math.isfinite(value) else str(value)


def decode_number(value: Any) -> Any:
    """Inverse of ``encode_number``; other values pass unchanged."""
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def write_json(path: Path, value: Any) -> None:
    """Writes strict JSON, whole or not at all; numbers that are not finite become strings (``encode_number``)."""

    def encode(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: encode(item) for key, item in node.items()}
        if isinstance(node, list):
            return [encode(item) for item in node]
        return encode_number(node) if isinstance(node, float) else node

    write_text(path, json.dumps(encode(value), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes ``path``, whole or not at all."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``{dotted key: value}``."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        out |= dotted(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return out


def read_metrics(run_dir: str | Path) -> list[dict[str, float]]:
    """The lines of RUN/metrics.jsonl in order, lines of one step merged; empty when there is no file.

    A last line cut off by a killed process is left out.

    Raises:
        UserError: naming file and line, for any other line that is not a JSON object with a whole number ``step``.
    """
    path = Path(run_dir) / METRICS_FILE
    merged: dict[int, dict[str, float]] = {}
    for line in _complete_lines(path):
        row = {name: decode_number(value) for name, value in line.items()}
        merged.setdefault(line["step"], {}).update(row)
    return [merged[step] for step in sorted(merged)]


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    *lines, _torn = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{path} line {number}: {line[:80]!r}; expected a JSON object with a whole number 'step'")
        rows.append(row)
    return rows


class Telemetry:
    """Writes a run's metrics and pictures; a context manager.

    Args:
        run_dir: the run's folder.
        active: False in all but one of the processes of a run: nothing is written then.
    """

    def __init__(self, run_dir: str | Path, active: bool = True):
        self.active = active
        self._run = Path(run_dir)
        self._file: IO[str] | None = None
        self._board: SummaryWriter | None = None
        self._purge: int | None = None

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def log(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Appends one line ``{"step": step, name: number, ...}`` and the same numbers to TensorBoard.

        Raises:
            UserError: for a value that is no number.
        """
        if not self.active:
            return
        row: dict[str, Any] = {"step": int(step)}
        for name, value in scalars.items():
            try:
                row[name] = encode_number(value)
            except (TypeError, ValueError) as fault:
                raise UserError(f"metric {name!r} is {value!r} at step {step}; expected a number") from fault
        file = self._metrics()
        # One write of one whole line: a killed process leaves at most a torn last line.
        file.write(json.dumps(row, allow_nan=False) + "\n")
        file.flush()
        board = self._tensorboard()
        for name, value in row.items():
            if name != "step":
                board.add_scalar(name, decode_number(value), int(step))

    def image(self, step: int, tag: str, image: np.ndarray) -> None:
        """Writes ``image`` ``[H, W, 3]`` (float in [0, 1], or uint8) to RUN/samples/TAG_STEP.png and TensorBoard."""
        if not self.active:
            return
        pixels = np.asarray(image)
        if pixels.ndim != 3 or pixels.shape[2] != 3:
            raise UserError(f"image {tag!r} has shape {pixels.shape}; expected [height, width, 3]")
        if pixels.dtype != np.uint8:
            pixels = np.rint(np.clip(np.nan_to_num(pixels.astype(np.float32)), 0, 1) * 255).astype(np.uint8)
        folder = self._run / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{tag.replace('/', '_')}_{step:06d}.png")
        self._tensorboard().add_image(tag, pixels, int(step), dataformats="HWC")

    def truncate(self, step: int) -> None:
        """Forgets what lies after ``step``: a resumed run writes it again. Call it before anything is logged."""
        if self._file is not None or self._board is not None:
            raise UserError("telemetry: truncate was called after log or image; expected before")
        if not self.active:
            return
        path = self._run / METRICS_FILE
        if path.exists():
            kept = [row for row in _complete_lines(path) if row["step"] <= step]
            draft = path.with_suffix(".draft")
            draft.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))
            os.replace(draft, path)
        for picture in (self._run / "samples").glob("*.png"):
            match = re.fullmatch(r".+_(\d{6,})\.png", picture.name)
            if match and int(match[1]) > step:
                picture.unlink()
        self._purge = step + 1  # TensorBoard hides older events from this step on

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._board is not None:
            self._board.close()
            self._board = None

    def _metrics(self) -> IO[str]:
        if self._file is None:
            self._run.mkdir(parents=True, exist_ok=True)
            path = self._run / METRICS_FILE
            if path.exists():  # cut a torn last line, or the next one would be glued to it
                content = path.read_bytes()
                os.truncate(path, content.rfind(b"\n") + 1)
            self._file = path.open("a", encoding="utf-8")
        return self._file

    def _tensorboard(self) -> SummaryWriter:
        if self._board is None:
            self._board = SummaryWriter(str(self._run / "tensorboard"), purge_step=self._purge, flush_secs=10)
        return self._board


class PhaseTimer:
    """Seconds spent in named phases. A phase inside another one counts only for itself, so the sum is real time
    (or whatever ``clock`` reads)."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock or time.perf_counter
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._charge()
        self._open.append(phase)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        now = self._clock()
        if self._open:
            phase = self._open[-1]
            self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._since
        self._since = now

    def pop(self) -> dict[str, float]:
        """``{"seconds/PHASE": seconds}`` since the last call."""
        self._charge()
        seconds, self._seconds = self._seconds, {}
        return {f"seconds/{phase}": value for phase, value in seconds.items()}


class _LogLines(tqdm):
    """A progress bar for log files: now and then a line of its own, with rate and time left."""

    @staticmethod
    def status_printer(file: Any) -> Any:
        last = ""

        def write(text: str) -> None:
            nonlocal last
            if text and text != last:
                last = text
                file.write(text.rstrip() + "\n")
                file.flush()

        return write

    def close(self) -> None:
        if not self.disable:
            self.refresh()
            self.last_print_t = self.start_t - 1  # as if nothing were shown: else tqdm adds a carriage return
        super().close()


def progress(
    work: Iterable[Any] | int,
    desc: str,
    unit: str = "it",
    initial: int = 0,
    *,
    process_index: int = 0,
    file: Any = None,
    every: float = 30.0,
    scale: bool = False,
) -> tqdm:
    """A tqdm bar over an iterable, or over a total to be advanced with ``.update(n)``; silent except on process 0.

    Args:
        initial: units done before this run; they count in the bar and not in the rate.
        file: where to write (standard error).
        every: seconds between lines when ``file`` is no terminal.
        scale: show counts as 1.5k, 2.0M, 3.2G; for bytes.
    """
    file = sys.stderr if file is None else file
    terminal = hasattr(file, "isatty") and file.isatty()
    options: dict[str, Any] = {"desc": desc, "unit": unit, "initial": initial, "file": file, "dynamic_ncols": terminal}
    options |= {"disable": process_index != 0, "unit_scale": scale}
    if isinstance(work, int):
        options["total"] = work
    else:
        options["iterable"] = work
        if initial and hasattr(work, "__len__"):
            options["total"] = initial + len(work)  # pyright: ignore[reportArgumentType]
    if terminal:
        return tqdm(**options)
    layout = "{desc}: {n_fmt}/{total_fmt} [{elapsed} gone, {remaining} left, {rate_fmt}{postfix}]"
    return _LogLines(**options, mininterval=every, maxinterval=every, ascii=True, bar_format=layout)
