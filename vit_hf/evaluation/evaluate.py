"""Evaluation on all processes, each sample counted exactly once. Knows no dataset: it is handed batches and a model."""

from collections.abc import Callable, Iterable
from pathlib import Path

import accelerate
import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from vit_hf.errors import UserError

METRICS = Path(__file__).parent / "metrics"


@torch.no_grad()
def predict(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    normalise: Callable[[Tensor], Tensor],
    accelerator: accelerate.Accelerator,
) -> dict[str, np.ndarray]:
    """Runs the model over its share of the batches and gathers what the metrics need, in the order of the dataset.

    Args:
        batches: equally many on each process; pixel_values uint8 (B, C, H, W), labels, index int64 (B,), valid bool (B,);
            the index may be on the host.
        normalise: uint8 (B, C, H, W) -> float.

    Returns:
        top5 int64 (N, min(5, K)), log_likelihood float32 (N,), labels int64 (N,); the same on all processes.
    """
    columns: dict[str, list[Tensor]] = {"top5": [], "log_likelihood": [], "labels": [], "index": [], "valid": []}
    for batch in batches:
        logits = model(pixel_values=normalise(batch["pixel_values"])).logits.float()
        columns["top5"].append(logits.topk(min(5, logits.shape[-1])).indices)
        likelihoods = torch.log_softmax(logits, dim=-1)
        columns["log_likelihood"].append(likelihoods.gather(1, batch["labels"][:, None])[:, 0])
        for name in ("labels", "index", "valid"):
            columns[name].append(batch[name])
    # one collective a column, after the last batch: no host sync between batches
    joined = {name: torch.cat(parts).to(accelerator.device) for name, parts in columns.items()}
    gathered = {name: accelerator.gather(column).cpu().numpy() for name, column in joined.items()}
    counted = np.flatnonzero(gathered["valid"])
    counted = counted[np.argsort(gathered["index"][counted], kind="stable")]
    return {name: gathered[name][counted] for name in ("top5", "log_likelihood", "labels")}


def evaluate_model(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    normalise: Callable[[Tensor], Tensor],
    accelerator: accelerate.Accelerator,
) -> dict[str, float]:
    """eval_loss (nats), eval_accuracy, eval_accuracy_top5 (in [0, 1]) and eval_samples; the same on all processes.

    Raises:
        UserError: no sample could be evaluated.
    """
    predicted = predict(model, batches, normalise, accelerator)
    if len(predicted["labels"]) == 0:
        raise UserError("no image of the evaluation split decodes; look at --eval_split and --on_bad_image")
    results = [_compute(predicted) if accelerator.is_main_process else None]
    return broadcast_object_list(results)[0]


def _compute(predicted: dict[str, np.ndarray]) -> dict[str, float]:
    import evaluate  # pulls in pandas: only where metrics are computed

    def measure(name: str, predictions: np.ndarray) -> float:
        metric = evaluate.load(str(METRICS / name), keep_in_memory=True)
        return metric.compute(predictions=predictions, references=predicted["labels"])[name]

    return {
        "eval_loss": measure("cross_entropy", predicted["log_likelihood"]),
        "eval_accuracy": measure("accuracy", predicted["top5"][:, 0]),
        "eval_accuracy_top5": measure("top5_accuracy", predicted["top5"]),
        "eval_samples": len(predicted["labels"]),
    }
