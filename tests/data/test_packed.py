"""Packed folders: what training reads of them is what it reads of the files."""

import json

import numpy as np
import pytest
from PIL import Image

from cocoedit_jax.data import pack_writer
from cocoedit_jax.data.images import Framing
from cocoedit_jax.data.pack_writer import pack_folder
from cocoedit_jax.data.packed import Pack
from cocoedit_jax.data.prepare import write_scenes
from cocoedit_jax.data.records import fingerprint, read_records, split_records
from cocoedit_jax.data.source import load_batch, record_dataset
from cocoedit_jax.data.text_cache import TextCache
from cocoedit_jax.data.text_identity import text_identity
from cocoedit_jax.errors import UserError
from cocoedit_jax.models.text import Instruction
from tests.data.text_cases import FLUX, embed, tiny_model, write


@pytest.fixture
def folder(tmp_path):
    return write_scenes(tmp_path / "data", 7, size=32)


def test_training_reads_the_same(folder, tmp_path):
    identity = text_identity(tiny_model(tmp_path / "model"))
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    prompts = [Instruction(prompt) for prompt in dict.fromkeys(json.loads(line)["prompt"] for line in lines)]
    write(folder, identity, prompts, dtype="float32")
    summary = pack_folder(folder, tmp_path / "packed", part_bytes=10_000)
    assert summary.startswith("7 records packed in") and "each compared" in summary and "text embeddings" not in summary
    parts = list((tmp_path / "packed/packed").glob("*.array_record"))
    assert len(parts) > 1 and not (tmp_path / "packed/images").exists()
    framing = Framing(16)
    plain, packed = (read_records(root, framing) for root in (folder, tmp_path / "packed"))
    assert fingerprint(plain.records) == fingerprint(packed.records)
    assert [r.image_sha256 for r in plain.records] == [r.image_sha256 for r in packed.records]
    for one, other in zip(split_records(plain.records, 0.4), split_records(packed.records, 0.4), strict=True):
        assert [record.id for record in one] == [record.id for record in other]
    batches = [load_batch(record_dataset(found.records, framing), [3, 0, 6, 3]) for found in (plain, packed)]
    for name in ("image", "edit_mask"):
        np.testing.assert_array_equal(batches[0][name], batches[1][name])
    assert all(batches[0][name] == batches[1][name] for name in ("prompt", "id", "edit_type", "extra"))
    cached = TextCache(tmp_path / "packed", FLUX, identity)(prompts[:2])
    np.testing.assert_array_equal(cached["text"], [row["text"] for row in embed(prompts[:2])])


def test_entries_are_the_files_byte_by_byte(folder, tmp_path):
    pack_folder(folder, tmp_path / "packed")
    root = tmp_path / "packed"
    pack = Pack(root, root / "metadata.jsonl")
    lines = (folder / "metadata.jsonl").read_bytes().splitlines()
    assert len(pack) == 7
    for position, line in enumerate(lines):
        fields = json.loads(line)
        entry = pack.read(position)
        assert entry["record"] == line and entry["image"] == (folder / fields["image"]).read_bytes()
        assert entry["mask"] == (folder / fields["mask"]).read_bytes()
    with pytest.raises(UserError, match="is packed already"):
        pack_folder(root, tmp_path / "twice")


def test_lines_that_cannot_be_used_are_left_out(folder, tmp_path):
    lines = (folder / "metadata.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\n{}\n" + b"".join(lines[1:]))
    (folder / json.loads(lines[3])["mask"]).unlink()
    summary = pack_folder(folder, tmp_path / "packed")
    assert "left out: " in summary and "line 3: missing field" in summary and "line 6: missing file" in summary
    found = read_records(tmp_path / "packed", Framing(16))
    assert [r.line for r in found.records] == [1, 2, 3, 4, 5, 6] and found.faults == ()
    expected = [json.loads(line)["id"] for line in lines[:3] + lines[4:]]
    assert [record.id for record in found.records] == expected


def test_only_a_newline_ends_a_line(folder, tmp_path):
    """Carriage returns before it, and alone between the fields, are white space of JSON."""
    lines = (folder / "metadata.jsonl").read_bytes().splitlines()
    lines[2] = lines[2].replace(b", ", b",\r", 1)
    (folder / "metadata.jsonl").write_bytes(b"".join(line + b"\r\r\n" for line in lines))
    expected = [json.loads(line)["id"] for line in lines]
    assert pack_folder(folder, tmp_path / "packed").startswith("7 records packed in")
    found = read_records(tmp_path / "packed", Framing(16))
    assert [record.id for record in found.records] == expected
    for record in found.records:
        assert record.files()[0].read_bytes() == record_image(folder, lines[record.line - 1])


def record_image(folder, line):
    return (folder / json.loads(line)["image"]).read_bytes()


def test_what_was_packed_is_what_was_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_writer, "metadata_lines", lambda root: (root / "metadata.jsonl").read_bytes().splitlines())
    lines = (folder / "metadata.jsonl").read_bytes().splitlines()
    (folder / "metadata.jsonl").write_bytes(b"".join(line + b"\r\r\n" for line in lines))
    with pytest.raises(UserError, match="the packed lines are read as other records"):
        pack_folder(folder, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_a_name_that_no_disk_takes_is_left_out(folder, tmp_path):
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "p", "image": "a" * 300, "mask": "b" * 300}) + "\n")
    assert "line 8: missing file" in pack_folder(folder, tmp_path / "packed")


def test_damage_is_named(folder, tmp_path):
    root = tmp_path / "packed"
    pack_folder(folder, root)
    part = root / "packed/part-00000.array_record"
    whole = part.read_bytes()
    middle = len(whole) // 2
    part.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    with pytest.raises(UserError, match=r"of 7 records cannot be used.*unreadable image"):
        read_records(root, Framing(16))
    part.write_bytes(whole[:-1])
    (root / "metadata.jsonl").write_text((root / "metadata.jsonl").read_text() + "\n")
    with pytest.raises(UserError) as caught:
        read_records(root, Framing(16))
    assert f"{part}: {len(whole) - 1} bytes, expected {len(whole)}" in str(caught.value)
    assert "metadata.jsonl: changed since it was packed" in str(caught.value)
    (root / "packed/header.json").write_text("{}")
    with pytest.raises(UserError, match="not the header of a packed folder"):
        read_records(root, Framing(16))


def test_nothing_to_pack(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        pack_folder(tmp_path, tmp_path / "out")
    (tmp_path / "metadata.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="1 of 1 records cannot be used"):
        pack_folder(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_orientation_is_applied(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)).save(root / "a.jpg", exif=exif)
    mask = np.full((20, 30), 255, np.uint8)
    mask[:6, :20] = 0
    Image.fromarray(mask).save(root / "m.png")
    (root / "metadata.jsonl").write_text('{"prompt": "p", "image": "a.jpg", "mask": "m.png"}\n')
    pack_folder(root, tmp_path / "packed")
    items = [record_dataset(read_records(r, Framing(16)).records, Framing(16))[0] for r in (root, tmp_path / "packed")]
    assert items[0] is not None and items[1] is not None
    np.testing.assert_array_equal(items[0]["image"], items[1]["image"])
    np.testing.assert_array_equal(items[0]["edit_mask"], items[1]["edit_mask"])
