"""`--tta flip`: a model that looks at each image and at its mirror image.

Knows tensors and modules alone.
"""

from types import SimpleNamespace

from torch import Tensor, nn


class Mirrored(nn.Module):
    """A classifier whose logits are the mean of those of an image and of its mirror image (left and right exchanged).

    The mean is of logits: the probabilities are then those of the geometric mean, for softmax and sigmoid alike, and
    restricting the classes before the softmax means what it means for one pass. (VGG averages the probabilities.)

    Source: timm's train.py, `validate` with --tta (the mean of the logits of the copies); KellerJordan/cifar10-airbench,
    `infer_mirror`. VGG: arXiv 1409.1556, section 3.2.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @property
    def config(self):
        """Of the model."""
        return self.model.config

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        """
        Args:
            pixel_values: float (B, C, H, W).

        Returns:
            logits (B, K).
        """
        plain = self.model(pixel_values=pixel_values).logits
        mirrored = self.model(pixel_values=pixel_values.flip(-1)).logits
        return SimpleNamespace(logits=(plain + mirrored) / 2)
