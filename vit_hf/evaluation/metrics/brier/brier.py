"""The Brier score of several classes as an `evaluate` module that loads from its own path, offline."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = (
    "Mean over the samples of the squared distance of the probabilities from 1 for the true class and 0 else."
)
_CITATION = "Brier 1950, Verification of Forecasts Expressed in Terms of Probability, equation 2."
_INPUTS = "predictions: the probability of each class, K floats. references: the true class, int."


class Brier(evaluate.Metric):
    """{"brier": in [0, 2]}"""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        distance = np.array(predictions, dtype=np.float64)
        distance[np.arange(len(distance)), np.asarray(references)] -= 1
        return {"brier": float(np.mean((distance**2).sum(axis=1)))}
