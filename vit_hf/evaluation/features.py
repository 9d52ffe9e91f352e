"""Frozen features of images: what a model's last linear layer reads. Knows no dataset: it is handed batches and a model."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import accelerate
import torch
from torch import Tensor, nn

from vit_hf.errors import UserError
from vit_hf.evaluation.gather import gather_in_order


@dataclass(frozen=True)
class Features:
    """Images as a model sees them, on the device, in the order of the set; the same on all processes.

    Args:
        index: int64 (N,), the rows of the images in what was gone through; those that do not decode are missing.
        values: float32 (N, D).
        labels: int64 (N,).
    """

    index: Tensor
    values: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def at(self, rows: Tensor) -> "Features":
        """Those whose index is among `rows` (int64)."""
        kept = torch.isin(self.index, rows.to(self.index.device))
        return Features(self.index[kept], self.values[kept], self.labels[kept])


@torch.no_grad()
def extract_features(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    normalise: Callable[[Tensor], Tensor],
    accelerator: accelerate.Accelerator,
) -> Features:
    """Runs a model in its evaluation mode over its share of the batches and gathers the features of all processes.

    A feature is the input of the last linear layer, `classifier`: what the encoder pools (ViT: the class token after the
    final norm, or what `pooling` says; ResNet, BiT: the mean over the feature map), after the tanh layer `pre_logits`
    where the model has one. A linear layer on it is the family of functions that the model's own head is from.

    Args:
        model: a classifier, as it is called in a forward pass (an engine of DDP, ZeRO or FSDP2 too).
        batches: as those of `predict`: equally many on each process.
        normalise: uint8 (B, C, H, W) -> float.

    Raises:
        UserError: the model has no layer named `classifier`, or no image decodes.

    Source: big_vision, fewshot_lsr.py with representation_layer "pre_logits", which models/vit.py takes after the tanh.
    """
    columns: dict[str, list[Tensor]] = {"index": [], "values": [], "labels": [], "valid": []}
    # a compiled model does not look at hooks that came later, so it is run as it was written
    with _listening(accelerator.unwrap_model(model)) as heard, torch.compiler.set_stance("force_eager"):
        for batch in batches:
            model(pixel_values=normalise(batch["pixel_values"]))
            columns["values"].append(heard.pop())
            for name in ("index", "labels", "valid"):
                columns[name].append(batch[name])
    taken = gather_in_order(columns, accelerator)
    if len(taken["index"]) == 0:
        raise UserError("no image decodes; look at --eval_split, --train_split and --on_bad_image")
    return Features(**taken)


@contextlib.contextmanager
def _listening(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that gets what `classifier` is handed in each forward pass, float32 (B, D)."""
    heard: list[Tensor] = []
    classifier = getattr(model, "classifier", None)
    if not isinstance(classifier, nn.Module):
        raise UserError(f"{type(model).__name__} has no layer `classifier`, whose input the probes are fitted on")
    handle = classifier.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0].flatten(1).float()))
    try:
        yield heard
    finally:
        handle.remove()
