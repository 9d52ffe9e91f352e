"""Where a sample is cut and whether it is mirrored: drawn on the host from its key, carried out on the device."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vit_hf.arguments import RandomCrop
from vit_hf.data.augment.operations import to_device
from vit_hf.data.randomness import CROP_ATTEMPTS, CROP_LEFT, CROP_TOP, FLIP, uniform

# Four numbers in [0, 1) for each attempt, (B, A, 4) -> boxes (top, left, height, width), whole pixels (B, A, 4), and
# which of them fit, bool (B, A).
Attempt = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def first_that_fits(
    keys: np.ndarray, attempts: int, first_use: int, attempt: Attempt
) -> tuple[np.ndarray, np.ndarray]:
    """For each key the first of its boxes that fits: (top, left, height, width) in whole pixels, float64 (B, 4), and
    whether there is one, bool (B,). Most keys need one attempt, so the later ones are drawn only for those that are
    left, in growing blocks.

    Args:
        attempts: how many boxes a key may draw.
        first_use: number of the first attempt's first draw; each attempt takes four numbers.
    """
    boxes, found = np.zeros((len(keys), 4)), np.zeros(len(keys), dtype=bool)
    left, start, block = np.arange(len(keys)), 0, 1
    while start < attempts and len(left):
        block = min(block, attempts - start)
        uses = first_use + 4 * start + np.arange(4 * block)
        drawn, fits = attempt(uniform(keys[left], uses).reshape(len(left), block, 4))
        first, fitting = fits.argmax(axis=1), fits.any(axis=1)
        boxes[left[fitting]] = drawn[fitting, first[fitting]]
        found[left[fitting]] = True
        left, start, block = left[~fitting], start + block, 4 * block
    return boxes, found


def area_attempt(
    drawn: np.ndarray, size: tuple[int, int], scale: tuple[float, float], ratio: float, largest: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes whose area is drawn evenly and whose ratio of sides by its logarithm: an `Attempt`.

    Args:
        size: (height, width) of the image.
        scale: smallest and largest share of the image's area.
        ratio: the most that one side is longer than the other.
        largest: (height, width) of the largest box that fits.
    """
    drawn = drawn.astype(np.float64)
    area = size[0] * size[1] * (scale[0] + (scale[1] - scale[0]) * drawn[..., 0])
    shape = np.exp((2 * drawn[..., 1] - 1) * math.log(ratio))
    height, width = np.rint(np.sqrt(area / shape)), np.rint(np.sqrt(area * shape))
    fits = (height > 0) & (height <= largest[0]) & (width > 0) & (width <= largest[1])
    top = np.floor(drawn[..., 2] * (size[0] - height + 1))
    left = np.floor(drawn[..., 3] * (size[1] - width + 1))
    return np.stack([top, left, height, width], axis=-1), fits


def torchvision_boxes(keys: np.ndarray, size: tuple[int, int], min_scale: float) -> np.ndarray:
    """Boxes of `min_scale` to all of the area and 3:4 to 4:3 in shape: (top, left, height, width) in whole pixels,
    float64 (B, 4). The first of ten that fits, or else the largest in the centre.

    Source: Inception crop, arXiv 1409.4842 section 6, as torchvision's RandomResizedCrop.get_params draws it.
    """
    boxes, found = first_that_fits(
        keys, 10, CROP_ATTEMPTS, lambda drawn: area_attempt(drawn, size, (min_scale, 1.0), 4 / 3, size)
    )
    if not found.all():
        height, width = size
        box_height, box_width = min(height, round(width / (3 / 4))), min(width, round(height * (4 / 3)))
        boxes[~found] = (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
    return boxes


def height_attempt(drawn: np.ndarray, size: tuple[int, int], min_scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Boxes whose ratio of sides (0.75 to 1.33) and then whose height is drawn evenly: an `Attempt`. In single
    precision where TensorFlow counts in it, since its bounds decide by whole pixels; the last row and the last column
    of places are never drawn there."""
    height, width = np.float32(size[0]), np.float32(size[1])
    min_area, max_area = np.float32(min_scale) * width * height, width * height
    ratio = drawn[..., 0] * (np.float32(1.33) - np.float32(0.75)) + np.float32(0.75)
    highest = np.rint(np.sqrt(max_area / ratio))
    as_wide = np.trunc((size[1] + 0.5 - 1e-7) / ratio.astype(np.float64)).astype(np.float32)
    as_wide -= np.rint(as_wide * ratio) > width
    highest = np.minimum(np.where(np.rint(highest * ratio) > width, as_wide, highest), height)
    lowest = np.minimum(np.rint(np.sqrt(min_area / ratio)), highest)
    drawn = drawn.astype(np.float64)
    box_height = lowest + np.floor(drawn[..., 1] * (highest - lowest + 1)).astype(np.float32)
    box_height += box_height * np.rint(box_height * ratio) < min_area  # the rounding of a side must not decide
    box_height -= box_height * np.rint(box_height * ratio) > max_area
    box_width = np.rint(box_height * ratio)
    area = box_height * box_width
    fits = (area >= min_area) & (area <= max_area) & (box_height <= height) & (box_width <= width) & (area > 0)
    top, left = np.floor(drawn[..., 2] * (height - box_height)), np.floor(drawn[..., 3] * (width - box_width))
    return np.stack([top, left, box_height, box_width], axis=-1), fits


def tensorflow_boxes(keys: np.ndarray, size: tuple[int, int], min_scale: float) -> np.ndarray:
    """Boxes of `min_scale` to all of the area and 0.75 to 1.33 in shape: (top, left, height, width) in whole pixels,
    float64 (B, 4). The first of a hundred that fits, or else the whole image.

    Source: TensorFlow's sample_distorted_bounding_box (kernels/image/sample_distorted_bounding_box_op.cc) without
    boxes of objects, as big_vision's inception_crop and google-research/vision_transformer call it.
    """
    boxes, found = first_that_fits(keys, 100, CROP_ATTEMPTS, lambda drawn: height_attempt(drawn, size, min_scale))
    boxes[~found] = 0, 0, *size
    return boxes


BOXES = {"torchvision": torchvision_boxes, "tensorflow": tensorflow_boxes}


def resized_crop_boxes(keys: np.ndarray, size: tuple[int, int], crop: RandomCrop) -> np.ndarray:
    """The boxes of a `scale` crop in images of (height, width): (top, left, height, width), float64 (B, 4)."""
    return BOXES[crop.rule](keys, size, crop.amount)


def flips(keys: np.ndarray, probability: float) -> np.ndarray:
    """Which samples are mirrored: bool (B,)."""
    return uniform(keys, FLIP) < probability


def random_resized_crop(
    pixels: Tensor, boxes_: np.ndarray, flipped: np.ndarray, bicubic: np.ndarray | None = None
) -> Tensor:
    """Cuts a box (top, left, height, width) of each image, resizes it to the image's size, bilinear or, where `bicubic`
    (B,) says so, bicubic, and mirrors the flipped ones: uint8 (B, H, W, C), same shape."""
    _, height, width, _ = pixels.shape
    boxes_ = boxes_.astype(np.float32)
    if bicubic is not None and bicubic.any():
        rows = np.flatnonzero(bicubic)
        here = to_device(rows, pixels.device)
        cut = _bicubic_crop(pixels.index_select(0, here), boxes_[rows], flipped[rows])
        if len(rows) == len(pixels):
            return cut
        return random_resized_crop(pixels, boxes_, flipped).index_copy_(0, here, cut)
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


def _bicubic_crop(pixels: Tensor, boxes_: np.ndarray, flipped: np.ndarray) -> Tensor:
    """As `random_resized_crop`, bicubic, for boxes that are enlarged: each output pixel is a weighted sum of four rows
    and four columns, also of those just outside the box.

    Source: Keys, IEEE ASSP 29(6), 1981, equation 4 with a = -0.5; Pillow's BICUBIC is the same where it enlarges.
    """
    _, height, width, _ = pixels.shape
    top, left, box_height, box_width = to_device(boxes_.T, pixels.device)

    def weights(start: Tensor, extent: Tensor, size: int) -> Tensor:  # (B, size, size): of inputs, for each output
        steps = torch.arange(size, device=pixels.device) + 0.5
        centre = start[:, None] + steps / size * extent[:, None]
        x = (centre[:, :, None] - steps).abs()
        near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
        kernel = torch.where(x < 1, near, torch.where(x < 2, far, 0))
        return kernel / kernel.sum(dim=2, keepdim=True)

    columns = weights(left, box_width, width)
    columns = torch.where(to_device(flipped, pixels.device)[:, None, None], columns.flip(1), columns)
    cut = pixels.permute(0, 3, 1, 2).float() @ columns[:, None].transpose(2, 3)
    cut = weights(top, box_height, height)[:, None] @ cut.clamp_(0, 255)  # between the two, as Pillow does
    return (cut + 0.5).clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def random_padded_crop(
    pixels: Tensor, keys: np.ndarray, padding: int, flipped: np.ndarray, reflect: bool = False
) -> Tensor:
    """Shifts each image by up to `padding` pixels in both directions, black or the image's own reflection comes in, and
    mirrors the flipped ones: uint8 (B, H, W, C), same shape.

    Source: the CIFAR augmentation of arXiv 1512.03385, section 4.2; reflected, the simple random crop of DeiT III
    (arXiv 2204.07118, section 3) on images that have the input's shape.
    """
    batch, height, width, channels = pixels.shape
    padded_height, padded_width = height + 2 * padding, width + 2 * padding
    top, left = (uniform(keys, np.array([CROP_TOP, CROP_LEFT])) * (2 * padding + 1)).astype(np.int64).T
    column = np.arange(width)
    column = left[:, None] + np.where(flipped[:, None], width - 1 - column, column)
    row = top[:, None] + np.arange(height)
    if reflect:  # the border is not made but read off the image: -1 is 1, height is height - 2
        row, column = (
            size - 1 - abs(size - 1 - abs(place - padding)) for place, size in ((row, height), (column, width))
        )
        padded, padded_height, padded_width = pixels, height, width
    else:
        padded = torch.nn.functional.pad(pixels, (0, 0, padding, padding, padding, padding))
    row = (np.arange(batch) * padded_height)[:, None] + row
    row, column = (
        to_device((row * padded_width).astype(np.int32), pixels.device),
        to_device(column.astype(np.int32), pixels.device),
    )
    source = row[:, :, None] + column[:, None, :]
    return padded.reshape(-1, channels).index_select(0, source.flatten()).view(batch, height, width, channels)
