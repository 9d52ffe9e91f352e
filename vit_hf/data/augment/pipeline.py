"""From a batch of uint8 images to what the model is trained on: crop, flip, policies, erasing, normalisation, mixing.

What is drawn for a sample is drawn on the host from its key (randomness.py); the device only carries it out, in batches.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vit_hf.arguments import RandAugment, RandomCrop
from vit_hf.data.augment.crops import flips, random_padded_crop, random_resized_crop, resized_crop_boxes
from vit_hf.data.augment.erasing import random_erasing, random_erasing_normalised
from vit_hf.data.augment.mixing import Mixing, mix
from vit_hf.data.augment.operations import apply_program, to_device
from vit_hf.data.augment.policies import OP_SETS, Policy, chain, make_policies
from vit_hf.data.preprocessing import Preprocessing
from vit_hf.data.randomness import sample_keys


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Grey levels 0 to 255 (B, C, H, W) -> float (x / 255 - mean) / std; mean and std (C,)."""
    return pixels.contiguous().float().mul_((1 / (255 * std))[:, None, None]).sub_((mean / std)[:, None, None])


@dataclass(frozen=True)
class AugmentSettings:
    """What is done to training images on the device, as the flags of the same names say."""

    random_flip: float = 0.0
    randaugment: RandAugment | None = None
    trivial_augment: bool = False
    three_augment: bool = False
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    random_erasing_mode: str = "uniform"
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    mixup_mode: str = "batch"
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_off_epoch: int = 0
    label_smoothing_factor: float = 0.0


def make_augment(
    settings: AugmentSettings,
    preprocessing: Preprocessing,
    device: torch.device,
    *,
    seed: int,
    num_classes: int,
    crop: RandomCrop,
    first_step_of: Callable[[int], int],
) -> "Augment":
    """The device side of the training transforms.

    Args:
        crop: what is left of the random crop to the device.
        first_step_of: an epoch's first step, where mixing may end.
    """
    randaugment = settings.randaugment
    fill = OP_SETS[randaugment.ops].fill if randaugment is not None else 0
    return Augment(
        seed=seed,
        num_classes=num_classes,
        mean=preprocessing.image_mean,
        std=preprocessing.image_std,
        device=device,
        crop=crop,
        bicubic_crops=preprocessing.bicubic_crops,
        flip=settings.random_flip,
        policies=make_policies(
            randaugment=randaugment,
            trivial=settings.trivial_augment,
            three=settings.three_augment,
            jitter=settings.color_jitter,
        ),
        fill=tuple(round(255 * mean) for mean in preprocessing.image_mean) if fill is None else fill,
        erasing=settings.random_erasing,
        erasing_mode=settings.random_erasing_mode,
        mixing=Mixing(
            mixup_alpha=settings.mixup_alpha,
            cutmix_alpha=settings.cutmix_alpha,
            mode=settings.mixup_mode,
            prob=settings.mixup_prob,
            switch_prob=settings.mixup_switch_prob,
            off_step=first_step_of(settings.mixup_off_epoch) if settings.mixup_off_epoch else None,
        ),
        label_smoothing=settings.label_smoothing_factor,
    )


def normaliser(preprocessing: Preprocessing, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Grey levels uint8 (B, C, H, W) on the device -> what the model takes, float."""
    mean, std = (torch.tensor(c, device=device) for c in (preprocessing.image_mean, preprocessing.image_std))
    return functools.partial(normalise, mean=mean, std=std)


class Augment:
    """A batch of uint8 images as it is trained on. Called as augment(batch, step, micro_step, rank).

    Args:
        num_classes: K.
        crop: none for batches that were cropped while they were decoded.
        bicubic_crops: keys -> bool (B,), which samples' `scale` crops are resized bicubic; None: all are bilinear.
        policies: each (keys, (height, width)) -> Program; carried out one after the other.
        fill: grey level that the policies' shifts and rotations bring in, of all channels or of each.
        erasing: probability of random erasing.
        erasing_mode: `uniform` (grey levels, before normalisation), or `pixel` or `const` of timm (after it).
        label_smoothing: share of every target spread over all classes (arXiv 1512.00567, section 7): t becomes
            (1 - share) * t + share / K, also where t has several ones, as timm's BinaryCrossEntropy has it of one.
    """

    def __init__(
        self,
        *,
        seed: int,
        num_classes: int,
        mean: list[float],
        std: list[float],
        device: torch.device,
        crop: RandomCrop = RandomCrop(),
        bicubic_crops: Callable[[np.ndarray], np.ndarray] | None = None,
        flip: float = 0.0,
        policies: list[Policy] | None = None,
        fill: int | tuple[int, ...] = 0,
        erasing: float = 0.0,
        erasing_mode: str = "uniform",
        mixing: Mixing = Mixing(),
        label_smoothing: float = 0.0,
    ):
        self.seed, self.num_classes, self.device = seed, num_classes, device
        self.mean, self.std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self.crop, self.bicubic_crops, self.flip = crop, bicubic_crops, flip
        self.policies, self.fill = policies or [], torch.tensor(fill, dtype=torch.uint8, device=device)
        self.erasing, self.erasing_mode, self.mixing = erasing, erasing_mode, mixing
        self.label_smoothing = label_smoothing

    def __call__(self, batch: dict[str, Tensor], step: int, micro_step: int, rank: int) -> tuple[Tensor, Tensor]:
        """{pixel_values uint8 (B, C, H, W), labels int64 (B,) or float (B, K) on the device; visit, index int64 (B,) on the host} ->
        pixel_values float (B, C, H, W), targets float (B, K)."""
        keys = sample_keys(self.seed, batch["visit"].numpy(), batch["index"].numpy())
        pixels = self.change(batch["pixel_values"].permute(0, 2, 3, 1), keys)
        pixel_values = normalise(pixels.permute(0, 3, 1, 2), self.mean, self.std)
        if self.erasing > 0 and self.erasing_mode != "uniform":
            pixel_values = random_erasing_normalised(pixel_values, keys, self.erasing, self.erasing_mode)
        targets = batch["labels"]
        if targets.ndim == 1:
            targets = torch.nn.functional.one_hot(targets, self.num_classes).float()
        if self.label_smoothing > 0:
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
        if not self.mixing.is_on(step):
            return pixel_values, targets
        return mix(pixel_values, targets, np.random.default_rng([self.seed, step, micro_step, rank]), self.mixing)

    def change(self, pixels: Tensor, keys: np.ndarray) -> Tensor:
        """What happens to each image by itself: uint8 (B, H, W, C), same shape."""
        height, width = pixels.shape[1:3]
        flipped = flips(keys, self.flip)
        if self.crop.kind == "scale":
            bicubic = self.bicubic_crops(keys) if self.bicubic_crops is not None else None
            pixels = random_resized_crop(
                pixels, resized_crop_boxes(keys, (height, width), self.crop), flipped, bicubic
            )
        elif self.crop.kind in ("padding", "simple"):
            reflect = self.crop.kind == "simple"
            pixels = random_padded_crop(pixels, keys, int(self.crop.amount), flipped, reflect)
        elif flipped.any():
            rows = to_device(np.flatnonzero(flipped), pixels.device)
            pixels = pixels.index_copy(0, rows, pixels.index_select(0, rows).flip(2))
        if self.policies:
            program = chain([policy(keys, (height, width)) for policy in self.policies])
            pixels = apply_program(pixels, program, self.fill)
        if self.erasing > 0 and self.erasing_mode == "uniform":
            pixels = random_erasing(pixels, keys, self.erasing)
        return pixels
