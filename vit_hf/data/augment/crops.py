"""Where a sample is cut and whether it is mirrored: drawn on the host from its key, carried out on the device."""

import math

import numpy as np
import torch
from torch import Tensor

from vit_hf.data.augment.operations import to_device
from vit_hf.data.randomness import CROP_AREA, CROP_LEFT, CROP_RATIO, CROP_TOP, FLIP, uniform


def random_boxes(
    keys: np.ndarray, size: tuple, scale: tuple[float, float], ratio: float, uses: tuple[int, int, int, int]
) -> np.ndarray:
    """Random boxes inside an image: (top, left, height, width) in pixels, float32 (B, 4).

    Args:
        size: (height, width) of the image, or an array of each image's, (B,).
        scale: smallest and largest share of the image's area.
        ratio: the most that one side is longer than the other; its logarithm is drawn evenly.
        uses: numbers for area, ratio, top and left.

    A box that would not fit is cut to the image.
    """
    height, width = size
    area_drawn, ratio_drawn, top_drawn, left_drawn = uniform(keys, np.array(uses)).T
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area_drawn)
    shape = np.exp((2 * ratio_drawn - 1) * np.float32(math.log(ratio)))
    box_height = np.clip(np.sqrt(area / shape), 1, height)
    box_width = np.clip(np.sqrt(area * shape), 1, width)
    top, left = top_drawn * (height - box_height), left_drawn * (width - box_width)
    return np.stack([top, left, box_height, box_width], axis=1)


def resized_crop_boxes(keys: np.ndarray, size: tuple, min_scale: float) -> np.ndarray:
    """Boxes of `min_scale` to all of the area and 3:4 to 4:3 in shape: (top, left, height, width), float32 (B, 4).

    Source: Inception crop, arXiv 1409.4842 section 6.
    """
    return random_boxes(keys, size, (min_scale, 1.0), 4 / 3, (CROP_AREA, CROP_RATIO, CROP_TOP, CROP_LEFT))


def flips(keys: np.ndarray, probability: float) -> np.ndarray:
    """Which samples are mirrored: bool (B,)."""
    return uniform(keys, FLIP) < probability


def random_resized_crop(pixels: Tensor, boxes_: np.ndarray, flipped: np.ndarray) -> Tensor:
    """Cuts a box (top, left, height, width) of each image, resizes it to the image's size, bilinear, and mirrors the
    flipped ones: uint8 (B, H, W, C), same shape."""
    _, height, width, _ = pixels.shape
    top, left, box_height, box_width = to_device(boxes_.T, pixels.device)

    def centres(start: Tensor, extent: Tensor, size: int) -> Tensor:  # (B, size), in grid_sample's [-1, 1]
        steps = (torch.arange(size, device=pixels.device) + 0.5) / size
        return (start[:, None] + steps * extent[:, None]) * (2 / size) - 1

    y, x = centres(top, box_height, height), centres(left, box_width, width)
    x = torch.where(to_device(flipped, pixels.device)[:, None], x.flip(1), x)
    grid = torch.stack((x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)), dim=-1)
    cut = torch.nn.functional.grid_sample(
        pixels.permute(0, 3, 1, 2).float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return (cut + 0.5).to(torch.uint8).permute(0, 2, 3, 1)


def random_padded_crop(pixels: Tensor, keys: np.ndarray, padding: int, flipped: np.ndarray) -> Tensor:
    """Shifts each image by up to `padding` pixels in both directions, black comes in, and mirrors the flipped ones:
    uint8 (B, H, W, C), same shape.

    Source: the CIFAR augmentation of arXiv 1512.03385, section 4.2.
    """
    batch, height, width, channels = pixels.shape
    padded_height, padded_width = height + 2 * padding, width + 2 * padding
    top, left = (uniform(keys, np.array([CROP_TOP, CROP_LEFT])) * (2 * padding + 1)).astype(np.int64).T
    column = np.arange(width)
    column = left[:, None] + np.where(flipped[:, None], width - 1 - column, column)
    row = (np.arange(batch) * padded_height + top)[:, None] + np.arange(height)
    row, column = (
        to_device((row * padded_width).astype(np.int32), pixels.device),
        to_device(column.astype(np.int32), pixels.device),
    )
    padded = torch.nn.functional.pad(pixels, (0, 0, padding, padding, padding, padding))
    source = row[:, :, None] + column[:, None, :]
    return padded.reshape(-1, channels).index_select(0, source.flatten()).view(batch, height, width, channels)
