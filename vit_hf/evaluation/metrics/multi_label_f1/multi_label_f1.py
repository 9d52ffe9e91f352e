"""F1 of sets with several labels an image as an `evaluate` module that loads from its own path, offline."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = (
    "The harmonic mean of precision and recall: of all decisions together (micro), and the mean over the classes that have "
    "a sample (macro)."
)
_INPUTS = (
    "predictions: whether a class is answered, K bools a sample. references: whether it is of the class, K bools."
)


class MultiLabelF1(evaluate.Metric):
    """{"f1_micro", "f1_macro": in [0, 1]; 0 where nothing is right}"""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("bool")),
                    "references": datasets.Sequence(datasets.Value("bool")),
                }
            ),
        )

    def _compute(self, predictions, references):
        answered, truth = np.asarray(predictions, dtype=bool), np.asarray(references, dtype=bool)
        right, both = (answered & truth).sum(0), answered.sum(0) + truth.sum(0)
        shares = 2 * right[truth.any(0)] / both[truth.any(0)]
        return {
            "f1_micro": float(2 * right.sum() / max(1, both.sum())),
            "f1_macro": float(shares.mean()) if len(shares) else 0.0,
        }
