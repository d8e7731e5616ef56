"""What processes agree on when each reads records of its own."""

import ml_dtypes
import numpy as np

from cocoedit_jax.train.loading import _filled


def test_texts_are_as_long_as_the_longest_of_any_process():
    rng = np.random.default_rng(0)
    text = {"text": rng.random((2, 3, 4)).astype(ml_dtypes.bfloat16), "mask": np.ones((2, 3), bool), "id": np.arange(2)}
    shapes = [[[], [3], [3, 4]], [[], [5], [5, 4]]]  # of this process and another, in the order of the leaves
    found = _filled(text, shapes)
    assert found["text"].dtype == text["text"].dtype and found["text"].shape == (2, 5, 4)
    np.testing.assert_array_equal(found["text"][:, :3], text["text"])
    assert not found["text"][:, 3:].any() and found["mask"].tolist() == [[True] * 3 + [False] * 2] * 2
    assert found["id"] is text["id"]
