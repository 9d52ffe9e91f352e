"""Means, intervals and verdicts against tables and scipy's own tests."""

import pytest
from scipy import stats

from vit_hf.study.questions import Claim
from vit_hf.study.results import difference_interval, estimate, judge, overall, sample


def results(**cells):
    """{cell: accuracies of seeds 0, 1, ...} as the runs' results on 1,000 images."""
    return {
        name: {seed: {"eval_accuracy": value, "eval_samples": 1000} for seed, value in enumerate(values)}
        for name, values in cells.items()
    }


def test_mean_and_interval_of_three_seeds():
    """Student's t with two degrees of freedom: 4.303, a table's value."""
    found = estimate([0.90, 0.92, 0.94])
    assert found.mean == pytest.approx(0.92)
    assert found.half_width == pytest.approx(4.3027 * 0.02 / 3**0.5, rel=1e-4)
    assert str(found) == "0.9200 ± 0.0497"
    assert str(estimate([0.8, 0.99])) == "0.8950 (0.0000 to 1.0000)"  # of two seeds: no accuracy lies beyond
    assert str(estimate([0.5])) == "0.5000" and estimate([]) is None


def test_difference_is_welchs():
    a, b = [0.90, 0.92, 0.94], [0.80, 0.86, 0.81, 0.85]
    found = results(a=a, b=b)
    difference, low, high = difference_interval(sample(found, "a"), sample(found, "b"), 0.95)
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert difference == pytest.approx(0.09)
    assert (low, high) == pytest.approx((expected.low, expected.high))


def test_against_a_number_it_is_students():
    a = [0.90, 0.92, 0.94]
    _, low, high = difference_interval(sample(results(a=a), "a"), sample({}, 0.9), 0.95)
    expected = stats.ttest_1samp(a, 0.9).confidence_interval(0.95)
    assert (low, high) == pytest.approx((expected.low - 0.9, expected.high - 0.9))


def test_one_seed_is_tested_by_its_images():
    verdict = judge(Claim(greater="a", than="b"), results(a=[0.9], b=[0.8]))
    a, b = 902 / 1004, 802 / 1004  # two right and two wrong answers more
    error = (a * (1 - a) / 1004 + b * (1 - b) / 1004) ** 0.5
    assert f"[{0.1 - 1.959964 * error:+.4f}, {0.1 + 1.959964 * error:+.4f}]" in verdict.result
    assert verdict.verdict == "supported" and "one seed of a, b" in verdict.result


@pytest.mark.parametrize(
    "a, margin, expected",
    [
        ((0.90, 0.91, 0.92), 0.0, "supported"),
        ((0.90, 0.91, 0.92), 0.1, "undecided"),
        ((0.90, 0.91, 0.92), 0.2, "contradicted"),
        ((0.80, 0.81, 0.82), 0.0, "undecided"),
        ((0.70, 0.71, 0.72), 0.0, "contradicted"),
        ((0.80, 0.81, 0.82), -0.05, "supported"),
    ],
)
def test_greater(a, margin, expected):
    verdict = judge(Claim(greater="a", than="b", margin=margin), results(a=a, b=(0.80, 0.81, 0.82)))
    assert verdict.verdict == expected
    assert verdict.test.startswith("a > b")


@pytest.mark.parametrize(
    "c, within, expected",
    [
        ((0.80, 0.81, 0.82), 0.05, "supported"),
        ((0.80, 0.81, 0.82), 0.01, "undecided"),  # as far as one can say they may differ by more
        ((0.90, 0.91, 0.92), 0.05, "contradicted"),
    ],
)
def test_equal_holds_every_pair(c, within, expected):
    found = results(a=(0.80, 0.81, 0.82), b=(0.801, 0.811, 0.821), c=c)
    verdict = judge(Claim(equal=("a", "b", "c"), within=within), found)
    assert verdict.verdict == expected


def test_what_was_not_run_is_not_tested():
    found = results(a=(0.8, 0.9))
    assert judge(Claim(greater="a", than="b"), found).verdict == "not tested"
    verdict = judge(Claim(equal=("a", "b"), within=1), found)
    assert (verdict.verdict, verdict.result) == ("not tested", "no result of b")
    assert overall([verdict, judge(Claim(greater="a", than=0.1), found)]) == "1 of 2 supported, 1 not tested"


def test_no_spread_is_no_certainty():
    """One image of a thousand more, by every seed; and all right on a small set, by one seed."""
    found = results(a=(0.901, 0.901), b=(0.9, 0.9))
    for claim in (Claim(greater="a", than="b"), Claim(equal=("a", "b"), within=0.02)):
        verdict = judge(claim, found)
        assert verdict.verdict == "undecided" and "the same for all seeds" in verdict.result
    assert str(estimate([0.9, 0.9])) == "0.9000 (all seeds)"
    one = {name: {0: {"eval_accuracy": value, "eval_samples": 20}} for name, value in (("a", 1.0), ("b", 0.95))}
    assert judge(Claim(greater="a", than="b"), one).verdict == "undecided"
