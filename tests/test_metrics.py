"""The metric modules of a whole split, against scikit-learn and plain loops."""

import evaluate
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, brier_score_loss, confusion_matrix, f1_score, recall_score

from tests.test_evaluate import offline  # noqa: F401 - a fixture
from vit_hf.evaluation.evaluate import METRICS


def load(name):
    return evaluate.load(str(METRICS / name), keep_in_memory=True)


def answers(num, classes, seed=0):
    """Labels and predictions that are right more often than not; the last class is never true and the one before it
    never predicted."""
    rng = np.random.RandomState(seed)
    labels = rng.randint(0, classes - 1, num)
    predicted = np.where(rng.rand(num) < 0.6, labels, rng.randint(0, classes, num))
    predicted[predicted == classes - 2] = classes - 1
    return labels, predicted


@pytest.mark.parametrize("classes", [3, 7, 30])
def test_macro_f1_is_scikit_learns(offline, classes):  # noqa: F811
    labels, predicted = answers(200, classes)
    found = load("macro_f1").compute(predictions=predicted, references=labels)
    assert found == {"macro_f1": pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))}
    only = load("macro_f1").compute(predictions=[5, 5, 2], references=[5, 5, 5])  # classes that nobody names are none
    assert only["macro_f1"] == pytest.approx(f1_score([5, 5, 5], [5, 5, 2], average="macro", zero_division=0))


def test_accuracy_of_each_class_is_its_recall(offline):  # noqa: F811
    labels, predicted = answers(300, 7)
    found = load("per_class_accuracy").compute(predictions=predicted, references=labels, num_classes=7)
    recalls = recall_score(labels, predicted, average=None, labels=np.arange(6))
    assert found["per_class_accuracy"] == [*map(pytest.approx, recalls), None]  # the last class has no sample
    assert found["mean_per_class_accuracy"] == pytest.approx(recalls.mean())


def test_confusion_matrix_is_scikit_learns(offline):  # noqa: F811
    labels, predicted = answers(300, 7)
    found = load("confusion_matrix").compute(predictions=predicted, references=labels, num_classes=9)
    assert np.array_equal(found["confusion_matrix"], confusion_matrix(labels, predicted, labels=np.arange(9)))


def test_brier_score_is_scikit_learns(offline):  # noqa: F811
    rng = np.random.RandomState(0)
    probabilities = rng.dirichlet(np.ones(6), 100).astype(np.float32)
    probabilities /= probabilities.sum(1, keepdims=True)
    labels = rng.randint(0, 6, 100)
    found = load("brier").compute(predictions=probabilities, references=labels)
    expected = brier_score_loss(labels, probabilities, labels=np.arange(6), scale_by_half=False)
    assert found == {"brier": pytest.approx(expected, rel=1e-6)}


def ece_by_loop(confidence, right, bins):
    """Guo et al., equation 3, one bin (low, high] after the other."""
    total = 0.0
    for number in range(bins):
        low, high = number / bins, (number + 1) / bins
        inside = [
            place for place, value in enumerate(confidence) if low < value <= high or (number == 0 and value == 0)
        ]
        if inside:
            gap = sum(confidence[place] for place in inside) - sum(right[place] for place in inside)
            total += abs(gap) / len(confidence)
    return total


@pytest.mark.parametrize("bins", [15, 4])
def test_expected_calibration_error_is_that_of_a_plain_loop(offline, bins):  # noqa: F811
    rng = np.random.RandomState(1)
    # with the edges of the bins, and numbers that binary fractions hold to the bit
    confidence = np.concatenate([rng.randint(0, 1025, 400) / 1024, [0.0, 0.25, 0.5, 0.75, 1.0]])
    right = (rng.rand(405) < confidence**2).astype(int)  # too sure of itself
    found = load("expected_calibration_error").compute(predictions=confidence, references=right, num_bins=bins)
    assert found["expected_calibration_error"] == pytest.approx(ece_by_loop(confidence, right, bins), abs=1e-12)
    assert found["expected_calibration_error"] > 0.1 and sum(found["bin_samples"]) == 405
    gaps = [
        n * abs(c - a)
        for n, c, a in zip(found["bin_samples"], found["bin_confidence"], found["bin_accuracy"])
        if n  # what the diagram shows is what the number sums up
    ]
    assert sum(gaps) / 405 == pytest.approx(found["expected_calibration_error"], abs=1e-12)


def test_an_edge_belongs_to_the_bin_below_it(offline):  # noqa: F811
    """3/15 in single precision is a little more than 0.2."""
    edge = np.float32(3 / 15)
    found = load("expected_calibration_error").compute(predictions=[edge], references=[1])
    assert np.flatnonzero(found["bin_samples"]).tolist() == [2]
    assert found["bin_accuracy"][2] == 1.0 and found["bin_accuracy"][3] is None


def test_metrics_of_classes_can_be_combined(offline):  # noqa: F811
    labels, predicted = answers(100, 5)
    names = ("accuracy", "macro_f1", "per_class_accuracy", "confusion_matrix")
    found = evaluate.combine([load(name) for name in names]).compute(predictions=predicted, references=labels)
    assert {"accuracy", "macro_f1", "mean_per_class_accuracy", "confusion_matrix"} <= found.keys()
    assert found["accuracy"] == accuracy_score(labels, predicted)
