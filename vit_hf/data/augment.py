"""From a batch of uint8 images to what the model is trained on: crop, flip, policies, erasing, normalisation, mixing.

What is drawn for a sample is drawn on the host from its key (keys.py); the device only carries it out, in batches.
Mixup and cutmix pair samples inside the micro-batch; that alone depends on how the global batch is cut.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vit_hf.data.keys import mix_bits, sample_keys, uniform
from vit_hf.data.operations import Program, apply_program, boxes, to_device
from vit_hf.data.policies import chain

# One number for each use of a sample's randomness (policies.py starts at 1000).
FLIP, CROP_TOP, CROP_LEFT, CROP_AREA, CROP_RATIO, ERASE, ERASE_TOP, ERASE_LEFT, ERASE_AREA, ERASE_RATIO = range(1, 11)
REPLACEMENT = 100  # and the 99 after it: another row in place of one that does not decode


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


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Grey levels 0 to 255 (B, C, H, W) -> float (x / 255 - mean) / std; mean and std (C,)."""
    return pixels.contiguous().float().mul_((1 / (255 * std))[:, None, None]).sub_((mean / std)[:, None, None])


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


class Augment:
    """A batch of uint8 images as it is trained on. Called as augment(batch, step, micro_step, rank).

    Args:
        num_classes: K.
        crop: (none | padding | scale, number); `scale` is skipped for a batch that was cropped while it was decoded.
        policies: each (keys, (height, width)) -> Program; carried out one after the other.
        fill: grey level that the policies' shifts and rotations bring in.
        erasing: probability of random erasing.
        mixup_mode: batch | elem.
        label_smoothing: share of every target spread over all classes (arXiv 1512.00567, section 7).
    """

    def __init__(
        self,
        *,
        seed: int,
        num_classes: int,
        mean: list[float],
        std: list[float],
        device: torch.device,
        crop: tuple[str, float] = ("none", 0.0),
        flip: float = 0.0,
        policies: list[Callable[[np.ndarray, tuple[int, int]], Program]] | None = None,
        fill: int = 0,
        erasing: float = 0.0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        mixup_mode: str = "batch",
        label_smoothing: float = 0.0,
    ):
        self.seed, self.num_classes, self.device = seed, num_classes, device
        self.mean, self.std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self.crop, self.flip = crop, flip
        self.policies, self.fill, self.erasing = policies or [], fill, erasing
        self.mixup_alpha, self.cutmix_alpha, self.mixup_mode = mixup_alpha, cutmix_alpha, mixup_mode
        self.label_smoothing = label_smoothing

    def __call__(self, batch: dict[str, Tensor], step: int, micro_step: int, rank: int) -> tuple[Tensor, Tensor]:
        """{pixel_values uint8 (B, C, H, W), labels int64 (B,) on the device; visit, index int64 (B,) on the host} ->
        pixel_values float (B, C, H, W), targets float (B, K)."""
        keys = sample_keys(self.seed, batch["visit"].numpy(), batch["index"].numpy())
        pixels = self.change(batch["pixel_values"].permute(0, 2, 3, 1), keys)
        pixel_values = normalise(pixels.permute(0, 3, 1, 2), self.mean, self.std)
        targets = torch.nn.functional.one_hot(batch["labels"], self.num_classes).float()
        if self.label_smoothing > 0:
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
        rng = np.random.default_rng([self.seed, step, micro_step, rank])
        return mix(pixel_values, targets, rng, self.mixup_alpha, self.cutmix_alpha, self.mixup_mode)

    def change(self, pixels: Tensor, keys: np.ndarray) -> Tensor:
        """What happens to each image by itself: uint8 (B, H, W, C), same shape."""
        height, width = pixels.shape[1:3]
        kind, amount = self.crop
        flipped = flips(keys, self.flip)
        if kind == "scale":
            pixels = random_resized_crop(pixels, resized_crop_boxes(keys, (height, width), amount), flipped)
        elif kind == "padding":
            pixels = random_padded_crop(pixels, keys, int(amount), flipped)
        elif flipped.any():
            rows = to_device(np.flatnonzero(flipped), pixels.device)
            pixels = pixels.index_copy(0, rows, pixels.index_select(0, rows).flip(2))
        if self.policies:
            program = chain([policy(keys, (height, width)) for policy in self.policies])
            pixels = apply_program(pixels, program, self.fill)
        return random_erasing(pixels, keys, self.erasing) if self.erasing > 0 else pixels
