"""Mixup and cutmix: pairs of samples of a micro-batch.

The pairs alone depend on how the global batch is cut; all else in this folder is drawn for each sample by its key.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vit_hf.data.augment.operations import boxes, to_device


@dataclass(frozen=True)
class Mixing:
    """What is mixed, and when.

    Args:
        mixup_alpha, cutmix_alpha: the strength is drawn from Beta(alpha, alpha); 0 is off.
        mode: `batch` draws once for the micro-batch, `elem` for each sample.
        prob: probability that a draw mixes at all.
        switch_prob: probability of cutmix where both are on.
        off_step: the first optimizer step that mixes nothing; None mixes to the end.

    Source: mixup arXiv 1710.09412; cutmix arXiv 1905.04899; the last three as timm's Mixup and train.py have them.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    mode: str = "batch"
    prob: float = 1.0
    switch_prob: float = 0.5
    off_step: int | None = None

    def is_on(self, step: int) -> bool:
        """Whether anything is mixed at an optimizer step."""
        return max(self.mixup_alpha, self.cutmix_alpha) > 0 and (self.off_step is None or step < self.off_step)


def mix(pixel_values: Tensor, targets: Tensor, rng: np.random.Generator, mixing: Mixing) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix of each sample with its mirror place in the batch; the strength of a cutmix is corrected to the
    box as it is cut.

    Args:
        pixel_values: float (B, C, H, W). targets: float (B, K).
        rng: draws which of the two (when both are on), the strength, whether it is done (below prob 1), and the box.
    """
    batch, _, height, width = pixel_values.shape
    draws = batch if mixing.mode == "elem" else 1
    cuts = np.full(draws, mixing.cutmix_alpha > 0)
    if mixing.mixup_alpha > 0 and mixing.cutmix_alpha > 0:
        cuts = rng.random(draws) < mixing.switch_prob
    alpha = np.where(cuts, mixing.cutmix_alpha, mixing.mixup_alpha)
    share = rng.beta(alpha, alpha)
    if mixing.prob < 1:
        share = np.where(rng.random(draws) < mixing.prob, share, 1.0)
    size = np.array([height, width])
    half = np.sqrt(1 - share)[:, None] * size / 2
    centre = rng.integers(size, size=(draws, 2))
    start, end = (np.clip(centre + sign * half, 0, size).astype(np.int64) for sign in (-1, 1))
    share = np.where(cuts, 1 - (end - start).prod(1) / (height * width), share)
    # the weight of a sample's own pixels: none inside its box, or the same everywhere
    own = to_device(share.astype(np.float32), pixel_values.device)
    weight = own[:, None, None, None]
    if cuts.any():
        box = boxes(start, end, pixel_values.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        is_cut = to_device(cuts, pixel_values.device)[:, None, None, None]
        weight = torch.where(is_cut, (~box).float(), weight)
    mixed = torch.lerp(pixel_values.flip(0), pixel_values, weight)
    return mixed, torch.lerp(targets.flip(0), targets, own[:, None])
