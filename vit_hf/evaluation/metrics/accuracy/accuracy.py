"""Top-1 accuracy as an `evaluate` module that loads from its own path, offline."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "Share of samples whose predicted class is the reference class."
_INPUTS = "predictions: the class with the highest score, int. references: the true class, int."


class Accuracy(evaluate.Metric):
    """{"accuracy": in [0, 1]}"""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
