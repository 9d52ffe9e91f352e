"""From a batch to the loss."""

import torch
from torch import Tensor, nn


def soft_cross_entropy(model: nn.Module, pixel_values: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the model's logits with target probabilities.

    Args:
        pixel_values: float (B, C, H, W).
        targets: float (B, K), rows sum to 1.

    Returns:
        fp32 scalar, in nats. Computed outside the model, whose own loss guesses the task from the labels' type.
    """
    logits = model(pixel_values=pixel_values).logits.float()
    return -(targets * torch.log_softmax(logits, dim=-1)).sum(dim=-1).mean()
