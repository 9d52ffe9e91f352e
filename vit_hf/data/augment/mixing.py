"""Mixup and cutmix: pairs of samples of a micro-batch.

The pairs alone depend on how the global batch is cut; all else in this folder is drawn for each sample by its key.
"""

import numpy as np
import torch
from torch import Tensor

from vit_hf.data.augment.operations import boxes, to_device


def mix(
    pixel_values: Tensor,
    targets: Tensor,
    rng: np.random.Generator,
    mixup_alpha: float,
    cutmix_alpha: float,
    mode: str = "batch",
) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix of each sample with its mirror place in the batch.

    Args:
        pixel_values: float (B, C, H, W). targets: float (B, K).
        rng: draws which of the two (when both are on), the strength from Beta(alpha, alpha), and the box.
        mode: `batch` draws once for the micro-batch, `elem` for each sample.

    Source: mixup arXiv 1710.09412; cutmix arXiv 1905.04899, with the strength corrected to the box as it is cut.
    """
    if mixup_alpha <= 0 and cutmix_alpha <= 0:
        return pixel_values, targets
    batch, _, height, width = pixel_values.shape
    draws = batch if mode == "elem" else 1
    cuts = np.full(draws, cutmix_alpha > 0)
    if mixup_alpha > 0 and cutmix_alpha > 0:
        cuts = rng.random(draws) < 0.5
    alpha = np.where(cuts, cutmix_alpha, mixup_alpha)
    share = rng.beta(alpha, alpha)
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
