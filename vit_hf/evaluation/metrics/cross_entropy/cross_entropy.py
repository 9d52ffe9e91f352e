"""Cross-entropy as an `evaluate` module that loads from its own path, offline."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "Mean negative log-likelihood of the reference classes, in nats."
_INPUTS = "predictions: the logarithm of the probability that the model gives the reference class, float."


class CrossEntropy(evaluate.Metric):
    """{"cross_entropy": nats, 0 or more}"""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float32"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        return {"cross_entropy": float(-np.mean(np.asarray(predictions, dtype=np.float64)))}
