"""Evaluation on all processes, each sample counted exactly once. Knows no dataset: it is handed batches and a model."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from vit_hf.errors import UserError
from vit_hf.evaluation.gather import gather_in_order
from vit_hf.evaluation.predictions import FILE, Predictions, write_predictions

METRICS = Path(__file__).parent / "metrics"


@torch.no_grad()
def predict(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    normalise: Callable[[Tensor], Tensor],
    accelerator: accelerate.Accelerator,
    class_names: Sequence[str] = (),
    *,
    loss: str = "softmax",
    among: np.ndarray | None = None,
    source: str = "",
) -> Predictions:
    """Runs the model over its share of the batches and gathers what the metrics need, in the order of the dataset.

    Args:
        batches: equally many on each process; pixel_values uint8 (B, C, H, W), labels int64 (B,) or, where an image has
            several, float (B, K) of 0 and 1, index int64 (B,), valid bool (B,); the index may be on the host.
        normalise: uint8 (B, C, H, W) -> float.
        class_names: of the model's classes.
        loss: softmax or sigmoid: what makes probabilities of the logits.
        among: int64 (k,), classes of the model: the others are no answer.
        source: which images they are, for Predictions.

    Raises:
        UserError: no sample could be evaluated.
    """
    columns: dict[str, list[Tensor]] = {}  # labels as they are counted: of all classes of the model
    chosen = None if among is None else torch.as_tensor(np.asarray(among), device=accelerator.device)
    for batch in batches:
        logits = model(pixel_values=normalise(batch["pixel_values"])).logits.float()
        answers = answer(logits, batch["labels"], loss, chosen)
        for name, column in (answers | {name: batch[name] for name in ("index", "valid")}).items():
            columns.setdefault(name, []).append(column)
    taken = {name: column.cpu().numpy() for name, column in gather_in_order(columns, accelerator).items()}
    if len(taken["index"]) == 0:
        raise UserError("no image of the evaluation split decodes; look at --eval_split and --on_bad_image")
    if taken["labels"].ndim == 2:
        taken["labels"] = taken["labels"] > 0
        if loss == "softmax" and not (labelled := taken["labels"].any(1)).all():
            row = taken["index"][np.argmin(labelled)]
            raise UserError(
                f"row {row} of the evaluation split has no label, which a model of one label an image (softmax) cannot answer: "
                "choose another --dataset_name, or a model trained with --loss sigmoid"
            )
    return Predictions(**taken, class_names=tuple(class_names), source=source)


def answer(logits: Tensor, labels: Tensor, loss: str = "softmax", among: Tensor | None = None) -> dict[str, Tensor]:
    """What is kept of each image, on the device.

    Args:
        logits: float32 (B, K). labels: int64 (B,), or float (B, K) of 0 and 1.
        loss: softmax: of several labels the probability is that of any of them. sigmoid: the sum over the classes.
        among: int64 (k,).

    Returns:
        labels; top5 int64 and probabilities float32 (B, min(5, k)), loss and brier float32 (B,); scores float32 (B, K) where
        labels are (B, K).
    """
    if among is not None:
        logits = torch.full_like(logits, -torch.inf).index_copy(1, among, logits.index_select(1, among))
    several = labels.ndim == 2
    if several and labels.shape[1] < logits.shape[1]:  # the model knows more classes than the set
        labels = F.pad(labels, (0, logits.shape[1] - labels.shape[1]))
    truth = labels.float() if several else F.one_hot(labels, logits.shape[-1]).float()
    best = logits.topk(min(5, logits.shape[-1] if among is None else len(among))).indices
    if loss == "softmax":
        likelihoods = torch.log_softmax(logits, dim=-1)
        probabilities = likelihoods.exp()
        if several:
            losses = -likelihoods.masked_fill(truth == 0, -torch.inf).logsumexp(1)
        else:
            losses = -likelihoods.gather(1, labels[:, None])[:, 0]
    else:
        probabilities = logits.sigmoid()
        asked = (logits, truth) if among is None else (logits.index_select(1, among), truth.index_select(1, among))
        losses = F.binary_cross_entropy_with_logits(*asked, reduction="none").sum(1)  # as training/objective.py
    kept = {
        "labels": labels,
        "top5": best,
        "probabilities": probabilities.gather(1, best),
        "loss": losses,
        "brier": (probabilities - truth).square().sum(1),
    }
    return kept | {"scores": probabilities} if several else kept


@dataclass(frozen=True)
class JudgeSettings:
    """How a run judges its model, as the flags of the same names say.

    Args:
        class_names: of the model's classes. source: which images they are (Predictions).
        source_rows: of `write_predictions`.
        loss: of `predict`. multi_label: of `measure`.
        save_predictions: whether output_dir gets predictions.parquet, in place of an older one.
    """

    class_names: Sequence[str] = ()
    source: str = ""
    source_rows: np.ndarray | None = None
    loss: str = "softmax"
    multi_label: bool = False
    save_predictions: bool = False
    output_dir: str | None = None


def evaluate_model(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    normalise: Callable[[Tensor], Tensor],
    accelerator: accelerate.Accelerator,
    settings: JudgeSettings = JudgeSettings(),
) -> dict[str, float]:
    """What `measure` gives, the same on all processes. Arguments are those of `predict`.

    Raises:
        UserError: no sample could be evaluated.
    """
    names, source = settings.class_names, settings.source
    predictions = predict(model, batches, normalise, accelerator, names, loss=settings.loss, source=source)
    results = [measure(predictions, settings.multi_label) if accelerator.is_main_process else None]
    if settings.save_predictions and accelerator.is_main_process:
        write_predictions(Path(settings.output_dir) / FILE, predictions, settings.source_rows)
    return broadcast_object_list(results)[0]


def metric(name: str, predictions: np.ndarray, references: np.ndarray, **options) -> dict:
    """What a module of metrics/ computes."""
    import evaluate  # pulls in pandas: only where metrics are computed

    module = evaluate.load(str(METRICS / name), keep_in_memory=True)
    return module.compute(predictions=predictions, references=references, **options)


def measure(predictions: Predictions, multi_label: bool = False) -> dict[str, float]:
    """eval_loss, eval_accuracy, eval_accuracy_top5 (in [0, 1]) and eval_samples; one process is enough.

    Args:
        multi_label: each of an image's labels is to be found, where else any of them is right: eval_map (the mean of the
            classes' average precision), eval_f1_micro and eval_f1_macro (of probabilities above 0.5) in place of accuracies.
    """
    labels = predictions.labels
    if multi_label:
        answered = metric("multi_label_f1", predictions.scores > 0.5, labels)
        accuracies = {"eval_map": average_precisions(predictions)["mean_average_precision"]}
        accuracies |= {f"eval_{name}": value for name, value in answered.items()}
    elif labels.ndim == 2:  # the metrics of one label take whether it was hit as the label
        correct, hit = predictions.correct, predictions.hits(5)
        accuracies = {"eval_accuracy": float(correct.mean()), "eval_accuracy_top5": float(hit.mean())}
    else:
        accuracies = {
            "eval_accuracy": metric("accuracy", predictions.top5[:, 0], labels)["accuracy"],
            "eval_accuracy_top5": metric("top5_accuracy", predictions.top5, labels)["top5_accuracy"],
        }
    references = labels if labels.ndim == 1 else np.zeros(len(labels), dtype=np.int64)
    loss = metric("cross_entropy", -predictions.loss, references)["cross_entropy"]
    return {"eval_loss": loss, **accuracies, "eval_samples": len(predictions)}


@dataclass(frozen=True)
class Details:
    """What of a split is more than a number.

    Args:
        calibration: expected_calibration_error, and of its bins bin_samples, bin_confidence, bin_accuracy.
        confusion_matrix: int64 (K, K), a row a true class; None where images have several labels.
        per_class_accuracy: K numbers, None for a class without images.
    """

    calibration: dict
    confusion_matrix: np.ndarray | None = None
    per_class_accuracy: Sequence[float | None] = ()


def measure_fully(predictions: Predictions, multi_label: bool = False) -> tuple[dict[str, float], Details]:
    """eval_expected_calibration_error, with one label an image eval_macro_f1 and eval_mean_per_class_accuracy, and
    eval_brier, but not where any of several labels is right: no probabilities are best there; and what they are computed
    from. Arguments are those of `measure`."""
    bins = metric("expected_calibration_error", predictions.probabilities[:, 0], predictions.correct.astype(np.int64))
    numbers = {"eval_expected_calibration_error": bins["expected_calibration_error"]}
    if multi_label or predictions.labels.ndim == 1:
        numbers["eval_brier"] = float(predictions.brier.astype(np.float64).mean())
    if predictions.labels.ndim == 2:
        return numbers, Details(bins)
    best, labels = predictions.top5[:, 0], predictions.labels
    count = max(len(predictions.class_names), int(max(best.max(), labels.max())) + 1)
    matrix = metric("confusion_matrix", best, labels, num_classes=count)["confusion_matrix"]
    shares = metric("per_class_accuracy", best, labels, num_classes=count)
    numbers["eval_macro_f1"] = metric("macro_f1", best, labels)["macro_f1"]
    numbers["eval_mean_per_class_accuracy"] = shares["mean_per_class_accuracy"]
    return numbers, Details(bins, np.asarray(matrix), shares["per_class_accuracy"])


def average_precisions(predictions: Predictions) -> dict[str, Any]:
    """{"mean_average_precision", "average_precision": of each class, None where no image has it}, of (N, K) labels.

    Raises:
        UserError: no image has a label.
    """
    found = metric("average_precision", predictions.scores, predictions.labels)
    if found["mean_average_precision"] is None:
        raise UserError("no image of the evaluation split has a label; look at --eval_split and --label_column_name")
    return found
