"""Which weights stay as they are, chosen by name."""

from torch import nn


def freeze_parameters(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Leaves parameters out of the training.

    Args:
        patterns: parts of names such as `embeddings`, `layers.0-5`; `encoder` is all but the classification head.

    Returns:
        The frozen parameters' names.

    Raises:
        UserError: a pattern that fits nothing, or patterns that leave nothing to train.
    """
    return []
