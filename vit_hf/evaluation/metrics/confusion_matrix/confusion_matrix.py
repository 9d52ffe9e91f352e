"""The confusion matrix as an `evaluate` module that loads from its own path, offline."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "How many samples of each class are predicted as which class."
_INPUTS = (
    "predictions: the class with the highest score, int. references: the true class, int. num_classes: how many there are "
    "(default: the largest that is seen, and those below it)."
)


class ConfusionMatrix(evaluate.Metric):
    """{"confusion_matrix": int64 (K, K), a row a true class, a column a predicted one}"""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, num_classes=None):
        predictions, references = np.asarray(predictions), np.asarray(references)
        size = num_classes or int(max(predictions.max(), references.max())) + 1
        counts = np.bincount(references * size + predictions, minlength=size * size)
        return {"confusion_matrix": counts.reshape(size, size)}
