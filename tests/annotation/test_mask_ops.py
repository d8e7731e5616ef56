import numpy as np
import pytest
from PIL import Image

from cocoedit_jax.annotation import mask_ops
from cocoedit_jax.annotation.pictures import fitted_size, keep_image, marked, read_edit_mask
from cocoedit_jax.annotation.segmenters import make_segmenter
from cocoedit_jax.errors import UserError
from tests.annotation.conftest import blob


def test_dilation_is_round_and_of_the_radius():
    mask = np.zeros((101, 101), bool)
    mask[50, 50] = True
    y, x = np.mgrid[:101, :101] - 50
    np.testing.assert_array_equal(mask_ops.dilate(mask, 10), x**2 + y**2 <= 100)
    np.testing.assert_array_equal(mask_ops.dilate(mask, 0.9), mask)
    assert not mask_ops.dilate(np.zeros((5, 5), bool), 3).any()


def test_pieces_and_holes():
    big = blob(radius=20)
    ring = big & ~blob(radius=8)
    speck = blob(center=(5, 5), radius=1)
    piece = blob(center=(70, 90), radius=6)
    found = mask_ops.refine(ring | speck | piece, min_piece=0.05, fill_holes=True)
    np.testing.assert_array_equal(found, big | piece)
    found = mask_ops.refine(ring | speck, min_piece=0.0, fill_holes=False)
    np.testing.assert_array_equal(found, ring | speck)
    assert not mask_ops.refine(np.zeros((4, 4), bool), min_piece=0.1, fill_holes=True).any()


def test_measures():
    mask = np.zeros((10, 20), bool)
    mask[0:4, 0:6] = True
    mask[6:8, 16:18] = True
    m = mask_ops.measures(mask, mask, (0, 0, 18, 8))
    assert m["area"] == 28 / 200 and m["components"] == 2 and m["box_iou"] == 1.0
    assert m["crop_area"] == 4 / 100  # columns 5 to 15
    assert m["border"] == pytest.approx((6 + 3) / 56)
    assert mask_ops.bounding_box(mask) == (0, 0, 18, 8)
    assert mask_ops.box_mask((1.4, 2.6, 5.2, 4.4), (20, 10)).sum() == 4 * 1
    assert mask_ops.box_mask((19.9, 9.9, 20.0, 10.0), (20, 10)).sum() == 1


def test_a_random_walk_finds_the_thing():
    truth = blob((120, 160), (60, 70), 25)
    rng = np.random.default_rng(0)
    pixels = np.where(truth[..., None], (200, 60, 40), (70, 110, 90)) + rng.normal(0, 12, (120, 160, 3))
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    found = make_segmenter("random-walker", {})(image, (40, 30, 100, 90))
    assert (found & truth).sum() / (found | truth).sum() > 0.95
    box = make_segmenter("box", {})(image, (40, 30, 100, 90))
    assert box.sum() == 3600 and box[30:90, 40:100].all()
    assert make_segmenter("random-walker", {})(image, (0, 0, 160, 120)).all()


def test_segmenters_by_name():
    with pytest.raises(UserError, match="expected MODULE:CLASS or one of box, random-walker, sam2"):
        make_segmenter("sam", {})
    with pytest.raises(UserError, match=r"options \['color'\] do not fit"):
        make_segmenter("box", {"color": 1})
    with pytest.raises(UserError, match="cannot be imported"):
        make_segmenter("no_such_module:Thing", {})
    assert type(make_segmenter("cocoedit_jax.annotation.segmenters:BoxSegmenter", {})).__name__ == "BoxSegmenter"


@pytest.mark.parametrize("size", [(512, 512), (4000, 3000), (30, 2000), (1021, 733), (10, 10), (100000, 10)])
def test_sizes_that_servers_leave_alone(size):
    for cell, most in ((28, 1003520), (32, 300000)):
        width, height = fitted_size(size, cell, most)
        assert width % cell == height % cell == 0 and min(width, height) >= 4 * cell
        assert width * height <= most
    width, height = fitted_size(size, 1, 10**9)
    assert (width, height) == (max(size[0], 4), max(size[1], 4))


def test_polarity_and_marking(tmp_path):
    mask = blob()
    keep_image(mask).save(tmp_path / "m.png")
    assert np.asarray(Image.open(tmp_path / "m.png"))[40, 50] == 0, "black where it may change"
    np.testing.assert_array_equal(read_edit_mask(tmp_path / "m.png"), mask)
    image = Image.new("RGB", (200, 160), (10, 20, 200))
    shown = np.asarray(marked(image, mask))
    assert tuple(shown[0, 0]) == (10, 20, 200)
    assert tuple(shown[80, 100]) == (120, 11, 110), "45 % red"
    assert (shown == 255).all(-1).any(), "a white line"
