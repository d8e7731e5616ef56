"""Reading a data folder: photographs in the CoCoEdit-40K layout, and every way a folder can be broken."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from cocoedit_jax.data import records as records_module
from cocoedit_jax.data.images import Framing
from cocoedit_jax.data.records import (
    is_held_out,
    read_records,
    record_id,
    source_key,
    split_records,
)
from cocoedit_jax.data.source import load_batch, record_dataset
from cocoedit_jax.errors import UserError

PHOTOS = {"astronaut": "make the suit blue", "coffee": "remove the spoon", "chelsea": "turn the cat into a fox"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three photographs (square, 3:2, 451 x 300) with keep-white masks; two lines state an id."""
    data = pytest.importorskip("skimage.data", reason="needs scikit-image's packaged photographs")
    root = tmp_path_factory.mktemp("photos")
    (root / "images").mkdir()
    (root / "masks").mkdir()
    lines = []
    for number, (name, prompt) in enumerate(PHOTOS.items()):
        image = getattr(data, name)()
        mask = np.full(image.shape[:2], 255, np.uint8)
        mask[image.shape[0] // 4 : image.shape[0] // 2, image.shape[1] // 3 : image.shape[1] // 2] = 0
        Image.fromarray(image).save(root / "images" / f"{name}.jpg", quality=95)
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")
        line = {"prompt": prompt, "image": f"images/{name}.jpg", "mask": f"masks/{name}.png", "source": "skimage"}
        lines.append(line | ({"id": number, "edit_type": "color"} if number else {}))
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (root / "metadata.jsonl").write_text("\ufeff" + text + "\n\n", encoding="utf-8")
    return root


def test_photographs(photos):
    found = read_records(photos, Framing(128))
    assert found.faults == () and "all 3 records" in found.summary()
    first, second, _ = found.records
    assert first.id == record_id("images/astronaut.jpg", PHOTOS["astronaut"]) and second.id == "1"
    assert (first.edit_type, second.edit_type) == (None, "color")
    assert [record.line for record in found.records] == [1, 2, 3]
    dataset = record_dataset(found.records, found.framing)
    assert len(dataset) == 3
    item = dataset[1]
    assert item is not None
    assert set(item) == {"image", "edit_mask", "prompt", "id", "edit_type", "extra", "index"}
    assert item["prompt"] == "remove the spoon" and item["extra"] == {"source": "skimage"} and item["index"] == 1
    assert item["image"].shape == (128, 128, 3) and item["edit_mask"].shape == (128, 128)
    assert 0.05 < item["edit_mask"].mean() < 0.25  # 1 = may change: the black part of the file
    batch = load_batch(dataset, [2, 0, 0])
    assert batch["image"].shape == (3, 128, 128, 3) and batch["edit_mask"].shape == (3, 128, 128)
    assert batch["index"].tolist() == [2, 0, 0] and batch["id"] == ["2", first.id, first.id]
    np.testing.assert_array_equal(batch["image"][1], batch["image"][2])


def test_photographs_in_buckets(photos):
    framing = Framing(128, "buckets", divisor=16)
    found = read_records(photos, framing)
    sizes = [framing.sizes[record.bucket] for record in found.records]
    assert sizes[0] == (128, 128) and sizes[1] == sizes[2] and sizes[1][1] > sizes[1][0]
    dataset = record_dataset(found.records, framing)
    assert load_batch(dataset, [1, 2])["image"].shape == (2, *sizes[1], 3)
    with pytest.raises(UserError, match="one bucket per batch"):
        load_batch(dataset, [0, 1])
    merged = read_records(photos, framing, min_bucket_records=2).records
    assert len({record.bucket for record in merged}) == 1
    load_batch(record_dataset(merged, framing), [0, 1, 2])


@pytest.fixture
def folder(tmp_path):
    """A folder whose lines the tests fill in; ok.png / half.png are a usable pair."""
    root = tmp_path / "data"
    root.mkdir()
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(root / "ok.png")
    half = np.full((20, 20), 255, np.uint8)
    half[:, :10] = 0
    Image.fromarray(half).save(root / "half.png")
    Image.fromarray(half[:10]).save(root / "flat.png")
    Image.fromarray(np.full((20, 20), 255, np.uint8)).save(root / "white.png")
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(root / "black.png")
    (root / "text.png").write_text("not an image")
    whole = (root / "ok.png").read_bytes()
    noise = np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "cut.png")
    (root / "cut.png").write_bytes((root / "cut.png").read_bytes()[:-200])
    (tmp_path / "outside.png").write_bytes(whole)
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    return root


def row(**fields):
    return {"prompt": "make it red", "image": "ok.png", "mask": "half.png"} | fields


FAULTS = [
    (b'{"prompt": "make', "broken JSON", "Unterminated"),
    (b'{"prompt": "\xff"}', "broken JSON", "UTF-8"),
    (["a", "list"], "wrong type", "JSON list"),
    ({"prompt": "p", "image": "ok.png"}, "missing field", "mask"),
    (row(prompt=3), "wrong type", "'prompt' is 3"),
    (row(prompt=" "), "wrong type", "'prompt' is ' '"),
    (row(prompt="\ud800"), "wrong type", "expected Unicode text"),
    (row(mask=None), "wrong type", "'mask' is None"),
    (row(id=1.5), "wrong type", "'id' is 1.5"),
    (row(id=True), "wrong type", "'id' is True"),
    (row(id="x", edit_type=7), "wrong type", "'edit_type' is 7"),
    (row(image="gone.png"), "missing file", "gone.png does not exist"),
    (row(mask="gone.png"), "missing file", "mask"),
    (row(image="."), "missing file", "does not exist"),
    (row(image="text.png"), "unreadable image", "text.png"),
    (row(image="cut.png"), "unreadable image", "cut.png"),
    (row(mask="flat.png"), "mask size", "20x10 px"),
    (row(mask="white.png"), "degenerate mask", "no pixel may change"),
    (row(mask="black.png"), "degenerate mask", "every pixel may change"),
    (row(image="../outside.png"), "path outside", "../outside.png"),
    (row(image="/etc/hostname"), "path outside", "/etc/hostname"),
    (row(image="link.png"), "path outside", "link.png"),
    (row(image="..\\outside.png"), "path outside", "outside.png"),
    (row(image="a\0b"), "path outside", "null"),
    (row(id="first"), "duplicate id", "used on line 1"),
]


def write(root, rows):
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in rows]
    (root / "metadata.jsonl").write_bytes(b"\n".join(lines))


@pytest.mark.parametrize(("line", "kind", "message"), FAULTS, ids=[f"{k}-{n}" for n, (_, k, _) in enumerate(FAULTS)])
def test_each_fault_is_named_with_its_line(folder, line, kind, message):
    write(folder, [row(id="first"), line, row(id="last")])
    with pytest.raises(UserError, match=f"1 of 3 records cannot be used: 1 x {kind}") as caught:
        read_records(folder, Framing(16))
    assert f"\n  line 2: {kind}: " in str(caught.value) and message in str(caught.value)
    found = read_records(folder, Framing(16), strict=False)
    assert [record.id for record in found.records] == ["first", "last"]
    assert [(fault.line, fault.kind) for fault in found.faults] == [(2, kind)]


def test_all_faults_in_one_summary(folder):
    rows = [line for line, kind, _ in FAULTS if kind != "duplicate id"]
    write(folder, [row(id="a"), *rows, row(id="a")])
    seen = []
    found = read_records(folder, Framing(16), strict=False, progress=lambda done, total: seen.append((done, total)))
    assert [fault.line for fault in found.faults] == list(range(2, len(rows) + 3))
    summary = found.summary(limit=5)
    assert summary.count("\n  line ") == 5 and f"and {len(rows) + 1 - 5} more" in summary
    assert f"{len(rows) + 1} of {len(rows) + 2} records" in summary and "4 x path outside" not in summary
    assert "5 x path outside" in summary
    assert seen[-1][0] == seen[-1][1] == len(seen)


def test_image_over_the_size_limit(folder, monkeypatch):
    """Pillow's guard against decompression bombs is kept: its warning and its error both become a fault."""
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(folder / "large.png")
    Image.fromarray(np.zeros((60, 60, 3), np.uint8)).save(folder / "huge.png")
    write(folder, [row(), row(image="large.png"), row(image="huge.png")])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 800)
    found = read_records(folder, Framing(16), strict=False)
    assert [(fault.line, fault.kind) for fault in found.faults] == [(2, "image too large"), (3, "image too large")]


def test_edit_region_outside_the_centre_crop(folder):
    """The whole mask is fine, what the crop leaves of it is not."""
    mask = np.full((20, 60), 255, np.uint8)
    mask[:, :10] = 0
    Image.fromarray(mask).save(folder / "wide_mask.png")
    Image.fromarray(np.zeros((20, 60, 3), np.uint8)).save(folder / "wide.png")
    write(folder, [row(image="wide.png", mask="wide_mask.png")])
    with pytest.raises(UserError, match="line 1: degenerate mask: mask 'wide_mask.png'.*crop to 16x16"):
        read_records(folder, Framing(16))
    assert len(read_records(folder, Framing(16, "buckets", divisor=4, max_aspect=4.0)).records) == 1


def test_no_metadata_empty_and_nothing_usable(folder):
    with pytest.raises(UserError, match=r"metadata\.jsonl: no such file"):
        read_records(folder, Framing(16))
    (folder / "metadata.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="empty file"):
        read_records(folder, Framing(16), strict=False)
    write(folder, [row(image="gone.png")])
    with pytest.raises(UserError, match="1 of 1 records"):
        read_records(folder, Framing(16), strict=False)


def test_file_lost_after_the_check(folder):
    write(folder, [row(id="x")])
    dataset = record_dataset(read_records(folder, Framing(16)).records, Framing(16))
    (folder / "ok.png").unlink()
    with pytest.raises(UserError, match=r"record 'x' \(line 1\): missing file"):
        dataset[0]
    with pytest.raises(UserError, match="records: none given"):
        record_dataset([], Framing(16))


@pytest.fixture
def many(folder):
    """60 pictures with two instructions each, every other pair under another file name."""
    rows = []
    for number in range(60):
        Image.fromarray(np.full((20, 20, 3), number, np.uint8)).save(folder / f"p{number}.png")
        (folder / f"copy{number}.png").write_bytes((folder / f"p{number}.png").read_bytes())
        other = f"copy{number}.png" if number % 2 else f"p{number}.png"
        rows += [row(image=f"p{number}.png", prompt="a"), row(image=other, prompt="b")]
    write(folder, rows)
    return read_records(folder, Framing(16)).records


def test_split_keeps_a_picture_on_one_side(many):
    train, held_out = split_records(many, 0.25)
    assert len(train) + len(held_out) == 120 and 10 <= len(held_out) <= 50
    pictures = [{record.image.read_bytes() for record in part} for part in (train, held_out)]
    assert not pictures[0] & pictures[1] and len(pictures[0] | pictures[1]) == 60


def test_split_is_stable(many):
    train, held_out = split_records(many, 0.25)
    # Neither the order of the file nor other records change where a record goes; a larger part contains a smaller one.
    assert {r.id for r in split_records(many[::-2], 0.25)[1]} <= {r.id for r in held_out}
    assert {r.id for r in held_out} <= {r.id for r in many if is_held_out(r, 0.5)}
    assert split_records(many, 0.0) == (many, ())
    with pytest.raises(UserError, match="held_out_fraction: 1.0"):
        split_records(many, 1.0)


def test_split_by_a_stated_source(folder, many):
    """Pictures that differ in bytes stay together where `source_group` says that they are one."""
    stated = [replace(record, extra={"source_group": "one"}) for record in many]
    assert sorted(len(part) for part in split_records(stated, 0.5)) == [0, 120]
    assert source_key(many[0]) == hashlib.sha256((folder / "p0.png").read_bytes()).hexdigest()
    assert source_key(replace(many[0], image_sha256="")) == source_key(many[0])
    # Written down, because a change would move pictures between the training and the held-out part.
    assert [is_held_out(replace(many[0], image_sha256=name), 0.5) for name in "abcdef"] == [
        True,
        False,
        False,
        True,
        True,
        True,
    ]


def test_derived_ids_are_fixed():
    """Written down, because a change would move records between the training and the held-out part."""
    assert record_id("images/1.png", "make it red") == "7d3148a1f88631e9"
    assert record_id("a", "bc") != record_id("ab", "c")


def test_bucket_merging():
    framing = Framing(64, "buckets", divisor=16)
    wide, square = framing.sizes.index((48, 80)), framing.sizes.index((64, 64))
    assert records_module._merge_buckets([wide] * 2 + [square] * 6, framing, 3) == [square] * 8
    assert records_module._merge_buckets([wide] * 3 + [square] * 6, framing, 3) == [wide] * 3 + [square] * 6
    assert records_module._merge_buckets([wide], framing, 9) == [wide]
