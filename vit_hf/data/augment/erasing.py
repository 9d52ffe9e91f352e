"""A box of a sample that is covered up."""

import numpy as np
import torch
from torch import Tensor

from vit_hf.data.augment.crops import random_boxes
from vit_hf.data.augment.operations import boxes, to_device
from vit_hf.data.randomness import ERASE, ERASE_AREA, ERASE_LEFT, ERASE_RATIO, ERASE_TOP, mix_bits, uniform


def random_erasing(pixels: Tensor, keys: np.ndarray, probability: float) -> Tensor:
    """Fills a box of 2 to 33 % of the area and 0.3 to 3.3 in shape with random grey levels: uint8 (B, H, W, C).

    Source: arXiv 1708.04896, section 4 (RE-R).
    """
    rows = np.flatnonzero(uniform(keys, ERASE) < probability)
    if len(rows) == 0:
        return pixels
    _, height, width, channels = pixels.shape
    chosen = keys[rows]
    uses = (ERASE_AREA, ERASE_RATIO, ERASE_TOP, ERASE_LEFT)
    top, left, box_height, box_width = random_boxes(chosen, (height, width), (0.02, 1 / 3), 1 / 0.3, uses).T
    start = np.round(np.stack([top, left], axis=1))
    end = np.maximum(np.round(np.stack([top + box_height, left + box_width], axis=1)), start + 1)
    where = to_device(rows, pixels.device)
    place = torch.arange(height * width, device=pixels.device)
    bits = mix_bits(to_device(chosen, pixels.device)[:, None] + mix_bits(place)).view(-1, height, width, 1)
    noise = ((bits >> (8 * torch.arange(1, channels + 1, device=pixels.device))) & 255).to(torch.uint8)
    group = pixels.index_select(0, where)
    return pixels.index_copy(0, where, torch.where(boxes(start, end, group), noise, group))
