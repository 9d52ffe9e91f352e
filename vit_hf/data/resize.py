"""Images of one size, a batch at a time, to the model's input: the pixels that decode.py's `to_pixels` gives each of them.

On a CPU Pillow does it. Other devices repeat Pillow's arithmetic in whole numbers: a pass along each side, a weighted sum
of a few neighbours in 22-bit fixed point, rounded to grey levels. That is the same to the bit; where a C compiler fused
the multiplications and additions of Pillow's weights (not on x86-64) a weight may differ by 2 ** -22, a pixel by one grey
level. This module must not know where images come from.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vit_hf.data.decode import resized_sides, to_pixels
from vit_hf.data.preprocessing import Preprocessing

PRECISION_BITS = 22  # of Pillow's weights for 8-bit images: 32 - 8 - 2
AT_ONCE = 1 << 24  # values, int32, of the images that are resized together


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _cubic(x: np.ndarray) -> np.ndarray:
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


FILTERS: dict[int, tuple[Callable[[np.ndarray], np.ndarray], float]] = {  # and how far they reach
    Image.Resampling.BILINEAR: (_triangle, 1.0),
    Image.Resampling.BICUBIC: (_cubic, 2.0),
}


def taps(size: int, resized: int, start: int, length: int, resample: int) -> tuple[np.ndarray, np.ndarray]:
    """Which places of a line of `size` pixels, int64 (T, length), and with which weights, int32 (T, length), in units of
    2 ** -22, make the places `start` to `start + length` of the line resized to `resized` pixels. Places outside of it
    get no weight: they are black.

    Source: Pillow, src/libImaging/Resample.c, precompute_coeffs and normalize_coeffs_8bpc.
    """
    shape, reach = FILTERS[resample]
    scale = size / resized
    stretch = max(scale, 1.0)
    places = np.zeros((2 * math.ceil(reach * stretch) + 1, length), dtype=np.int64)
    weights = np.zeros(places.shape, dtype=np.int32)
    for out in range(max(0, -start), min(length, resized - start)):
        if size == resized:  # Pillow leaves the pass out
            places[0, out], weights[0, out] = start + out, 1 << PRECISION_BITS
            continue
        centre = (start + out + 0.5) * scale
        first = max(int(centre - reach * stretch + 0.5), 0)
        last = min(int(centre + reach * stretch + 0.5), size)
        found = shape((np.arange(first, last) - centre + 0.5) * (1.0 / stretch))
        found = found / float(sum(found.tolist()))  # summed one by one, as Pillow does
        places[: last - first, out] = np.arange(first, last)
        weights[: last - first, out] = np.trunc(found * (1 << PRECISION_BITS) + np.where(found < 0, -0.5, 0.5))
    used = max(1, int((weights != 0).any(axis=1).nonzero()[0].max(initial=0)) + 1)
    return places[:used], weights[:used]


def is_input(size: tuple[int, int], preprocessing: Preprocessing) -> bool:
    """Whether images of `size` (height, width) are the model's input as they are."""
    return size == preprocessing.image_size and resized_sides(size[::-1], preprocessing) == size[::-1]


def resizing(size: tuple[int, int], preprocessing: Preprocessing, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What makes the model's input, uint8 (B, H', W', C), of images of `size` (height, width) on a device, uint8 (B, H, W,
    C); images that are the input already are given back."""
    if is_input(size, preprocessing):
        return lambda pixels: pixels
    if device.type == "cpu":  # there is nothing faster than Pillow
        return lambda pixels: torch.from_numpy(resized_on_host(pixels.numpy(), preprocessing))
    return DeviceResize(size, preprocessing, device)


def resized_on_host(pixels: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Whole images, one after the other, by Pillow: uint8 (B, H, W, 3) -> uint8 (B, H', W', 3)."""
    result = np.empty((len(pixels), *preprocessing.image_size, 3), dtype=np.uint8)
    for place, image in enumerate(pixels):
        result[place] = to_pixels(Image.fromarray(image), preprocessing)
    return result


class DeviceResize:
    """The same in batches, on a device: uint8 (B, H, W, C) -> uint8 (B, H', W', C).

    Which pass comes first depends on the sizes and on Pillow's version; a probe is resized by Pillow to see it.

    Args:
        size: (height, width) of the images.
        preprocessing: its resampling is one of FILTERS.
    """

    def __init__(self, size: tuple[int, int], preprocessing: Preprocessing, device: torch.device):
        self.image_size = preprocessing.image_size
        passes = []
        sides = resized_sides((size[1], size[0]), preprocessing)
        for dim, before, resized, after in zip((2, 1), size[::-1], sides, self.image_size[::-1], strict=True):
            line = taps(before, resized, (resized - after) // 2, after, preprocessing.resample)
            passes.append((dim, *map(torch.from_numpy, line)))
        probe = np.random.RandomState(0).randint(0, 256, (1, *size, 3)).astype(np.uint8)
        wanted = torch.from_numpy(resized_on_host(probe, preprocessing)).int()

        def distance(order: list) -> float:
            return (_carried_out(torch.from_numpy(probe), order).int() - wanted).abs().sum().item()

        order = min((passes, passes[::-1]), key=distance)
        self.passes = [(dim, places.to(device), weights.to(device)) for dim, places, weights in order]

    def __call__(self, pixels: Tensor) -> Tensor:
        largest = max(*self.image_size, *pixels.shape[1:3]) ** 2 * pixels.shape[3]
        return torch.cat([_carried_out(part, self.passes) for part in pixels.split(max(1, AT_ONCE // largest))])


def _carried_out(pixels: Tensor, passes: list[tuple[int, Tensor, Tensor]]) -> Tensor:
    """Grey levels uint8 (B, H, W, C) after both passes, each a weighted sum along a dimension, rounded to 0 to 255."""
    values = pixels.int()
    for dim, places, weights in passes:
        shape = list(values.shape)
        shape[dim] = places.shape[1]
        total = torch.full(shape, 1 << (PRECISION_BITS - 1), dtype=torch.int32, device=values.device)
        for place, weight in zip(places, weights):
            weight = weight.view([-1 if axis == dim else 1 for axis in range(4)])
            total.addcmul_(values.index_select(dim, place), weight)
        values = (total >> PRECISION_BITS).clamp_(0, 255)
    return values.to(torch.uint8)
