"""Macro F1 as an `evaluate` module that loads from its own path, offline."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "Mean over the classes of the harmonic mean of precision and recall."
_INPUTS = "predictions: the class with the highest score, int. references: the true class, int."


class MacroF1(evaluate.Metric):
    """{"macro_f1": in [0, 1]}; over the classes that are predicted or true somewhere."""

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
        predictions, references = np.asarray(predictions), np.asarray(references)
        size = int(max(predictions.max(), references.max())) + 1
        predicted, true = np.bincount(predictions, minlength=size), np.bincount(references, minlength=size)
        hit = np.bincount(references[predictions == references], minlength=size)
        seen = predicted + true > 0
        return {"macro_f1": float(np.mean(2 * hit[seen] / (predicted + true)[seen]))}
