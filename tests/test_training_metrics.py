"""The metrics of answers, on cases that can be found by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.training.config import Metric
from minilora.training.metrics import METRICS, exact_match, rougeL

words = st.lists(st.sampled_from(["the", "key", "is", "under", "a", "mat"]), min_size=1, max_size=8)


def test_exact_match_is_character_for_character():
    assert exact_match(['{"x": 1}', '{"x":2}', "yes ", "no"], ['{"x": 1}', '{"x": 2}', "yes", "no"]) == 0.5


def test_the_names_of_the_settings_are_those_of_the_metrics():
    assert list(METRICS) == list(Metric.__args__)


def longest_common(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + longest_common(a[:-1], b[:-1])
    return max(longest_common(a[:-1], b), longest_common(a, b[:-1]))


@given(words, words)
def test_rougeL_is_the_F1_of_the_longest_common_subsequence(answer, wanted):
    pytest.importorskip("rouge_score")
    common = longest_common(answer, wanted)
    expected = 2 * common / (len(answer) + len(wanted))
    assert rougeL([" ".join(answer)], [" ".join(wanted)]) == pytest.approx(expected)


def test_metrics_are_means_over_the_answers():
    pytest.importorskip("rouge_score")
    assert rougeL(["under the mat", "no"], ["under the mat", "yes"]) == 0.5
