"""Accuracy of each class as an `evaluate` module that loads from its own path, offline."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = (
    "For each class the share of its samples whose predicted class it is (its recall), and the mean of them."
)
_INPUTS = (
    "predictions: the class with the highest score, int. references: the true class, int. num_classes: how many there are "
    "(default: the largest that is seen, and those below it)."
)


class PerClassAccuracy(evaluate.Metric):
    """{"per_class_accuracy": K numbers in [0, 1], None for a class without samples, "mean_per_class_accuracy": of the
    others}"""

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
        count = np.bincount(references, minlength=size)
        hit = np.bincount(references[predictions == references], minlength=size)
        shares = [float(right / of) if of else None for right, of in zip(hit, count, strict=True)]
        mean = float(np.mean([share for share in shares if share is not None]))
        return {"per_class_accuracy": shares, "mean_per_class_accuracy": mean}
