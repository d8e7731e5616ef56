"""Progressive JPEG files of as many scans as a test wants."""

import io

from PIL import Image


def many_scans(count, head=b"", tail=b""):
    """A file of `count` scans (at least the ten of Pillow's own); `head`: segments to put in, `tail`: what follows."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (120, 130, 140)).save(buffer, "JPEG", progressive=True, quality=95, subsampling=0)
    whole = buffer.getvalue()
    own = whole.count(b"\xff\xda")
    assert own == 10 <= count
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:2] + head + whole[2:-2] + last * (count - own) + whole[-2:] + tail


def segment(content, marker=0xE5):
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content
