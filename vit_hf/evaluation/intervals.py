"""How sure a measured number is: intervals by bootstrap over the images, and two models on the same images.

The images are what is drawn at random: an interval says how far the number would move on other images of the same kind.
It knows nothing of another seed of training.
"""

import statistics
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from vit_hf.evaluation.predictions import Predictions
from vit_hf.evaluation.weighted import (
    Metric,
    calibration_error,
    class_metrics,
    mean_average_precision,
    several_metrics,
)

RESAMPLES = 2_000
LEVEL = 0.95
FEWER = 500  # of mean average precision, which takes a pass over all scores


def resampled(metric: Metric, count: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """What a metric says of bootstrap samples, each of `count` images drawn with replacement.

    Args:
        metric: of how often each image counts, int64 (count,): S values.

    Returns:
        float64 (resamples, S).
    """
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, count, count, dtype=np.int32) for _ in range(resamples))
    return np.array([metric(np.bincount(drawn, minlength=count)) for drawn in draws])


def mean_intervals(
    values: np.ndarray, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> list[list[float]]:
    """The bias-corrected and accelerated (BCa) interval of the mean of each column.

    Args:
        values: (N, S), a number an image.

    Returns:
        S pairs [low, high], never outside the smallest and the largest value. Where all values are the same, a bootstrap
        sees no spread: both ends are that value.

    Source: Efron 1987, "Better Bootstrap Confidence Intervals", sections 3 and 6; for a mean, the acceleration is the
    skewness of the values over 6 sqrt(N).
    """
    values = np.asarray(values, dtype=np.float64)
    means = resampled(lambda counts: counts @ values / len(values), len(values), resamples, seed)
    spread, found = values - values.mean(axis=0), []
    for drawn, estimate, column in zip(means.T, values.mean(axis=0), spread.T, strict=True):
        acceleration = (column**3).sum() / (6 * (column**2).sum() ** 1.5) if column.any() else 0.0
        # rounding alone moves the mean of values that are all the same
        found.append(bca(drawn, estimate, acceleration, level) if column.any() else [float(estimate)] * 2)
    return found


def bca(drawn: np.ndarray, estimate: float, acceleration: float, level: float = LEVEL) -> list[float]:
    """The bias-corrected and accelerated interval; without an acceleration the bias-corrected one.

    Args:
        drawn: float64 (resamples,), of bootstrap samples. estimate: of the images as they are.
    """
    normal, count = NormalDist(), len(drawn)
    # half of the ties: the mean of right and wrong answers takes few values
    ties = np.isclose(drawn, estimate, rtol=1e-12, atol=0)
    below = ((drawn < estimate) & ~ties).sum() + ties.sum() / 2
    bias = normal.inv_cdf(min(max(below / count, 0.5 / count), 1 - 0.5 / count))
    shares = []
    for share in ((1 - level) / 2, (1 + level) / 2):
        z = bias + normal.inv_cdf(share)
        shares.append(normal.cdf(bias + z / (1 - acceleration * z)))
    return np.quantile(drawn, shares).tolist()


def basic(drawn: np.ndarray, estimate: float, level: float = LEVEL) -> list[float]:
    """The basic interval of a number in [0, 1]: twice the estimate less the quantiles. What a draw adds, it takes away.

    Source: Davison and Hinkley 1997, "Bootstrap Methods and their Application", section 5.2.
    """
    quantiles = np.quantile(drawn, ((1 + level) / 2, (1 - level) / 2))
    return np.clip(2 * estimate - quantiles, 0, 1).tolist()


def share_interval(hits: np.ndarray, interval: list[float], level: float = LEVEL) -> list[float]:
    """The interval of a share. Where none or all of N images are hit, a bootstrap sees no spread: then the end inside
    is that of Clopper and Pearson.

    Args:
        hits: bool (N,). interval: that of `mean_intervals`.

    Source: Clopper and Pearson 1934; their end is closed there: ((1 - level) / 2)^(1 / N).
    """
    tail = ((1 - level) / 2) ** (1 / len(hits))
    if hits.all():
        return [tail, 1.0]
    return interval if hits.any() else [0.0, 1 - tail]


def intervals(
    predictions: Predictions, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, list[float]]:
    """{"eval_accuracy_interval": [low, high], ...} of the numbers that are means over images: eval_accuracy,
    eval_accuracy_top5, eval_loss and eval_brier."""
    hits = {"eval_accuracy": predictions.hits(1), "eval_accuracy_top5": predictions.hits(5)}
    means = hits | {"eval_loss": predictions.loss, "eval_brier": predictions.brier}
    values = np.stack([np.asarray(column, dtype=np.float64) for column in means.values()], axis=1)
    found = dict(zip(means, mean_intervals(values, level=level, resamples=resamples, seed=seed), strict=True))
    found |= {name: share_interval(column, found[name], level) for name, column in hits.items()}
    return {f"{name}_interval": interval for name, interval in found.items()}


def more_intervals(predictions: Predictions, multi_label: bool = False, *, seed: int = 0) -> dict[str, list[float]]:
    """{"eval_macro_f1_interval": [low, high], ...} of the numbers that are no means over images: with one label an image
    eval_macro_f1, eval_mean_per_class_accuracy and eval_expected_calibration_error; of `multi_label` eval_map,
    eval_f1_micro and eval_f1_macro.

    The calibration error of a draw is larger than that of the images it is drawn from, as that is larger than the true one:
    its interval is the basic one. The others are bias-corrected.

    Source: Efron 1987, section 3.
    """
    found = {}
    groups = [(calibration_error(predictions), ("eval_expected_calibration_error",), RESAMPLES)]
    if multi_label:
        groups.append(
            (several_metrics(predictions), ("eval_map", "eval_f1_micro", "eval_f1_macro"), fewer(predictions))
        )
    elif predictions.labels.ndim == 1:
        groups.append((class_metrics(predictions), ("eval_macro_f1", "eval_mean_per_class_accuracy"), RESAMPLES))
    for metric, names, resamples in groups:
        drawn = resampled(metric, len(predictions), resamples, seed).T
        estimates = metric(np.ones(len(predictions), dtype=np.int64))
        for name, values, estimate in zip(names, drawn, estimates, strict=True):
            if name == "eval_expected_calibration_error":
                found[f"{name}_interval"] = basic(values, estimate)
            else:
                found[f"{name}_interval"] = bca(values, estimate, 0.0)
    return found


def fewer(predictions: Predictions) -> int:
    """Draws for metrics of all scores: FEWER up to a million scores, down to 200 of more."""
    return int(np.clip(FEWER * 1_000_000 // predictions.scores.size, 200, FEWER))


def half_width(values: Sequence[float], level: float = LEVEL) -> float | None:
    """Of the interval of a mean by Student's t, over seeds or draws; None of a single value."""
    from scipy import stats

    if len(values) < 2:
        return None
    return float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def compare(
    one: Predictions, two: Predictions, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> dict:
    """Two models on the same images: differences (the first less the second) with their paired intervals, McNemar's exact
    test of the accuracies, and how often which was right.

    Returns:
        {"accuracy": [one, two], "accuracy_difference", "accuracy_difference_interval", the same of loss and, with one label
        an image, brier, else map; "mcnemar_p_value", "both_right", "only_first_right", "only_second_right", "none_right",
        "samples"}. Of several labels any is right for the accuracy.

    Source: McNemar 1947; its exact form is the binomial test of those that only one has right. Paired bootstrap: the
    images are drawn, and with each both models' answers (Efron and Tibshirani 1993, chapter 8).
    """
    from scipy.stats import binomtest

    first, second = one.correct, two.correct
    columns = {"accuracy": (first, second), "loss": (one.loss, two.loss)}
    if one.labels.ndim == 1:
        columns["brier"] = (one.brier, two.brier)
    pairs = {name: [np.asarray(side, dtype=np.float64) for side in sides] for name, sides in columns.items()}
    differences = np.stack([a - b for a, b in pairs.values()], axis=1)
    found: dict = {"samples": len(one)}
    ends = mean_intervals(differences, level=level, resamples=resamples, seed=seed)
    for (name, (a, b)), difference, interval in zip(pairs.items(), differences.T, ends, strict=True):
        found[name] = [float(a.mean()), float(b.mean())]
        found[f"{name}_difference"] = float(difference.mean())
        found[f"{name}_difference_interval"] = interval
    if one.labels.ndim == 2:
        found |= _compare_precision(one, two, level, min(resamples, fewer(one)), seed)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    decided = only_first + only_second
    found["mcnemar_p_value"] = float(binomtest(only_first, decided).pvalue) if decided else 1.0
    found |= {"both_right": int((first & second).sum()), "only_first_right": only_first}
    return found | {"only_second_right": only_second, "none_right": int((~first & ~second).sum())}


def _compare_precision(one: Predictions, two: Predictions, level: float, resamples: int, seed: int) -> dict:
    """Mean average precision as `compare` tells it; the interval is the bias-corrected one."""
    sides = [mean_average_precision(side) for side in (one, two)]

    def both(counts: np.ndarray) -> list[float]:
        return [metric(counts)[0] for metric in sides]

    values, drawn = both(np.ones(len(one), dtype=np.int64)), resampled(both, len(one), resamples, seed)
    difference = values[0] - values[1]
    interval = bca(drawn[:, 0] - drawn[:, 1], difference, 0.0, level)
    return {"map": values, "map_difference": difference, "map_difference_interval": interval}
