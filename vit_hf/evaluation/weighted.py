"""Metrics of images that count several times or not at all, as a bootstrap draws them: those that are no means over images.

Each is prepared once for the answers of a model and then asked for each draw. Where each image counts once they give what the
modules of metrics/ give. Knows arrays alone.
"""

from collections.abc import Callable

import numpy as np

from vit_hf.evaluation.predictions import Predictions

BINS = 15  # of the calibration error, as in metrics/expected_calibration_error
SURE = 0.5  # a class of several is answered above it

Metric = Callable[[np.ndarray], list[float]]  # int64 (N,), how often each image counts -> values


def class_metrics(predictions: Predictions) -> Metric:
    """Macro F1 and mean per-class accuracy, of one label an image."""
    labels, best = predictions.labels, predictions.top5[:, 0]
    right, size = best == labels, int(max(labels.max(), best.max())) + 1

    def measured(counts: np.ndarray) -> list[float]:
        labelled, answered = (np.bincount(classes, counts, size) for classes in (labels, best))
        hit, both = np.bincount(labels[right], counts[right], size), labelled + answered
        f1, recall = 2 * hit[both > 0] / both[both > 0], hit[labelled > 0] / labelled[labelled > 0]
        return [float(f1.mean()), float(recall.mean())]

    return measured


def calibration_error(predictions: Predictions) -> Metric:
    """Expected calibration error of the best class."""
    edges = np.linspace(0, 1, BINS + 1)[1:-1].astype(np.float32)
    bins = np.searchsorted(edges, predictions.probabilities[:, 0].astype(np.float32), side="left")
    gaps = predictions.probabilities[:, 0].astype(np.float64) - predictions.correct

    def measured(counts: np.ndarray) -> list[float]:
        return [float(np.abs(np.bincount(bins, counts * gaps)).sum() / counts.sum())]

    return measured


def several_metrics(predictions: Predictions) -> Metric:
    """Mean average precision, micro F1 and macro F1, of several labels an image."""
    precision, truth = mean_average_precision(predictions), predictions.labels
    sums = truth.astype(np.float32), ((predictions.scores > SURE) & truth).astype(np.float32)
    answered = (predictions.scores > SURE).astype(np.float32)

    def measured(counts: np.ndarray) -> list[float]:
        weights = counts.astype(np.float32)  # exact for whole numbers up to 2^24
        labelled, right = (weights @ column for column in sums)
        both = labelled + weights @ answered
        seen = labelled > 0
        macro = float((2 * right[seen] / both[seen]).mean()) if seen.any() else 0.0
        return [*precision(counts), float(2 * right.sum() / max(1.0, both.sum())), macro]

    return measured


def mean_average_precision(predictions: Predictions) -> Metric:
    """The mean over the classes that an image of the draw has, as in metrics/average_precision."""
    prepared = [_ranked(*columns) for columns in zip(predictions.scores.T, predictions.labels.T, strict=True)]

    def measured(counts: np.ndarray) -> list[float]:
        found, counts = [], counts.astype(np.int32)
        for order, true, ends, last in prepared:
            weights = counts[order]
            hits = weights[true]
            if total := hits.sum():
                precision = hits.cumsum()[last] / np.maximum(weights.cumsum()[ends], 1)
                found.append(float(hits @ precision / total))
        return [float(np.mean(found)) if found else 0.0]

    return measured


def _ranked(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of one class: the images, best first; the places of those that have it; for each of these where the last image of the
    same score stands, and which of these is the last one up to there."""
    order = np.argsort(-scores, kind="stable").astype(np.int32)
    true = np.flatnonzero(labels[order]).astype(np.int32)
    same = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    ends = same[np.searchsorted(same, true)]
    return order, true, ends, np.searchsorted(true, ends, side="right") - 1
