"""Which of the numbers of an evaluation is the one that is shown, compared and published: the one place that says so."""

from collections.abc import Mapping
from typing import Any

# by their keys in metrics.jsonl, all_results.json and eval_results.json; each in [0, 1], more is better
MAIN_METRICS = {"eval_accuracy": "accuracy", "eval_map": "mean average precision"}


def main_metric(results: Mapping[str, Any]) -> str | None:
    """The key of an evaluation's main number; None where nothing was evaluated: `eval_accuracy`, and for sets of several
    labels an image, which have no accuracy, `eval_map`."""
    return next((name for name in MAIN_METRICS if results.get(name) is not None), None)
