import jax.numpy as jnp
import numpy as np
import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.nft.presets import preset
from cocoedit_jax.rewards.pixel import masked_mse, masked_psnr, masked_ssim, pixel_reward

CORRECT, OFFICIAL = preset("cocoedit"), preset("cocoedit-official")


def pictures(size=(40, 32), batch=2, seed=0):
    """Smooth pictures with structure at several scales, and the same with noise."""
    rng = np.random.default_rng(seed)
    h, w = size
    y, x = np.mgrid[:h, :w] / max(h, w)
    waves = sum(
        rng.normal(size=(batch, 1, 1, 3)) / k * np.sin(2 * np.pi * k * (y * a + x * b))[None, ..., None]
        for k, (a, b) in enumerate(rng.normal(size=(8, 2)), start=1)
    )
    image = np.clip(0.5 + 0.2 * waves, 0, 1)
    noisy = np.clip(image + 0.05 * rng.normal(size=image.shape), 0, 1)
    return jnp.asarray(image, jnp.float32), jnp.asarray(noisy, jnp.float32)


def half_mask(image):
    return jnp.ones(image.shape[:3]).at[:, :, image.shape[2] // 2 :].set(0.0)


def test_correct_psnr_is_the_definition():
    a, b = pictures()
    mask = half_mask(a)
    kept = np.asarray(mask)[0] > 0
    error = np.square(np.asarray(a)[0][kept] - np.asarray(b)[0][kept]).mean()
    np.testing.assert_allclose(masked_mse(a, b, mask)[0], error, rtol=1e-5)
    np.testing.assert_allclose(masked_psnr(a, b, mask)[0], -10 * np.log10(error), rtol=1e-5)


def test_official_psnr_is_a_factor_of_three_low():
    a, b = pictures()
    gap = masked_psnr(a, b, half_mask(a), "official") - masked_psnr(a, b, half_mask(a))
    np.testing.assert_allclose(gap, -4.7712, atol=1e-3)


@pytest.mark.parametrize("cfg", [CORRECT, OFFICIAL])
def test_identical_pictures_score_one(cfg):
    a, _ = pictures()
    result = pixel_reward(a, a, half_mask(a), cfg)
    np.testing.assert_allclose(result.psnr, 80.0, rtol=1e-6)
    np.testing.assert_allclose(result.ssim, 1.0, atol=1e-5)
    np.testing.assert_allclose(result.score, 1.0, atol=1e-5)


def test_nothing_to_keep():
    a, b = pictures()
    mask = jnp.ones(a.shape[:3]).at[1].set(0.0)
    for cfg, valid in ((OFFICIAL, [True, True]), (CORRECT, [True, False])):
        result = pixel_reward(a, b, mask, cfg)
        assert result.valid.tolist() == valid
        assert float(result.score[1]) == 0.0 and float(result.score[0]) > 0.3
        assert np.isnan(result.psnr[1]) and np.isnan(result.ssim[1])


@pytest.mark.parametrize("cfg", [CORRECT, OFFICIAL])
def test_a_picture_that_is_not_finite_is_invalid(cfg):
    a, b = pictures()
    assert pixel_reward(a.at[0, 0, 0, 0].set(jnp.nan), b, half_mask(a), cfg).valid.tolist() == [False, True]


def test_only_kept_pixels_count():
    a, b = pictures()
    mask = half_mask(a)
    edited = jnp.where(mask[..., None] > 0, b, 1.0 - b)
    for variant in ("correct", "official"):
        np.testing.assert_allclose(masked_psnr(edited, a, mask, variant), masked_psnr(b, a, mask, variant), rtol=1e-5)
        np.testing.assert_allclose(masked_ssim(edited, a, mask, variant), masked_ssim(b, a, mask, variant), rtol=1e-4)


def test_correct_ssim_equals_scikit_image_where_windows_are_whole():
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    a, b = pictures((48, 40), batch=1)
    _, full = metrics.structural_similarity(
        np.asarray(a[0], np.float64),
        np.asarray(b[0], np.float64),
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1.0,
        full=True,
    )
    # The window at pixel (20, 17) lies inside a mask that keeps only its 11x11 neighbourhood.
    mask = np.zeros((1, 48, 40), np.float32)
    mask[0, 15:26, 12:23] = 1
    numerator = _ssim_by_hand(np.asarray(a[0], np.float64), np.asarray(b[0], np.float64), mask[0])
    np.testing.assert_allclose(masked_ssim(a, b, jnp.asarray(mask)), numerator, rtol=1e-4)
    whole = _ssim_by_hand(np.asarray(a[0], np.float64), np.asarray(b[0], np.float64), np.ones((48, 40)), full=True)
    np.testing.assert_allclose(whole[5:-5, 5:-5], full.mean(-1)[5:-5, 5:-5], rtol=1e-6)


def _ssim_by_hand(a, b, mask, full=False):
    """Pixel by pixel: Gaussian statistics over the kept pixels of each window, weights renormalised."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    h, w = mask.shape
    padded = [np.pad(v, ((5, 5), (5, 5), (0, 0))) for v in (a, b, mask[..., None])]
    values, support = np.zeros((h, w)), np.zeros((h, w))
    for y in range(h):
        for x in range(w):
            pa, pb, pm = (v[y : y + 11, x : x + 11] for v in padded)
            weight = window[..., None] * pm
            support[y, x] = weight.sum()
            if support[y, x] == 0:
                continue
            weight = weight / support[y, x]
            ma, mb = (pa * weight).sum((0, 1)), (pb * weight).sum((0, 1))
            va, vb = (pa**2 * weight).sum((0, 1)) - ma**2, (pb**2 * weight).sum((0, 1)) - mb**2
            cov = (pa * pb * weight).sum((0, 1)) - ma * mb
            c1, c2 = 1e-4, 9e-4
            values[y, x] = ((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean()
    used = (mask > 0) & (support >= 0.5)
    return values if full else values[used].mean()


def test_official_ssim_hardly_sees_the_difference_that_the_correct_one_sees():
    a, _ = pictures((64, 64), seed=1)
    other, _ = pictures((64, 64), seed=2)
    rng = np.random.default_rng(3)
    other = jnp.clip(other + jnp.asarray(0.2 * rng.normal(size=other.shape), jnp.float32), 0.0, 1.0)
    mask = jnp.ones(a.shape[:3])
    assert float(masked_ssim(a, other, mask, "official").min()) > 0.8
    assert float(masked_ssim(a, other, mask).max()) < 0.4


@pytest.mark.parametrize("size", [(7, 5), (1, 1)])
def test_pictures_smaller_than_the_window(size):
    a, _ = pictures(size)
    result = pixel_reward(a, a, jnp.ones(a.shape[:3]), CORRECT)
    np.testing.assert_allclose(result.score, 1.0, atol=1e-5)


def test_bad_input_is_named():
    a, b = pictures()
    with pytest.raises(UserError, match="pixel_variant is 'best'"):
        masked_mse(a, b, half_mask(a), "best")
    with pytest.raises(UserError, match="preserve_mask"):
        pixel_reward(a, b, jnp.ones((2, 3, 3)), CORRECT)
