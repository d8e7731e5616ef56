"""The prepare_data command and the folders it writes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cocoedit_jax.data import prepare, scenes
from cocoedit_jax.data.images import Framing
from cocoedit_jax.data.records import read_records
from cocoedit_jax.data.source import record_dataset
from cocoedit_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "launch.prepare_data", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_written_records_are_the_scenes(tmp_path):
    out = prepare.write_scenes(tmp_path / "deep" / "data", 9, size=32, seed=4)
    found = read_records(out, Framing(32))
    assert len({record.id for record in found.records}) == 9
    dataset = record_dataset(found.records, found.framing)
    for number, record in enumerate(found.records):
        spec = scenes.SceneSpec.from_json(record.extra["scene"])
        source, _, edit_mask = scenes.render(spec, 32)
        item = dataset[number]
        assert item is not None
        np.testing.assert_allclose(item["image"], source, atol=0.5 / 255 + 1e-6)
        np.testing.assert_array_equal(item["edit_mask"], edit_mask)
        assert (record.prompt, record.edit_type) == (spec.instruction, spec.operation)
    again = prepare.write_scenes(tmp_path / "again", 9, size=32, seed=4)
    for name in ("metadata.jsonl", "images/000003.png", "masks/000008.png"):
        assert (out / name).read_bytes() == (again / name).read_bytes()


def test_operations_and_size_are_checked(tmp_path):
    out = prepare.write_scenes(tmp_path / "a", 5, operations=["remove"])
    assert {json.loads(line)["edit_type"] for line in (out / "metadata.jsonl").read_text().splitlines()} == {"remove"}
    with pytest.raises(UserError, match="operations: unknown rotate"):
        prepare.write_scenes(tmp_path / "b", 5, operations=["rotate"])
    with pytest.raises(UserError, match="size: 47 px"):
        prepare.write_scenes(tmp_path / "b", 5, size=47)


def test_existing_folders(tmp_path):
    out = tmp_path / "data"
    out.mkdir()
    prepare.write_scenes(out, 4)  # an empty folder is no obstacle
    with pytest.raises(UserError, match="not empty; give another name, or --overwrite"):
        prepare.write_scenes(out, 2)
    prepare.write_scenes(out, 2, overwrite=True)
    assert len((out / "metadata.jsonl").read_text().splitlines()) == len(list((out / "masks").iterdir())) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]
    (out / "text_cache").mkdir()
    with pytest.raises(UserError, match="its text_cache/ is costly to make; move or delete that first"):
        prepare.write_scenes(out, 2, overwrite=True)
    assert len(read_records(out, Framing(48)).records) == 2


@pytest.mark.parametrize("entries", [["thesis.txt"], ["metadata.jsonl", "thesis.txt"], ["images"]])
def test_overwrite_never_deletes_foreign_files(tmp_path, entries):
    out = tmp_path / "data"
    out.mkdir()
    for name in entries:
        (out / name).write_text("precious")
    with pytest.raises(UserError, match="will not be replaced"):
        prepare.write_scenes(out, 2, overwrite=True)
    assert sorted(entry.name for entry in out.iterdir()) == sorted(entries)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not a folder"):
        prepare.write_scenes(tmp_path / "file", 2, overwrite=True)


def test_all_or_nothing(tmp_path):
    old = prepare.write_scenes(tmp_path / "data", 2)

    def breaks_off(folder):
        (folder / "metadata.jsonl").write_text("half")
        raise OSError("disk full")

    with pytest.raises(UserError, match="cannot be written: disk full"):
        prepare.write_folder(old, breaks_off, overwrite=True)
    assert len(read_records(old, Framing(48)).records) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]


def test_command(tmp_path):
    out = str(tmp_path / "data")
    made = command(f"--out={out}", "--source=scenes", "--num=3", "--size=32")
    assert made.returncode == 0 and "3 records of 32x32 px" in made.stdout, made.stderr
    checked = command(f"--check={out}", "--resolution=32", "--crop=buckets")
    assert checked.returncode == 0 and "all 3 records are usable" in checked.stdout and "32x32 px: 3" in checked.stdout
    refused = command(f"--out={out}")
    assert refused.returncode == 1 and "error: " in refused.stderr and "Traceback" not in refused.stderr
    with (tmp_path / "data" / "metadata.jsonl").open("a") as file:
        file.write("{}\n")
    checked = command(f"--check={out}")
    assert checked.returncode == 1 and "      4  missing field  prompt, image, mask\n" in checked.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--encode=flux", "--out=x"], "--encode needs --model=MODEL_DIR"),
        (["--encode=flux", "--model=m"], "give --out=DIR (what to write), or --check=DIR"),
        (["--source=omniedit", "--out=x"], "--source=omniedit needs --from=FOLDER"),
        (["--from=x", "--out=x"], "--from: name what it holds with --source=cocoedit-40k"),
        (["--pack=x", "--check=x", "--out=x"], "--check and --pack: one at a time"),
        (["--dedupe=x", "--out=y", "--rows=3"], "--rows: not used with --dedupe"),
        (
            ["--encode=flux", "--model=m", "--out=x", "--num=3", "--crop=buckets"],
            "--crop, --num: not used with --encode",
        ),
        (["--check=x", "--model=m"], "--model: not used with --check"),
        (["--out=x", "--max_length=512", "--dtype=auto"], "--max_length, --dtype: not used with making data"),
    ],
)
def test_usage(arguments, message):
    refused = command(*arguments)
    assert refused.returncode == 1 and message in refused.stderr and "Traceback" not in refused.stderr
