"""Evaluation: accuracy and loss on all processes. It is handed batches, and knows no data and no training."""

from vit_hf.front import front

__getattr__ = front(
    __name__,
    {
        "evaluate": "JudgeSettings evaluate_model",
        "probes": "few_shot_probe",
        "predictions": "Predictions read_predictions write_predictions",
    },
)
