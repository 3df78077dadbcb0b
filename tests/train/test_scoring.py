"""Edit distance and error rates, against answers counted by hand and the metric's axioms."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mha_jax.train.scoring import edit_distance, error_rates

words = st.lists(st.sampled_from("abc"), max_size=6)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("ab", "ba", 2), ("abc", "abc", 0)],
)
def test_known_distances(a, b, distance):
    assert edit_distance(a, b) == distance


@given(words, words, words)
def test_distance_is_a_metric(a, b, c):
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


def test_rates_weigh_symbols_and_words():
    rates = error_rates([("K", "AE"), ("B", "IY"), ()], [("K", "AE", "T"), ("B", "IY"), ("AH",)])
    assert rates == (2 / 6, 1 / 3)


def test_a_missing_answer_is_an_error():
    with pytest.raises(ValueError, match="longer"):
        error_rates([("K",)], [("K",), ("T",)])
