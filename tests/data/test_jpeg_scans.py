"""JPEG files whose scans would take for ever are refused undecoded; photographs with odd contents are not."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFile

from cocoedit_jax.data.images import DataFault, load_image
from cocoedit_jax.data.jpeg_scans import MAX_SCANS, TooManyScans, check_scans, count_scans
from tests.data.scan_files import many_scans, segment

SOS = b"\xff\xda"
FALSE_SCANS = SOS * 2 * MAX_SCANS


def opened(data):
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("count", [10, MAX_SCANS])
def test_up_to_the_limit_is_read(count):
    file = opened(many_scans(count))
    check_scans(file)
    assert file.size == (64, 64) and np.asarray(file).shape == (64, 64, 3)


@pytest.mark.parametrize("tail", [b"", FALSE_SCANS], ids=["", "tail"])
@pytest.mark.parametrize(
    "head",
    [b"", segment(b"x"), b"\xff\xe5\x00\x00" + b"\xff\xff\xff" + segment(b"y")[1:]],
    ids=["plain", "segment", "a length below its own and fill bytes"],
)
def test_one_beyond_the_limit_is_refused(head, tail):
    check_scans(opened(many_scans(MAX_SCANS, head, tail)))
    with pytest.raises(TooManyScans, match="more than 100 scans, expected at most 100"):
        check_scans(opened(many_scans(MAX_SCANS + 1, head, tail)))


def test_what_only_looks_like_scans_is_not_counted():
    """Pictures within metadata, and a video after the picture, as phones append it."""
    data = many_scans(10, head=segment(FALSE_SCANS), tail=FALSE_SCANS)
    file = opened(data)
    check_scans(file)
    assert count_scans(data, MAX_SCANS + 1) == 10 and np.asarray(file).shape == (64, 64, 3)


def test_data_files_are_refused_undecoded(tmp_path, monkeypatch):
    (tmp_path / "fine.jpg").write_bytes(many_scans(12))
    assert load_image(tmp_path / "fine.jpg").size == (64, 64)
    (tmp_path / "slow.jpg").write_bytes(many_scans(MAX_SCANS + 1))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DataFault, match=r"image .*slow.jpg: a JPEG file of more than 100 scans") as caught:
        load_image(tmp_path / "slow.jpg")
    assert caught.value.kind == "too many scans"


def test_other_formats_pass():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    check_scans(opened(buffer.getvalue() + FALSE_SCANS))
