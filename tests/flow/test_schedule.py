import numpy as np
import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.flow.schedule import flow_match_sigmas

QWEN = {"max_shift": 0.9, "max_seq_len": 8192, "shift_terminal": 0.02}
PUBLISHED = {
    "kontext10": (10, {}, [1, 0.9441, 0.8825, 0.8142, 0.7380, 0.6525, 0.5559, 0.4459, 0.3195, 0.1726, 0]),
    "qwen10": (10, QWEN, [1, 0.9290, 0.8515, 0.7666, 0.6733, 0.5701, 0.4555, 0.3274, 0.1833, 0.02, 0]),
    "kontext6": (6, {}, [1, 0.9037, 0.7897, 0.6525, 0.4842, 0.2730, 0]),
    "qwen6": (6, QWEN, [1, 0.8625, 0.7028, 0.5151, 0.2913, 0.02, 0]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_schedules_of_the_editors_at_512_pixels(name):
    steps, options, expected = PUBLISHED[name]
    sigmas = flow_match_sigmas(steps, 1024, **options)
    assert sigmas.dtype == np.float64
    np.testing.assert_allclose(sigmas, expected, atol=6e-5)


def test_one_step_and_small_images():
    np.testing.assert_array_equal(flow_match_sigmas(1, 36, shift_terminal=0.02), [1.0, 0.0])
    assert np.all(np.diff(flow_match_sigmas(8, 36)) < 0)


@pytest.mark.parametrize(
    ("arguments", "options", "named"),
    [
        ((0, 1024), {}, "num_steps is 0"),
        ((4, 0), {}, "image_seq_len is 0"),
        ((4, 64), {"shift_terminal": 1.5}, "shift_terminal is 1.5"),
        ((4, 64), {"max_seq_len": 256}, "base_seq_len"),
    ],
)
def test_bad_input_is_named(arguments, options, named):
    with pytest.raises(UserError, match=named):
        flow_match_sigmas(*arguments, **options)
