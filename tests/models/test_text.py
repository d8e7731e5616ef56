import jax
import numpy as np
import pytest
from flax import linen as nn

from cocoedit_jax.models.text import PAD, UNKNOWN, TableTextEncoder, WordTokenizer

TOKENIZER = WordTokenizer(("make", "the", "circle", "red", "2"), max_length=5)


def test_words_become_ids():
    ids = TOKENIZER(["Make the circle, red!", "make the zebra 2", "THE"])
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, [[2, 3, 4, 5, PAD], [2, 3, UNKNOWN, 6, PAD], [3, PAD, PAD, PAD, PAD]])
    assert ids.max() < TOKENIZER.num_ids


@pytest.mark.parametrize("prompt, count", [("", 0), ("?!", 0), ("make the circle red red red", 6)])
def test_prompts_of_the_wrong_length_are_named(prompt, count):
    with pytest.raises(ValueError, match=f"has {count} words; expected 1 to 5"):
        TOKENIZER(["make", prompt])


@pytest.fixture(scope="module")
def encode():
    encoder = TableTextEncoder(TOKENIZER.num_ids, 5, features=4, pooled_features=3)
    params = nn.unbox(encoder.init(jax.random.key(0), TOKENIZER(["make"])))
    return lambda *prompts: encoder.apply(params, TOKENIZER(list(prompts)))


def test_states_know_the_word_before(encode):
    states, pooled = encode("make the circle red", "make the red circle", "make red circle the")
    assert states.shape == (3, 5, 4) and pooled.shape == (3, 3)
    assert np.allclose(states[0, :2], states[1, :2])
    assert not np.allclose(states[0, 2:4], states[1, 2:4])
    assert not np.allclose(states[1, 3], states[2, 2])  # same word, another one before it


def test_pooled_ignores_padding_and_scales_with_the_words(encode):
    _, pooled = encode("make", "make make make make")
    np.testing.assert_allclose(pooled[1], 2 * pooled[0], rtol=1e-6)  # sum / sqrt(count)
