"""How sure a measured number is: intervals by bootstrap over the images, and two models on the same images.

The images are what is drawn at random: an interval says how far the number would move on other images of the same kind.
It knows nothing of another seed of training.
"""

from statistics import NormalDist

import numpy as np

from vit_hf.evaluation.predictions import Predictions

RESAMPLES = 2_000
LEVEL = 0.95
AT_ONCE = 4_000_000  # numbers that are drawn at once


def resampled_means(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Means of bootstrap samples, each of N images drawn with replacement; the columns share the draws.

    Args:
        values: (N, S), a number an image.

    Returns:
        float64 (resamples, S).
    """
    rng, count = np.random.default_rng(seed), len(values)
    means, step = [], max(1, AT_ONCE // (count * values.shape[1]))
    for start in range(0, resamples, step):
        drawn = rng.integers(0, count, (min(step, resamples - start), count), dtype=np.int32)
        means.append(values[drawn].mean(axis=1))
    return np.concatenate(means)


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
    means, spread = resampled_means(values, resamples, seed), values - values.mean(axis=0)
    return [
        _bca(means[:, column], values[:, column].mean(), spread[:, column], level) for column in range(values.shape[1])
    ]


def _bca(means: np.ndarray, estimate: float, spread: np.ndarray, level: float) -> list[float]:
    if not spread.any():
        return [float(estimate)] * 2
    normal, count = NormalDist(), len(means)
    # half of the ties: the mean of right and wrong answers takes few values
    below = ((means < estimate).sum() + (means == estimate).sum() / 2) / count
    bias = normal.inv_cdf(min(max(below, 0.5 / count), 1 - 0.5 / count))
    acceleration = (spread**3).sum() / (6 * (spread**2).sum() ** 1.5)
    shares = []
    for share in ((1 - level) / 2, (1 + level) / 2):
        z = bias + normal.inv_cdf(share)
        shares.append(normal.cdf(bias + z / (1 - acceleration * z)))
    return np.quantile(means, shares).tolist()


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


def compare(
    one: Predictions, two: Predictions, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> dict:
    """Two models on the same images: differences (the first less the second) with their paired intervals, McNemar's exact
    test of the accuracies, and how often which was right.

    Returns:
        {"accuracy": [one, two], "accuracy_difference", "accuracy_difference_interval", the same of loss and brier,
        "mcnemar_p_value", "both_right", "only_first_right", "only_second_right", "none_right", "samples"}

    Source: McNemar 1947; its exact form is the binomial test of those that only one has right. Paired bootstrap: the
    images are drawn, and with each both models' answers (Efron and Tibshirani 1993, chapter 8).
    """
    from scipy.stats import binomtest

    first, second = one.correct, two.correct
    columns = {"accuracy": (first, second), "loss": (one.loss, two.loss), "brier": (one.brier, two.brier)}
    pairs = {name: [np.asarray(side, dtype=np.float64) for side in sides] for name, sides in columns.items()}
    differences = np.stack([a - b for a, b in pairs.values()], axis=1)
    found: dict = {"samples": len(one)}
    ends = mean_intervals(differences, level=level, resamples=resamples, seed=seed)
    for (name, (a, b)), difference, interval in zip(pairs.items(), differences.T, ends, strict=True):
        found[name] = [float(a.mean()), float(b.mean())]
        found[f"{name}_difference"] = float(difference.mean())
        found[f"{name}_difference_interval"] = interval
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    decided = only_first + only_second
    found["mcnemar_p_value"] = float(binomtest(only_first, decided).pvalue) if decided else 1.0
    found |= {"both_right": int((first & second).sum()), "only_first_right": only_first}
    return found | {"only_second_right": only_second, "none_right": int((~first & ~second).sum())}
