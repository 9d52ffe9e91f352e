"""Intervals by bootstrap: against scipy's, and by simulation against what they promise."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score

from vit_hf.evaluation.intervals import compare, intervals, mean_intervals, share_interval
from vit_hf.evaluation.predictions import Predictions


def made(correct, loss=None, brier=None, classes=6, **more):
    """Predictions of images of class 0: right where that is asked for."""
    count = len(correct)
    top5 = np.tile(np.arange(5), (count, 1))
    top5[~np.asarray(correct)] = [5, 4, 3, 2, 1]
    ones = np.ones(count, dtype=np.float32)
    return Predictions(
        np.arange(count), np.zeros(count, dtype=np.int64), top5, np.full((count, 5), 0.2, dtype=np.float32),
        ones if loss is None else loss, ones if brier is None else brier, **more,
    )  # fmt: skip


def test_the_interval_of_a_mean_is_scipys_bca():
    """Of skewed values, where a symmetric interval is another one."""
    values = np.random.RandomState(0).exponential(size=60) ** 2
    (found,) = mean_intervals(values[:, None], resamples=20_000)
    expected = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(1))
    assert found == pytest.approx(list(expected.confidence_interval), rel=0.02)
    mean, half = values.mean(), 1.96 * values.std() / 60**0.5
    assert found[1] - mean > 1.2 * (mean - found[0]) and found[1] > mean + half


def test_nineteen_of_twenty_intervals_hold_the_truth():
    """500 sets of 200 images of a known accuracy (0.9) and loss (an exponential law, mean 1). The standard error of a
    share of 500 is 0.01."""
    rng = np.random.RandomState(0)
    inside = np.zeros(2)
    for trial in range(500):
        values = np.stack([rng.rand(200) < 0.9, rng.exponential(size=200)], axis=1)
        ends = mean_intervals(values, resamples=400, seed=trial)
        inside += [low <= truth <= high for (low, high), truth in zip(ends, (0.9, 1.0))]
    assert (0.92 < inside / 500).all() and (inside / 500 < 0.98).all(), inside / 500


def test_paired_intervals_hold_the_truth_and_are_narrower():
    """Two models that are often right on the same images: 0.85 and 0.80 in truth."""
    rng, inside, widths = np.random.RandomState(1), 0, []
    for trial in range(200):
        ease = rng.rand(150)
        first, second = ease < 0.85, ease < 0.80
        flip = rng.rand(150) < 0.05  # 5 % are answered anew
        second = np.where(flip, rng.rand(150) < 0.80, second)
        found = compare(made(first), made(second), resamples=300, seed=trial)
        low, high = found["accuracy_difference_interval"]
        inside += low <= 0.05 <= high
        alone = intervals(made(first), resamples=300)["eval_accuracy_interval"]
        widths.append((high - low) / (alone[1] - alone[0]))
    assert 0.91 < inside / 200 < 0.99 and np.median(widths) < 0.9


@pytest.mark.parametrize("right", [0, 1, 3, 57, 60])
def test_intervals_of_accuracies_stay_in_their_range_and_hold_the_estimate(right):
    correct = np.arange(60) < right
    low, high = intervals(made(correct))["eval_accuracy_interval"]
    assert 0 <= low <= right / 60 <= high <= 1 and low < high
    exact = stats.binomtest(right, 60).proportion_ci(method="exact")
    if right in (0, 60):  # a bootstrap would say that nothing else can be
        assert (low, high) == pytest.approx((exact.low, exact.high))
    else:
        assert (low, high) == pytest.approx((exact.low, exact.high), abs=0.03)


def test_intervals_are_those_of_each_number_and_come_out_the_same_again():
    rng = np.random.RandomState(2)
    predictions = made(rng.rand(300) < 0.7, rng.exponential(size=300).astype(np.float32), rng.rand(300))
    found = intervals(predictions)
    assert found == intervals(predictions) != intervals(predictions, seed=1)
    assert found.keys() == {f"eval_{name}_interval" for name in ("accuracy", "accuracy_top5", "loss", "brier")}
    low, high = found["eval_loss_interval"]
    assert low < predictions.loss.mean() < high and high - low == pytest.approx(4 * 300**-0.5, rel=0.25)
    wide, narrow = intervals(predictions, level=0.99), intervals(predictions, level=0.8)
    assert wide["eval_brier_interval"][0] < narrow["eval_brier_interval"][0]


def test_the_shares_of_nothing_and_of_all():
    assert share_interval(np.ones(10, dtype=bool), [1.0, 1.0])[0] == pytest.approx(0.025**0.1)
    assert share_interval(np.zeros(10, dtype=bool), [0.0, 0.0]) == [0.0, pytest.approx(1 - 0.025**0.1)]


def test_two_models_on_the_same_images():
    """McNemar's test as scipy computes it from the discordant pairs, and a table whose cells add up."""
    rng = np.random.RandomState(3)
    first, second = rng.rand(400) < 0.8, rng.rand(400) < 0.7
    losses = rng.exponential(size=(2, 400)).astype(np.float32)
    found = compare(made(first, losses[0]), made(second, losses[1]))
    only = [int((first & ~second).sum()), int((second & ~first).sum())]
    assert [found["only_first_right"], found["only_second_right"]] == only
    assert found["both_right"] + found["none_right"] + sum(only) == found["samples"] == 400
    assert found["mcnemar_p_value"] == pytest.approx(2 * stats.binom.cdf(min(only), sum(only), 0.5))
    assert found["accuracy"] == [accuracy_score(np.ones(400), side) for side in (first, second)]
    assert found["accuracy_difference"] == pytest.approx(first.mean() - second.mean())
    low, high = found["loss_difference_interval"]
    t = stats.t.interval(0.95, 399, *(getattr(losses[0] - losses[1], name)() for name in ("mean",)),
                         scale=stats.sem(losses[0] - losses[1]))  # fmt: skip
    assert (low, high) == pytest.approx(t, abs=0.02)


def test_a_model_against_itself():
    predictions = made(np.arange(50) < 40)
    found = compare(predictions, predictions)
    assert found["mcnemar_p_value"] == 1.0 and found["accuracy_difference_interval"] == [0.0, 0.0]
