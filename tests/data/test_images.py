"""Framing of images and masks: boxes, buckets, orientation, alpha, mask polarity and sizes."""

import numpy as np
import pytest
from PIL import Image

from cocoedit_jax.data.images import DataFault, Framing, crop_box, load_image, load_pair, make_buckets, nearest_bucket
from cocoedit_jax.errors import UserError


def save(path, array, **options):
    Image.fromarray(np.asarray(array)).save(path, **options)
    return path


def half_mask(height, width):
    """White (keep) on the left, black (edit) on the right."""
    mask = np.full((height, width), 255, np.uint8)
    mask[:, width // 2 :] = 0
    return mask


def test_buckets_have_equal_area_and_fit_the_divisor():
    sizes = make_buckets(512, divisor=32, max_aspect=2.0)
    assert (512, 512) in sizes and len(sizes) > 5
    for height, width in sizes:
        assert height % 32 == 0 and width % 32 == 0 and max(height, width) <= 2 * min(height, width)
        assert abs(height * width / 512**2 - 1) < 0.06
        assert (width, height) in sizes
    assert sizes[nearest_bucket(600, 600, sizes)] == (512, 512)
    height, width = sizes[nearest_bucket(400, 600, sizes)]
    assert abs(width / height - 1.5) < 0.12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 500, "crop": "buckets", "divisor": 16}, "multiple of the divisor 16"),
        ({"resolution": 512, "crop": "buckets", "max_aspect": 0.5}, "max_aspect: 0.5"),
        ({"resolution": 512, "crop": "random"}, "crop: 'random'"),
        ({"resolution": 0}, "resolution: 0"),
    ],
)
def test_bad_framing(arguments, message):
    with pytest.raises(UserError, match=message):
        Framing(**arguments)


def test_crop_box_is_the_largest_centred_box():
    assert crop_box(600, 400, (512, 512)) == (100, 0, 500, 400)
    assert crop_box(400, 600, (512, 512)) == (0, 100, 400, 500)
    left, top, right, bottom = crop_box(640, 480, (32, 64))
    assert (left, right) == (0, 640) and np.isclose(bottom - top, 320) and np.isclose(top, 80)


def test_mask_gets_the_box_of_the_image(tmp_path):
    """A mark in the picture and the black spot of the mask stay together through crop and scaling."""
    image, mask = np.zeros((90, 160, 3), np.uint8), np.full((90, 160), 255, np.uint8)
    image[30:60, 70:100], mask[30:60, 70:100] = 255, 0
    paths = save(tmp_path / "i.png", image), save(tmp_path / "m.png", mask)
    for framing in (Framing(60), Framing(64, "buckets")):
        pixels, edit_mask, bucket = load_pair(*paths, framing)
        assert pixels.shape[:2] == edit_mask.shape == framing.sizes[bucket]
        np.testing.assert_allclose(pixels.mean(axis=-1) > 0.5, edit_mask > 0, atol=0)
        assert set(np.unique(edit_mask)) == {0.0, 1.0} and pixels.dtype == edit_mask.dtype == np.float32


def test_mask_of_another_size_with_the_same_aspect(tmp_path):
    image = save(tmp_path / "i.png", np.zeros((60, 90, 3), np.uint8))
    _, edit_mask, _ = load_pair(image, save(tmp_path / "m.png", half_mask(120, 180)), Framing(40))
    np.testing.assert_array_equal(edit_mask[:, :20], 0)
    np.testing.assert_array_equal(edit_mask[:, 20:], 1)
    with pytest.raises(DataFault, match=r"mask 'n.png' is 80x60 px, image 'i.png' is 90x60 px") as caught:
        load_pair(image, save(tmp_path / "n.png", half_mask(60, 80)), Framing(40))
    assert caught.value.kind == "mask size"


# Where the turn keeps width and height, a mask for the stored form cannot be told from one for the upright form.
@pytest.mark.parametrize(
    ("orientation", "mask_is_upright"),
    [*((number, True) for number in range(1, 9)), *((number, False) for number in range(5, 9))],
)
def test_orientation(tmp_path, orientation, mask_is_upright):
    """The stored picture is turned upright; a mask made for either form lands on the same pixels."""
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[:20, :30] = 250  # bright top left quarter
    stored = Image.fromarray(upright)
    if orientation > 1:
        stored = stored.transpose(
            {
                2: Image.Transpose.FLIP_LEFT_RIGHT,
                3: Image.Transpose.ROTATE_180,
                4: Image.Transpose.FLIP_TOP_BOTTOM,
                5: Image.Transpose.TRANSPOSE,
                6: Image.Transpose.ROTATE_90,
                7: Image.Transpose.TRANSVERSE,
                8: Image.Transpose.ROTATE_270,
            }[orientation]
        )
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "i.png", exif=exif)
    mask = Image.fromarray(255 - upright[..., 0])
    if not mask_is_upright:
        mask = Image.fromarray(255 - np.asarray(stored)[..., 0])
    mask.save(tmp_path / "m.png")
    pixels, edit_mask, _ = load_pair(tmp_path / "i.png", tmp_path / "m.png", Framing(40, "buckets", divisor=4))
    height, width = edit_mask.shape
    assert width > height
    np.testing.assert_array_equal(edit_mask[: height // 2 - 1, : width // 2 - 1], 1)
    np.testing.assert_array_equal(edit_mask[height // 2 + 1 :], 0)
    assert pixels[: height // 2 - 3, : width // 2 - 3].min() > 0.9 and pixels[height // 2 + 3 :].max() < 0.1


def test_transparency_is_white(tmp_path):
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[8:, :, 3] = 255
    mask = save(tmp_path / "m.png", half_mask(16, 16))
    pixels, _, _ = load_pair(save(tmp_path / "i.png", rgba), mask, Framing(16))
    np.testing.assert_array_equal(pixels[:8], 1)
    np.testing.assert_array_equal(pixels[8:], 0)
    indexed = Image.fromarray(np.zeros((16, 16), np.uint8)).convert("P")
    indexed.save(tmp_path / "p.png", transparency=indexed.getpixel((0, 0)))
    np.testing.assert_array_equal(load_pair(tmp_path / "p.png", mask, Framing(16))[0], 1)


def test_gray_of_floats(tmp_path):
    mask = save(tmp_path / "m.tif", half_mask(16, 16).astype(np.float32) / 255)
    image = save(tmp_path / "i.tif", np.full((16, 16), 0.2, np.float32))
    pixels, edit_mask, _ = load_pair(image, mask, Framing(16))
    np.testing.assert_allclose(pixels, 0.2, atol=1e-6)
    np.testing.assert_array_equal(edit_mask, np.repeat([[0.0] * 8 + [1.0] * 8], 16, axis=0))


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P", "I;16"])
def test_mask_modes(tmp_path, mode):
    mask = Image.fromarray(half_mask(16, 16))
    if mode == "I;16":
        mask = Image.fromarray(half_mask(16, 16).astype(np.uint16) * 257)
    else:
        mask = mask.convert(mode)
    mask.save(tmp_path / "m.png")
    image = save(tmp_path / "i.png", np.full((16, 16), 40000, np.uint16))
    pixels, edit_mask, _ = load_pair(image, tmp_path / "m.png", Framing(16))
    np.testing.assert_array_equal(edit_mask, np.repeat([[0.0] * 8 + [1.0] * 8], 16, axis=0))
    np.testing.assert_allclose(pixels, 40000 / 65535, atol=0.003)


@pytest.mark.parametrize("error", [OSError(36, "File name too long"), PermissionError(13, "Permission denied")])
def test_a_path_that_cannot_be_looked_at_is_the_records_own_fault(tmp_path, monkeypatch, error):
    def refuse(self):
        raise error  # root, as which tests may run, can enter every folder

    if isinstance(error, PermissionError):
        monkeypatch.setattr(type(tmp_path), "is_file", refuse)
    with pytest.raises(DataFault, match=error.strerror) as fault:
        load_image(tmp_path / ("a" * 300 + ".png"))
    assert fault.value.kind == "unreadable image"
