"""Top-5 accuracy as an `evaluate` module that loads from its own path, offline."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "Share of samples whose reference class is among the five predicted ones (all, with fewer classes)."
_INPUTS = "predictions: the best classes, best first, at most five are read. references: the true class, int."


class Top5Accuracy(evaluate.Metric):
    """{"top5_accuracy": in [0, 1]}"""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("int64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        best = np.asarray(predictions)[:, :5]
        return {"top5_accuracy": float(np.mean((best == np.asarray(references)[:, None]).any(axis=1)))}
