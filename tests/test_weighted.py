"""Metrics of images that count several times: scikit-learn's with sample_weight, and intervals that are made of them."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, recall_score

from vit_hf.evaluation.evaluate import average_precisions, measure, measure_fully
from vit_hf.evaluation.intervals import basic, compare, more_intervals, resampled
from vit_hf.evaluation.predictions import Predictions
from vit_hf.evaluation.weighted import calibration_error, class_metrics, mean_average_precision, several_metrics


def one_label(count, classes=6, share=0.7, seed=0, sure=None):
    """Right in a share of the images; nothing but the best class is looked at."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count)
    best = np.where(rng.random(count) < share, labels, rng.integers(classes, size=count))
    sure = rng.uniform(0.2, 1, count) if sure is None else sure
    column, ones = sure.astype(np.float32)[:, None], np.ones(count, np.float32)
    return Predictions(np.arange(count), labels, best[:, None], column, ones, ones)


def several_labels(count, classes=5, seed=0, signal=2.5):
    """Scores of two places: some are the same."""
    rng = np.random.default_rng(seed)
    labels = rng.random((count, classes)) < 0.25
    scores = 1 / (1 + np.exp(-(rng.normal(size=labels.shape) + signal * labels - 1.5)))
    scores, losses = scores.round(2).astype(np.float32), rng.random(count).astype(np.float32)
    top5 = np.argsort(-scores, axis=1)
    best = np.take_along_axis(scores, top5, axis=1)
    return Predictions(np.arange(count), labels, top5, best, losses, losses, scores)


@pytest.fixture(scope="module")
def counts():
    return np.random.default_rng(9).integers(0, 4, size=80)


def test_macro_f1_and_recall_are_scikit_learns(counts):
    predictions = one_label(80)
    labels, best = predictions.labels, predictions.top5[:, 0]
    found = class_metrics(predictions)(counts)
    assert found[0] == pytest.approx(f1_score(labels, best, average="macro", sample_weight=counts))
    assert found[1] == pytest.approx(recall_score(labels, best, average="macro", sample_weight=counts))
    only = np.where(labels == 2, 1, 0)  # the other classes are answered, and no image has them
    kept = only > 0
    expected = f1_score(labels[kept], best[kept], average="macro", zero_division=0)
    assert class_metrics(predictions)(only)[0] == pytest.approx(expected)


def test_average_precision_and_f1_of_several_labels_are_scikit_learns(counts):
    predictions = several_labels(80)
    labels, scores, answered = predictions.labels, predictions.scores, predictions.scores > 0.5
    each = [average_precision_score(labels[:, k], scores[:, k], sample_weight=counts) for k in range(5)]
    expected = [np.mean(each)] + [
        f1_score(labels, answered, average=a, sample_weight=counts) for a in ("micro", "macro")
    ]
    assert several_metrics(predictions)(counts) == pytest.approx(expected, abs=1e-6)


def test_where_each_image_counts_once_they_are_the_numbers_that_are_reported():
    ones = np.ones(80, dtype=np.int64)
    predictions = one_label(80, sure=np.linspace(0, 1, 80))  # on edges of bins, 1 among them
    numbers, _ = measure_fully(predictions)
    found = class_metrics(predictions)(ones) + calibration_error(predictions)(ones)
    names = ("macro_f1", "mean_per_class_accuracy", "expected_calibration_error")
    assert found == [pytest.approx(numbers[f"eval_{name}"]) for name in names]
    predictions = several_labels(80)
    numbers = measure(predictions, multi_label=True)
    names = ("map", "f1_micro", "f1_macro")
    assert several_metrics(predictions)(ones) == [pytest.approx(numbers[f"eval_{name}"]) for name in names]
    assert mean_average_precision(predictions)(ones)[0] == average_precisions(predictions)["mean_average_precision"]


def test_intervals_hold_the_number_and_narrow_with_more_images():
    few, many = (more_intervals(one_label(count)) for count in (100, 1600))
    assert few.keys() == {f"eval_{name}_interval" for name in ("macro_f1", "mean_per_class_accuracy",
                                                               "expected_calibration_error")}  # fmt: skip
    for name, (low, high) in many.items():
        assert few[name][1] - few[name][0] == pytest.approx(4 * (high - low), rel=0.35)
    value = measure_fully(one_label(1600))[0]["eval_macro_f1"]
    assert many["eval_macro_f1_interval"][0] < value < many["eval_macro_f1_interval"][1]
    found = more_intervals(several_labels(100), multi_label=True)
    low, high = found["eval_map_interval"]
    assert 0 < low < measure(several_labels(100), multi_label=True)["eval_map"] < high < 1


def test_the_calibration_errors_interval_leaves_out_what_resampling_adds():
    """Of 60 sets of 300 images whose true error is 0.1; a plain quantile of the draws holds it less often."""
    inside = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        sure = rng.uniform(0.5, 1, 300)
        labels = (rng.random(300) >= sure - 0.1).astype(np.int64)  # class 0 is answered
        column, ones = sure.astype(np.float32)[:, None], np.ones(300, np.float32)
        predictions = Predictions(np.arange(300), labels, np.zeros((300, 1), np.int64), column, ones, ones)
        drawn = resampled(calibration_error(predictions), 300, 100, seed)[:, 0]
        low, high = basic(drawn, calibration_error(predictions)(np.ones(300, np.int64))[0])
        inside += low <= 0.1 <= high
    assert inside >= 50, inside


def test_two_models_of_several_labels():
    """The difference of mean average precisions, paired: zero of a model and itself, and above it of a better one."""
    plain, better = several_labels(300), several_labels(300, signal=4.0)
    found = compare(better, plain)
    expected = [measure(side, multi_label=True)["eval_map"] for side in (better, plain)]
    assert found["map"] == pytest.approx(expected) and "brier" not in found
    low, high = found["map_difference_interval"]
    assert 0 < low < found["map_difference"] < high < 0.5
    assert compare(plain, plain)["map_difference_interval"] == [0, 0]


def test_the_calibration_interval_is_the_basic_one():
    predictions = one_label(200)
    drawn = resampled(calibration_error(predictions), 200)[:, 0]
    estimate = measure_fully(predictions)[0]["eval_expected_calibration_error"]
    low, high = more_intervals(predictions)["eval_expected_calibration_error_interval"]
    assert [low, high] == pytest.approx(2 * estimate - np.quantile(drawn, (0.975, 0.025)))
    assert drawn.mean() > estimate > (low + high) / 2  # it goes down as far as the draws go up
