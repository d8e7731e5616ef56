"""The same picture, byte by byte and to the eye; folders without repeated records."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from cocoedit_jax.data import duplicates
from cocoedit_jax.data.dedupe import dedupe_folder
from cocoedit_jax.data.duplicates import Fingerprint, dhash, find_duplicates, fingerprints, same_picture
from cocoedit_jax.data.images import Framing
from cocoedit_jax.data.prepare import write_scenes
from cocoedit_jax.data.records import read_records, split_records
from cocoedit_jax.errors import UserError

data = pytest.importorskip("skimage.data", reason="needs scikit-image's packaged photographs")
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Each photograph as PNG, a copy, a JPEG, a half-size JPEG, mirrored, and with its colours turned."""
    folder = tmp_path_factory.mktemp("photos")
    for name in PHOTOS:
        image = Image.fromarray(getattr(data, name)())
        image.save(folder / f"{name}.png")
        shutil.copy(folder / f"{name}.png", folder / f"{name}_copy.png")
        image.save(folder / f"{name}.jpg", quality=80)
        image.resize((image.width // 2, image.height // 2)).save(folder / f"{name}_half.jpg", quality=80)
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / f"{name}_mirrored.png")
        Image.merge("RGB", image.split()[::-1]).save(folder / f"{name}_blue.png")
    return folder


def test_dhash_is_as_described():
    ramp = np.tile(np.arange(0, 270, 30, dtype=np.uint8), (8, 1))  # 9 x 8, brighter to the right
    assert dhash(Image.fromarray(ramp)) == 2**64 - 1 and dhash(Image.fromarray(ramp[:, ::-1])) == 0
    ramp[0, 1] = 0  # the first pair of the first row is no longer darker on its left
    assert dhash(Image.fromarray(ramp)) == 2**63 - 1


def test_photographs_that_are_the_same_are_found(photos):
    files = sorted(photos.iterdir())
    prints = fingerprints(files)
    first = [files[index].name for index in same_picture(prints)]
    for file, found in zip(files, first, strict=True):
        name = file.stem.split("_")[0]
        alone = file.stem.endswith(("_mirrored", "_blue"))
        assert found == (file.name if alone else f"{name}.jpg"), file.name
    exact = same_picture(prints, None)
    assert sum(index != own for own, index in enumerate(exact)) == len(PHOTOS)


def test_plain_surfaces_are_told_apart(tmp_path):
    """Their difference hashes are all zero."""
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 31, 30)]
    for number, colour in enumerate(colours):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{number}.png")
    prints = fingerprints(sorted(tmp_path.iterdir()))
    assert {found.dhash for found in prints if found} == {0} and same_picture(prints) == [0, 1, 2, 0]


@pytest.mark.parametrize("threshold", [0, 3, 7])
def test_no_pair_within_the_threshold_is_missed(threshold):
    """Against comparing all with all, on hashes that lie close together."""
    rng = np.random.default_rng(threshold)
    base = rng.integers(0, 2**63, 20, dtype=np.uint64)
    hashes = np.concatenate([base ^ (np.uint64(1) << rng.integers(0, 64, 20, dtype=np.uint64)) for _ in range(15)])
    for _ in range(2):
        hashes ^= np.where(
            rng.random(300) < 0.7, np.uint64(1) << rng.integers(0, 64, 300, dtype=np.uint64), np.uint64(0)
        )
    found = {(int(i), int(j)) for a, b in duplicates._near(hashes, threshold) for i, j in zip(a, b, strict=True)}
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    expected = {(i, j) for i, j in np.argwhere(apart <= threshold).tolist() if i < j}
    assert found == expected and (len(expected) > 20 or threshold == 0)
    with pytest.raises(UserError, match="threshold: 17 bits"):
        same_picture([], 17)


def entry(name, bits=0):
    return Fingerprint(name, bits, np.zeros((8, 8, 3), np.uint8))


def test_which_of_several_stays():
    far = 2**40 - 1
    prints = [entry("a"), entry("a"), entry("b", 1), entry("c", far), None, None, entry("a")]
    prompts = ["Make it red.", "make  it RED", "make it red", "make it red", "make it red", "make it red", "other"]
    found = find_duplicates(prints, prompts)
    assert [(d.index, d.of, d.exact) for d in found] == [(1, 0, True), (2, 0, False)]
    found = find_duplicates(prints, prompts, quality=[0.5, 0.5, 0.9, 1, 1, 1, 1])
    assert [(d.index, d.of, d.exact) for d in found] == [(0, 2, False), (1, 2, False)]
    assert [(d.index, d.of) for d in find_duplicates(prints, prompts, threshold=None)] == [(1, 0)]


def test_chains_are_one_picture():
    assert same_picture([entry("a", 0), entry("d", 2**20 - 1), entry("b", 0b111), entry("c", 0b111111)], 4) == [
        0,
        1,
        0,
        0,
    ]


def test_a_folder_without_repeated_records(photos, tmp_path):
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    (root / "text_cache").mkdir()
    mask = np.full((50, 50), 255, np.uint8)
    mask[10:40, 10:40] = 0
    lines = []
    for file in sorted(photos.iterdir()):
        shutil.copy(file, root / "images")
        with Image.open(file) as picture:
            size = picture.size
        Image.fromarray(mask).resize(size, Image.Resampling.NEAREST).save(root / f"{file.name}.mask.png")
        for prompt in ("make it red", file.name):
            lines.append({"prompt": prompt, "image": f"images/{file.name}", "mask": f"{file.name}.mask.png"})
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = dedupe_folder(root, tmp_path / "near", threshold=4)
    # Of 24 times "make it red" there remain one of each photograph, mirror image and other colours.
    assert summary.startswith("36 of 48 records") and "left out 0 exact and 12 near duplicates" in summary
    gone = [json.loads(line) for line in (tmp_path / "near/duplicates.jsonl").read_text().splitlines()]
    assert len(gone) == 12 and {lines[entry["line"] - 1]["prompt"] for entry in gone} == {"make it red"}
    records = read_records(tmp_path / "near", Framing(32)).records
    assert len(records) == 36 and (tmp_path / "near/text_cache").is_dir()
    same = [record for record in records if not record.image.stem.endswith(("mirrored", "blue"))]
    for fraction in np.linspace(0.1, 0.9, 9):
        sides = [{record.image.stem.split("_")[0] for record in part} for part in split_records(same, fraction)]
        assert not sides[0] & sides[1]
    assert dedupe_folder(root, tmp_path / "exact", threshold=None).startswith("44 of 48 records")
    (root / "images/chelsea.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="2 pictures cannot be read, on lines"):
        dedupe_folder(root, tmp_path / "other")


def test_only_a_newline_ends_a_line(tmp_path):
    root = write_scenes(tmp_path / "data", 3, size=32)
    lines = (root / "metadata.jsonl").read_bytes().splitlines()
    (root / "metadata.jsonl").write_bytes(b"".join(line + b"\r\r\n" for line in lines))
    assert dedupe_folder(root, tmp_path / "out", threshold=None).startswith("3 of 3 records")
    assert (tmp_path / "out/metadata.jsonl").read_bytes().splitlines() == lines


def test_brighter_is_not_another_picture(tmp_path):
    image = Image.fromarray(data.chelsea())
    image.save(tmp_path / "a.png")
    ImageEnhance.Brightness(image).enhance(1.05).save(tmp_path / "b.png")
    ImageEnhance.Brightness(image).enhance(0.5).save(tmp_path / "c.png")  # an edit like "at dusk"
    assert same_picture(fingerprints(sorted(tmp_path.iterdir()))) == [0, 0, 2]
