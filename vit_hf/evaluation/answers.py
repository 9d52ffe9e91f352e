"""What a model answers to images, of which nothing else is asked: its best classes. Knows no dataset."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import accelerate
import numpy as np
import torch
from torch import Tensor, nn

from vit_hf.evaluation.gather import gather_in_order

SURE = 0.5  # a class of several is told from this probability on


@dataclass(frozen=True)
class Answers:
    """Rows in the order of the images, each once, the same on all processes.

    Args:
        index: int64 (N,), which image. labels: as the batches have them.
        classes: int64 (N, k), best first. probabilities: float32 (N, k).
        sure: bool (N, K), the classes of at least SURE, of a model of several; else None.
    """

    index: np.ndarray
    labels: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray
    sure: np.ndarray | None


@torch.no_grad()
def best_classes(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    normalise: Callable[[Tensor], Tensor],
    accelerator: accelerate.Accelerator,
    top_k: int,
    *,
    several: bool = False,
    seen: Callable[[int], None] = lambda count: None,
) -> Answers:
    """The best classes of each image that decodes, by softmax; by sigmoid where an image may have several.

    Args:
        batches, normalise: as for `predict`.
        seen: told how many images of this process are done.
    """
    columns: dict[str, list[Tensor]] = {}
    for batch in batches:
        logits = model(pixel_values=normalise(batch["pixel_values"])).logits.float()
        probabilities = logits.sigmoid() if several else logits.softmax(dim=-1)
        best = logits.topk(min(top_k, logits.shape[-1])).indices
        answers = {"classes": best, "probabilities": probabilities.gather(1, best)}
        if several:
            answers["sure"] = probabilities >= SURE
        for name, column in (answers | {name: batch[name] for name in ("labels", "index", "valid")}).items():
            columns.setdefault(name, []).append(column)
        seen(len(batch["index"]))
    taken = {name: column.cpu().numpy() for name, column in gather_in_order(columns, accelerator).items()}
    return Answers(**{"sure": None} | taken)
