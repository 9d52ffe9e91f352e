"""Average precision of each class and their mean as an `evaluate` module that loads from its own path, offline."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = (
    "For each class the mean, over the steps of its recall, of the precision among the samples that score at least as much: "
    "the area under its precision-recall curve without interpolation, as scikit-learn's average_precision_score."
)
_INPUTS = "predictions: the score of each class, K floats a sample. references: whether it is of the class, K bools."


class AveragePrecision(evaluate.Metric):
    """{"average_precision": K numbers in [0, 1], None for a class without a sample, "mean_average_precision": the mean of
    the others, None where there are none}"""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Sequence(datasets.Value("bool")),
                }
            ),
        )

    def _compute(self, predictions, references):
        scores, truth = np.asarray(predictions, dtype=np.float32), np.asarray(references, dtype=bool)
        found = [_average_precision(*columns) for columns in zip(scores.T, truth.T, strict=True)]
        known = [value for value in found if value is not None]
        return {
            "average_precision": found,
            "mean_average_precision": float(np.mean(known)) if known else None,
        }


def _average_precision(scores: np.ndarray, truth: np.ndarray) -> float | None:
    if not truth.any():
        return None
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # of samples that score the same
    hits = np.cumsum(truth[order])[ends]
    precision, recall = hits / (ends + 1), hits / truth.sum()
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))
