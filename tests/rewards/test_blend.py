import numpy as np
import pytest

from cocoedit_jax.errors import UserError
from cocoedit_jax.rewards.blend import blend


def test_weighted_sum():
    total, valid = blend({"judge": [0.5, 1.0], "pixel": np.array([1.0, 0.0], np.float32)}, {"judge": 0.8, "pixel": 0.2})
    np.testing.assert_allclose(total, [0.6, 0.8])
    assert valid.all() and total.dtype == np.float64


def test_an_unknown_part_makes_the_sample_unknown():
    total, valid = blend(
        {"judge": [None, 0.5, 0.5, np.inf], "pixel": [1.0, 1.0, 1.0, 1.0]},
        {"judge": 0.8, "pixel": 0.2},
        {"pixel": [True, False, True, True]},
    )
    assert valid.tolist() == [False, False, True, False]
    np.testing.assert_allclose(total, [np.nan, np.nan, 0.6, np.nan])


def test_rewards_without_weight_are_ignored():
    total, valid = blend({"judge": [0.5], "pixel": [np.nan]}, {"judge": 1.0, "pixel": 0.0})
    assert valid.all() and total.tolist() == [0.5]


@pytest.mark.parametrize(
    ("rewards", "weights", "named"),
    [
        ({"judge": [1.0]}, {"judge": 1.0, "pixel": 0.2}, "pixel"),
        ({"judge": [1.0], "pixel": [1.0, 2.0]}, {"judge": 1.0, "pixel": 0.2}, "'pixel' has shape"),
        ({"judge": [1.0]}, {"judge": 0.0}, "at least one weight"),
    ],
)
def test_bad_input_is_named(rewards, weights, named):
    with pytest.raises(UserError, match=named):
        blend(rewards, weights)
