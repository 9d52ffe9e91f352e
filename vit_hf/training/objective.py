"""What a step minimises, `--loss softmax|sigmoid`, and how a trained model says which of them it was."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from vit_hf.errors import UserError

SEVERAL = "multi_label_classification"  # transformers' name of a model whose classes are one question each


@dataclass(frozen=True)
class Objective:
    """objective(logits fp32 (B, K), targets float (B, K) in [0, 1]) -> mean loss of an image, in nats.

    Args:
        loss: softmax: cross-entropy over the classes. sigmoid: binary cross-entropy, summed over the classes.

    Source: sigmoid: "Are we done with ImageNet?" (arXiv 2006.07159), and `sigmoid_xent` of big_vision's utils.py,
    with which the ViT code pretrains.
    """

    loss: str = "softmax"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.loss == "softmax":
            return cross_entropy(logits, targets)
        return binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=-1).mean()


def choose_objective(loss: str, multi_label: bool, config: Any) -> Objective:
    """The loss of a run, written into the model's configuration: `problem_type` is how transformers' pipeline, `Trainer`
    and `vit-hf evaluate` know it.

    Args:
        loss: as `--loss` says; auto: sigmoid where an image has a list of labels, else softmax.
        multi_label: whether the labels are lists.
        config: the model's.

    Raises:
        UserError: softmax for lists of labels.
    """
    if multi_label and loss == "softmax":
        raise UserError(
            "--loss softmax: needs one label an image, and the label column holds lists of labels; allowed is sigmoid, "
            "or name another column by --label_column_name"
        )
    if loss == "auto":
        loss = "sigmoid" if multi_label else "softmax"
    objective = Objective(loss)
    if objective.loss == "sigmoid":
        config.problem_type = SEVERAL
    elif config.problem_type == SEVERAL:  # of the weights that it starts from
        config.problem_type = None
    return objective


def loss_of(config: Any) -> str:
    """The loss, softmax or sigmoid, that a model's configuration says it was trained with."""
    return "sigmoid" if getattr(config, "problem_type", None) == SEVERAL else "softmax"
