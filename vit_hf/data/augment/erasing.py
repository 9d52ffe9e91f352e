"""A box of a sample that is covered up."""

import math

import numpy as np
import torch
from torch import Tensor

from vit_hf.data.augment.crops import area_attempt, first_that_fits
from vit_hf.data.augment.operations import boxes, to_device
from vit_hf.data.randomness import ERASE, ERASE_ATTEMPTS, mix_bits, uniform


def erasing_boxes(keys: np.ndarray, size: tuple[int, int], probability: float) -> tuple[np.ndarray, ...]:
    """Which samples lose a box, and the boxes: rows (G,), start and end (G, 2) as (y, x), whole pixels.

    2 to 33 % of the area and 0.3 to 3.3 in shape; the first of ten that is smaller than the image both ways, and no
    box where none is.

    Source: arXiv 1708.04896, algorithm 1; ten attempts and the bounds as timm's RandomErasing has them.
    """
    rows = np.flatnonzero(uniform(keys, ERASE) < probability)
    largest = (size[0] - 1, size[1] - 1)
    found, fits = first_that_fits(
        keys[rows], 10, ERASE_ATTEMPTS, lambda drawn: area_attempt(drawn, size, (0.02, 1 / 3), 1 / 0.3, largest)
    )
    start = found[fits, :2]
    return rows[fits], start, start + found[fits, 2:]


def random_erasing(pixels: Tensor, keys: np.ndarray, probability: float) -> Tensor:
    """Fills a box of some samples with random grey levels, all equally likely: uint8 (B, H, W, C), same shape.

    Source: arXiv 1708.04896, section 4 (RE-R).
    """
    _, height, width, channels = pixels.shape
    rows, start, end = erasing_boxes(keys, (height, width), probability)
    if len(rows) == 0:
        return pixels
    where = to_device(rows, pixels.device)
    place = torch.arange(height * width, device=pixels.device)
    bits = mix_bits(to_device(keys[rows], pixels.device)[:, None] + mix_bits(place)).view(-1, height, width, 1)
    noise = ((bits >> (8 * torch.arange(1, channels + 1, device=pixels.device))) & 255).to(torch.uint8)
    group = pixels.index_select(0, where)
    return pixels.index_copy(0, where, torch.where(boxes(start, end, group), noise, group))


def random_erasing_normalised(pixel_values: Tensor, keys: np.ndarray, probability: float, mode: str) -> Tensor:
    """Fills a box of some samples, after normalisation: float (B, C, H, W), same shape.

    Args:
        mode: `const` fills with zeros, the mean colour; `pixel` with standard normal numbers, one for each value.

    Source: timm's RandomErasing, whose modes these are.
    """
    _, channels, height, width = pixel_values.shape
    rows, start, end = erasing_boxes(keys, (height, width), probability)
    if len(rows) == 0:
        return pixel_values
    where = to_device(rows, pixel_values.device)
    group = pixel_values.index_select(0, where)
    noise = 0.0
    if mode == "pixel":
        place = torch.arange(channels * height * width, device=pixel_values.device)
        bits = mix_bits(to_device(keys[rows], pixel_values.device)[:, None] + mix_bits(place)).view(group.shape)
        noise = normal((bits >> 40) & ((1 << 24) - 1), (bits >> 16) & ((1 << 24) - 1))
    inside = boxes(start, end, group.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return pixel_values.index_copy(0, where, torch.where(inside, noise, group))


def normal(first: Tensor, second: Tensor) -> Tensor:
    """Standard normal numbers from two independent whole numbers of 24 bits each, of one shape: float32. Source: Box and
    Muller, "A note on the generation of random normal deviates", 1958."""
    radius = ((first + 1).float() * 2**-24).log_().mul_(-2).sqrt_()
    return radius.mul_((second.float() * (2 * math.pi * 2**-24)).cos_())
