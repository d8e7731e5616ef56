"""Archives in pieces: joined, judged, unpacked, resumed; and every way they can be damaged or hostile."""

import io
import os
import tarfile
import zipfile

import numpy as np
import pytest

from cocoedit_jax.data import archives
from cocoedit_jax.data.archives import JoinedFile, find_archives, find_by_suffix, unpack
from cocoedit_jax.errors import UserError

FILES = {f"images/{n}.png": np.random.default_rng(n).bytes(3000 + n) for n in range(5)}


def make_zip(files=FILES, compression=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    return buffer.getvalue()


def make_tar(files=FILES, extra=()):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as packed:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            packed.addfile(info, io.BytesIO(data))
        for info in extra:
            packed.addfile(info)
    return buffer.getvalue()


def cut(folder, name, data, size, labels):
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    for label, piece in zip(labels, pieces, strict=False):
        (folder / f"{name}{label}").write_bytes(piece)
    return len(pieces)


def target_in(folder):
    return lambda member: folder / member.name


def test_joined_file_reads_as_one(tmp_path):
    data = np.random.default_rng(0).bytes(10_000)
    cut(tmp_path, "x", data, 999, [f"{n:02d}" for n in range(11)])
    with JoinedFile(sorted(tmp_path.iterdir())) as joined:
        reader = io.BufferedReader(joined, 100)
        rng = np.random.default_rng(1)
        for _ in range(50):
            start, length = (int(n) for n in rng.integers(0, 10_500, 2))
            reader.seek(start)
            assert reader.read(length) == data[start : start + length]
        assert reader.seek(-3, os.SEEK_END) == 9_997 and reader.read(99) == data[-3:]
        with pytest.raises(OSError):
            joined.seek(-1)
        reader.detach()


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("zip", ["_aa", "_ab", "_ac", "_ad", "_ae", "_af", "_ag", "_ah"]),
        ("zip", [f".{n:03d}" for n in range(1, 9)]),
        ("tar", [f".split.{n:03d}" for n in range(12)]),
    ],
)
def test_pieces(tmp_path, kind, labels):
    data = make_zip() if kind == "zip" else make_tar()
    count = cut(tmp_path, f"p.{kind}", data, 2500, labels)
    assert 4 < count <= len(labels)
    (archive,) = find_archives(tmp_path, kind)
    assert archive.name == f"p.{kind}" and len(archive.pieces) == count and archive.size == len(data)
    assert unpack(archive, target_in(tmp_path / "out")) == 5
    for name, content in FILES.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    # Nothing is written twice, and only what is asked for is written.
    (tmp_path / "out" / "images/2.png").write_bytes(b"short")
    seen = []
    assert unpack(archive, target_in(tmp_path / "out"), done=lambda member, fresh: seen.append(fresh)) == 1
    assert seen == [False, False, True, False, False]
    assert unpack(archive, lambda member: tmp_path / "one" if member.name == "images/3.png" else None) == 1


def test_whole_and_other_files(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"1")
    for name in ("b.zip_aa", "a.zip_aa", "notes.txt", "c.tar", "a.zip_backup_of_mine"):
        (tmp_path / name).write_bytes(b"2")
    assert [archive.name for archive in find_archives(tmp_path, "zip")] == ["a.zip", "b.zip"]
    assert [len(archive.pieces) for archive in find_archives(tmp_path, "zip")] == [1, 1]
    assert find_archives(tmp_path / "gone", "zip") == []


def test_missing_and_incomplete_pieces_are_named_together(tmp_path):
    cut(tmp_path, "a.zip", make_zip(), 2500, ["_aa", "_ab", "_ac", "_ad", "_ae", "_af", "_ag"])
    cut(tmp_path, "b.zip", make_zip(), 2500, ["_aa", "_ab", "_ac", "_ad", "_ae", "_af", "_ag"])
    (tmp_path / "a.zip_ac").unlink()
    (tmp_path / "b.zip_ab").write_bytes(b"x" * 2000)
    with pytest.raises(UserError) as caught:
        find_archives(tmp_path, "zip")
    assert "a.zip: a piece is missing after ab" in str(caught.value)
    assert "b.zip_ab: 2000 bytes, expected 2500 as the first piece" in str(caught.value)
    (tmp_path / "a.zip_aa").unlink()
    with pytest.raises(UserError, match="a.zip: a piece is missing after the start"):
        find_archives(tmp_path, "zip")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_missing_last_piece(tmp_path, kind):
    data = make_zip() if kind == "zip" else make_tar()
    (tmp_path / f"a.{kind}").write_bytes(data[: 2 * len(data) // 3])
    (archive,) = find_archives(tmp_path, kind)
    with pytest.raises(UserError, match=rf"a\.{kind} in .*: damaged or incomplete"):
        unpack(archive, target_in(tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("*.tmp")) if (tmp_path / "out").exists() else True


def test_a_wrong_crc(tmp_path):
    data = bytearray(make_zip(compression=zipfile.ZIP_STORED))
    data[data.find(FILES["images/3.png"]) + 100] ^= 1
    (tmp_path / "a.zip").write_bytes(data)
    (archive,) = find_archives(tmp_path, "zip")
    with pytest.raises(UserError, match=r"Bad CRC-32 for file 'images/3\.png'"):
        unpack(archive, target_in(tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out/images").iterdir()) == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "a/../../evil.png", "..\\evil.png", "C:\\evil.png"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_that_lead_out_are_refused(tmp_path, kind, name):
    files = {**FILES, name: b"evil"}
    (tmp_path / f"a.{kind}").write_bytes(make_zip(files) if kind == "zip" else make_tar(files))
    (archive,) = find_archives(tmp_path, kind)
    with pytest.raises(UserError, match="leads out of the folder"):
        unpack(archive, target_in(tmp_path / "deep/out"))
    assert not list(tmp_path.rglob("evil*"))


def test_links_and_devices_are_refused(tmp_path):
    link, device = tarfile.TarInfo("l.png"), tarfile.TarInfo("d.png")
    link.type, link.linkname, device.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.CHRTYPE
    for number, info in enumerate((link, device)):
        (tmp_path / f"{number}.tar").write_bytes(make_tar({}, [info]))
    entry = zipfile.ZipInfo("l.png")
    entry.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "2.zip", "w") as packed:
        packed.writestr(entry, "/etc/passwd")
    for archive in [*find_archives(tmp_path, "tar"), *find_archives(tmp_path, "zip")]:
        with pytest.raises(UserError, match="is a link"):
            unpack(archive, target_in(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_bombs_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "a.zip").write_bytes(make_zip({**FILES, "images/bomb.png": bytes(5 * 2**20)}))
    (archive,) = find_archives(tmp_path, "zip")
    with pytest.raises(UserError, match=r"'images/bomb\.png' expands from \d+ to 5242880 bytes.*decompression bomb"):
        unpack(archive, target_in(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"'images/0\.png' has 3000 bytes, expected at most 1000"):
        unpack(archive, target_in(tmp_path / "out"), max_bytes=1000)
    # What nobody asked for is not judged by its size.
    assert unpack(archive, lambda member: tmp_path / "x" if member.name == "images/1.png" else None) == 1
    (tmp_path / "b.tar").write_bytes(make_tar())
    with pytest.raises(UserError, match=r"'images/0\.png' has 3000 bytes"):
        unpack(find_archives(tmp_path, "tar")[0], target_in(tmp_path / "out"), max_bytes=1000)


def test_an_interrupted_write_leaves_nothing_half(tmp_path, monkeypatch):
    (tmp_path / "a.zip").write_bytes(make_zip())
    (archive,) = find_archives(tmp_path, "zip")

    def full(source, file, length):
        file.write(source.read(100))
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(archives.shutil, "copyfileobj", full)
        with pytest.raises(OSError, match="disk full"):
            unpack(archive, target_in(tmp_path / "out"))
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
    assert unpack(archive, target_in(tmp_path / "out")) == 5


def test_find_by_suffix():
    find = find_by_suffix(["images/a/1.png", "images/b/1.png", "images/2.png", "3.png"])
    assert (
        find("images/2.png") == find("./images/2.png") == find("2.png") == find("part1/images/2.png") == "images/2.png"
    )
    assert find("a/1.png") == "images/a/1.png" and find("1.png") is None  # two would fit
    assert find("masks/2.png") is None and find("4.png") is None and find("deep/3.png") == "3.png"
