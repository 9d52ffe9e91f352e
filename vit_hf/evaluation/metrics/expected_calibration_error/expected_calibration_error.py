"""Expected calibration error as an `evaluate` module that loads from its own path, offline."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = (
    "How far the probability of the predicted class is from the share of right answers: the mean distance over bins of "
    "equal width of that probability, weighted by their samples (top-label, 15 bins)."
)
_CITATION = "Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv 1706.04599, equation 3."
_INPUTS = (
    "predictions: the probability of the predicted class, float. references: 1 where that class is the true one, else 0. "
    "num_bins: of equal width, the upper end of each belongs to it (default 15)."
)


class ExpectedCalibrationError(evaluate.Metric):
    """{"expected_calibration_error": in [0, 1]; what a reliability diagram shows: "bin_samples", and of each bin
    "bin_confidence" and "bin_accuracy", None where it is empty}"""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float32"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, num_bins=15):
        edges = np.linspace(0, 1, num_bins + 1)[1:-1].astype(np.float32)  # so that 0.2 is the 0.2 of the predictions
        bins = np.searchsorted(edges, np.asarray(predictions, dtype=np.float32), side="left")
        confidence, right = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
        samples = np.bincount(bins, minlength=num_bins)
        sums = [np.bincount(bins, weights=values, minlength=num_bins) for values in (confidence, right)]
        means = [[float(s / n) if n else None for s, n in zip(each, samples, strict=True)] for each in sums]
        return {
            "expected_calibration_error": float(np.abs(sums[0] - sums[1]).sum() / len(right)),
            "bin_samples": samples.tolist(),
            "bin_confidence": means[0],
            "bin_accuracy": means[1],
        }
