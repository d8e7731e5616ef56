"""CoCoEdit-40K as released: cut zips beside metadata.jsonl, unpacked to the folder that training reads."""

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from cocoedit_jax.data import cocoedit40k
from cocoedit_jax.data.cocoedit40k import unpack_cocoedit
from cocoedit_jax.data.images import Framing
from cocoedit_jax.data.records import read_records
from cocoedit_jax.errors import UserError


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def release(tmp_path):
    """Six records; images in two zips, the first in three pieces, under a folder that the metadata do not name."""
    root = tmp_path / "download"
    root.mkdir()
    rng = np.random.default_rng(0)
    mask = np.full((24, 24), 255, np.uint8)
    mask[:8] = 0
    lines = []
    for part in (1, 2):
        images, masks = io.BytesIO(), io.BytesIO()
        with zipfile.ZipFile(images, "w") as image_zip, zipfile.ZipFile(masks, "w") as mask_zip:
            for number in range(3 * part - 3, 3 * part):
                image_zip.writestr(
                    f"images_part{part}/images/{number}.png", png(rng.integers(0, 255, (24, 24, 3), np.uint8))
                )
                mask_zip.writestr(f"{number}.png", png(mask))
                fields = {"prompt": f"edit {number}", "image": f"images/{number}.png", "mask": f"masks/{number}.png"}
                lines.append(json.dumps(fields | {"edit_type": "replace"}))
        data = images.getvalue()
        third = -(-len(data) // 3)
        for count, label in enumerate(("aa", "ab", "ac")):
            (root / f"images_part{part}.zip_{label}").write_bytes(data[count * third : (count + 1) * third])
        (root / f"masks_part{part}.zip").write_bytes(masks.getvalue())
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root


def test_unpacked_folder_is_what_training_reads(release, tmp_path):
    summary = unpack_cocoedit(release, tmp_path / "out")
    assert summary == f"6 records, 12 files in {tmp_path / 'out'}"
    assert (tmp_path / "out/metadata.jsonl").read_bytes() == (release / "metadata.jsonl").read_bytes()
    found = read_records(tmp_path / "out", Framing(16))
    assert [record.prompt for record in found.records] == [f"edit {n}" for n in range(6)]
    assert {record.edit_area for record in found.records} == {5 / 16}  # nearest neighbour of 8 rows of 24
    assert sorted(path.name for path in tmp_path.iterdir()) == ["download", "out"]
    with pytest.raises(UserError, match="not empty; give another name, or --overwrite"):
        unpack_cocoedit(release, tmp_path / "out")
    unpack_cocoedit(release, tmp_path / "out", overwrite=True)


def test_only_a_newline_ends_a_line(release, tmp_path):
    for piece in release.glob("images_part2.zip_*"):
        piece.unlink()
    lines = (release / "metadata.jsonl").read_bytes().splitlines()
    (release / "metadata.jsonl").write_bytes(b"".join(line + b"\r\r\n" for line in lines))
    unpack_cocoedit(release, tmp_path / "out", partial=True)
    found = read_records(tmp_path / "out", Framing(16))
    assert [record.prompt for record in found.records] == [f"edit {n}" for n in range(3)]


def test_it_goes_on_where_it_was_stopped(release, tmp_path, monkeypatch):
    calls = []

    def stops(archive, target, **options):
        if calls:
            raise KeyboardInterrupt
        calls.append(archive.name)
        return cocoedit40k_unpack(archive, target, **options)

    cocoedit40k_unpack = cocoedit40k.unpack
    with monkeypatch.context() as patch:
        patch.setattr(cocoedit40k, "unpack", stops)
        with pytest.raises(KeyboardInterrupt):
            unpack_cocoedit(release, tmp_path / "out")
    kept = tmp_path / ".out.partial"
    assert len(list(kept.rglob("*.png"))) == 3 and not (tmp_path / "out").exists()
    (kept / "images/0.png").write_bytes(b"cut")  # as by a full disk
    times = {path: path.stat().st_mtime_ns for path in kept.rglob("*.png")}
    used = []
    with monkeypatch.context() as patch:
        patch.setattr(
            cocoedit40k,
            "unpack",
            lambda archive, *a, **o: used.append(archive.name) or cocoedit40k_unpack(archive, *a, **o),
        )
        unpack_cocoedit(release, tmp_path / "out")
    assert used == ["images_part1.zip", "images_part2.zip", "masks_part1.zip", "masks_part2.zip"]
    assert len(read_records(tmp_path / "out", Framing(16)).records) == 6 and not kept.exists()
    again = [(tmp_path / "out" / path.relative_to(kept)).stat().st_mtime_ns == time for path, time in times.items()]
    assert sorted(again) == [False, True, True]


def test_what_is_missing_is_known_before_anything_is_written(release, tmp_path):
    for piece in ("images_part2.zip_aa", "images_part2.zip_ab", "images_part2.zip_ac"):
        (release / piece).unlink()
    with pytest.raises(
        UserError, match="3 files that metadata.jsonl names are in none of the zips images_part1.zip, masks"
    ):
        unpack_cocoedit(release, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["download"]
    summary = unpack_cocoedit(release, tmp_path / "out", partial=True)
    assert "3 records, 6 files" in summary and "3 records left out" in summary
    assert [r.prompt for r in read_records(tmp_path / "out", Framing(16)).records] == ["edit 0", "edit 1", "edit 2"]


def test_faults_before_writing(release, tmp_path, monkeypatch):
    (release / "images_part1.zip_ac").unlink()
    (release / "masks_part2.zip").write_bytes(b"no zip")
    with pytest.raises(UserError) as caught:
        unpack_cocoedit(release, tmp_path / "out")
    assert "images_part1.zip_ab is incomplete, or pieces after it are missing" in str(caught.value)
    assert "masks_part2.zip: its directory, which lies at the end, cannot be read" in str(caught.value)
    with pytest.raises(UserError, match="not CoCoEdit-40K as released, expected metadata.jsonl beside images_part"):
        unpack_cocoedit(tmp_path, tmp_path / "out")


def test_room_on_the_disk(release, tmp_path, monkeypatch):
    free = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(cocoedit40k.shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match="GB are needed, 0.0 GB are free"):
        unpack_cocoedit(release, tmp_path / "out")


def test_faulty_lines_are_told_and_stay(release, tmp_path):
    with (release / "metadata.jsonl").open("a") as file:
        file.write('{"prompt": "x"}\n')
    assert "line 7: missing field: image, mask" in unpack_cocoedit(release, tmp_path / "out")
    assert len((tmp_path / "out/metadata.jsonl").read_text().splitlines()) == 7
