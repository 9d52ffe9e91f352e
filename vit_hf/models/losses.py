# Copyright 2026 The vit_hf authors. Licensed under the Apache License, Version 2.0.
"""The loss of a classifier that is handed labels, as `transformers.Trainer` does. The scripts of this toolkit compute
theirs outside the model. This module must not know about models."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)


class Problem(NamedTuple):
    """What transformers' loss reads of a configuration."""

    num_labels: int
    problem_type: str


def classification_loss(
    loss_function: Callable[..., Tensor], labels: Tensor, logits: Tensor, config: PreTrainedConfig
) -> Tensor:
    """transformers' loss of logits (B, K), by config.problem_type: a mean, in fp32.

    - `single_label_classification`: cross-entropy. labels: classes int64 (B,), or probabilities float (B, K).
    - `multi_label_classification`: sigmoid cross-entropy. labels: 0 or 1 (B, K).
    - `regression`: mean squared error. labels: (B, K), or (B,) where K is 1.
    - None: regression where K is 1, otherwise single-label. transformers takes float labels (B, K) for multi-label ones,
      which is another loss than that of mixup's probabilities: here they are probabilities, and a warning says so.

    Args:
        loss_function: that of the model, transformers' ForSequenceClassificationLoss.
        config: left as it is; transformers' own models keep their guess in it, which is then saved.
    """
    problem_type = config.problem_type
    probabilities = labels.is_floating_point() and labels.ndim == 2
    if problem_type is None:
        problem_type = "regression" if config.num_labels == 1 else "single_label_classification"
        if probabilities and config.num_labels > 1 and not torch.compiler.is_compiling():
            logger.warning_once(
                "labels are floats (B, K) and config.problem_type is None: they are taken for probabilities, with "
                "cross-entropy. Set problem_type to multi_label_classification for labels that do not exclude each other, "
                "to single_label_classification for probabilities"
            )
    logits = logits.float()
    if problem_type == "single_label_classification":
        if probabilities:
            return nn.functional.cross_entropy(logits, labels.to(logits))
    else:
        labels = labels.to(logits.dtype)
    return loss_function(labels, logits, Problem(config.num_labels, problem_type))
