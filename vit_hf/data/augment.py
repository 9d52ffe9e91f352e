"""Random crop and flip, normalisation, mixup and cutmix: batched, on the device.

What is drawn for a sample is a function of its key alone, and the key of (seed, epoch, sample index): a stateless
hash in 64-bit integers, the same for numpy on a host and torch on any device. Mixup and cutmix pair samples inside
the micro-batch; that alone depends on how the global batch is cut.
"""

import math
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Array = TypeVar("Array", np.ndarray, Tensor)  # int64 or float; the functions of keys work for both

# One number for each use of a sample's randomness.
FLIP, CROP_TOP, CROP_LEFT, CROP_AREA, CROP_RATIO, REPLACEMENT = range(1, 7)
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _mix(x: Array) -> Array:
    """The finaliser of splitmix64. Source: Steele, Lea, Flood, OOPSLA 2014; shifts made logical by the masks."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def sample_keys(seed: int, epoch: Array, index: Array) -> Array:
    """The key of each sample's randomness: int64 (B,) from the run's seed, the epoch and the sample's index."""
    return _mix(_mix(_mix(index * 0 + (seed + 1)) + epoch * _GOLDEN) + index * _GOLDEN)


def uniform(keys: Array, use: int) -> Array:
    """One float32 in [0, 1) for each key and each use, in steps of 2**-24."""
    bits = (_mix(keys + (use * _GOLDEN) % (1 << 63)) >> 40) & ((1 << 24) - 1)
    return (bits.astype(np.float32) if isinstance(bits, np.ndarray) else bits.float()) * 2**-24


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The order of the samples in an epoch: int64 (num_samples,), a permutation, a function of its arguments alone."""
    index = np.arange(num_samples, dtype=np.int64)
    return np.argsort(_mix(sample_keys(seed, np.full_like(index, epoch), index)), kind="stable")


def resized_crop_boxes(keys: Array, height: int, width: int, min_scale: float) -> tuple[Array, Array, Array, Array]:
    """Random boxes of `min_scale` to all of the area and 3:4 to 4:3 in shape: (top, left, height, width) in pixels,
    float (B,) each, inside the image.

    Source: Inception crop, arXiv 1409.4842 section 6; a box that would not fit is cut to the image.
    """
    lib = np if isinstance(keys, np.ndarray) else torch
    area = height * width * (min_scale + (1 - min_scale) * uniform(keys, CROP_AREA))
    ratio = lib.exp((2 * uniform(keys, CROP_RATIO) - 1) * math.log(4 / 3))
    box_height = lib.clip(lib.sqrt(area / ratio), 1, height)
    box_width = lib.clip(lib.sqrt(area * ratio), 1, width)
    top = uniform(keys, CROP_TOP) * (height - box_height)
    left = uniform(keys, CROP_LEFT) * (width - box_width)
    return top, left, box_height, box_width


def random_resized_crop(pixels: Tensor, keys: Tensor, min_scale: float) -> Tensor:
    """Crops a random box of each image and resizes it to the image's size, bilinear: (B, C, H, W) -> float (B, C, H, W)."""
    height, width = pixels.shape[-2:]
    top, left, box_height, box_width = resized_crop_boxes(keys, height, width, min_scale)

    def centres(start: Tensor, extent: Tensor, size: int) -> Tensor:  # (B, size), in grid_sample's [-1, 1]
        steps = (torch.arange(size, device=pixels.device) + 0.5) / size
        return (start[:, None] + steps * extent[:, None]) * (2 / size) - 1

    y, x = centres(top, box_height, height), centres(left, box_width, width)
    grid = torch.stack((x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)), dim=-1)
    return torch.nn.functional.grid_sample(
        pixels.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )


def random_padded_crop(pixels: Tensor, keys: Tensor, padding: int) -> Tensor:
    """Shifts each image by up to `padding` pixels in both directions; black comes in: (B, C, H, W), same dtype.

    Source: the CIFAR augmentation of arXiv 1512.03385, section 4.2.
    """
    batch, _, height, width = pixels.shape
    padded = torch.nn.functional.pad(pixels, (padding,) * 4)
    top = (uniform(keys, CROP_TOP) * (2 * padding + 1)).long()
    left = (uniform(keys, CROP_LEFT) * (2 * padding + 1)).long()
    rows = top[:, None, None] + torch.arange(height, device=pixels.device)[:, None]
    columns = left[:, None, None] + torch.arange(width, device=pixels.device)
    image = torch.arange(batch, device=pixels.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows, columns].permute(0, 3, 1, 2)


def random_flip(pixels: Tensor, keys: Tensor, probability: float) -> Tensor:
    """Mirrors each image left to right with this probability: (B, C, H, W), same dtype."""
    flipped = uniform(keys, FLIP) < probability
    return torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels)


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Grey levels 0 to 255 (B, C, H, W) -> float (x / 255 - mean) / std; mean and std (C,)."""
    return (pixels.float() / 255 - mean[:, None, None]) / std[:, None, None]


def mix(
    pixel_values: Tensor, targets: Tensor, rng: np.random.Generator, mixup_alpha: float, cutmix_alpha: float
) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix of each sample with its mirror place in the batch, one strength for the micro-batch.

    Args:
        pixel_values: float (B, C, H, W). targets: float (B, K).
        rng: draws which of the two (when both are on), the strength from Beta(alpha, alpha), and the box.

    Source: mixup arXiv 1710.09412; cutmix arXiv 1905.04899, with the strength corrected to the box as it is cut.
    """
    if mixup_alpha <= 0 and cutmix_alpha <= 0:
        return pixel_values, targets
    use_cutmix = cutmix_alpha > 0 and (mixup_alpha <= 0 or rng.random() < 0.5)
    alpha = cutmix_alpha if use_cutmix else mixup_alpha
    share = float(rng.beta(alpha, alpha))
    other = pixel_values.flip(0)
    if use_cutmix:
        height, width = pixel_values.shape[-2:]
        side = math.sqrt(1 - share)
        centre_y, centre_x = rng.integers(height), rng.integers(width)
        top, bottom = (int(np.clip(centre_y + sign * side * height / 2, 0, height)) for sign in (-1, 1))
        left, right = (int(np.clip(centre_x + sign * side * width / 2, 0, width)) for sign in (-1, 1))
        pixel_values = pixel_values.clone()
        pixel_values[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        pixel_values = share * pixel_values + (1 - share) * other
    return pixel_values, share * targets + (1 - share) * targets.flip(0)


class Augment:
    """A batch of uint8 images as it is trained on. Called as augment(batch, step, micro_step, rank).

    Args:
        num_classes: K.
        crop: (none | padding | scale, number); `scale` is skipped for a batch that was cropped while it was decoded.
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
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        label_smoothing: float = 0.0,
    ):
        self.seed, self.num_classes = seed, num_classes
        self.mean, self.std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self.crop, self.flip = crop, flip
        self.mixup_alpha, self.cutmix_alpha, self.label_smoothing = mixup_alpha, cutmix_alpha, label_smoothing

    def __call__(self, batch: dict[str, Tensor], step: int, micro_step: int, rank: int) -> tuple[Tensor, Tensor]:
        """{pixel_values uint8 (B, C, H, W), labels, epoch, index int64 (B,)} -> pixel_values float (B, C, H, W), targets
        float (B, K)."""
        pixels, keys = batch["pixel_values"], sample_keys(self.seed, batch["epoch"], batch["index"])
        kind, amount = self.crop
        if kind == "padding":
            pixels = random_padded_crop(pixels, keys, int(amount))
        elif kind == "scale":
            pixels = random_resized_crop(pixels, keys, amount)
        if self.flip > 0:
            pixels = random_flip(pixels, keys, self.flip)
        pixel_values = normalise(pixels, self.mean, self.std)
        targets = torch.nn.functional.one_hot(batch["labels"], self.num_classes).float()
        if self.label_smoothing > 0:
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
        rng = np.random.default_rng([self.seed, step, micro_step, rank])
        return mix(pixel_values, targets, rng, self.mixup_alpha, self.cutmix_alpha)
