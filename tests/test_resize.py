"""Batches that are resized on a device, beside Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image

from vit_hf.data.decode import to_pixels
from vit_hf.data.preprocessing import Preprocessing
from vit_hf.data.resize import DeviceResize, resizing

CPU = torch.device("cpu")
BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
SIZES = [(8, 8), (32, 32), (7, 13), (64, 48), (33, 100), (256, 256), (5, 200), (200, 5), (1, 1), (40, 20)]
RULES = {
    "square": dict(image_size=(32, 32)),
    "smaller": dict(image_size=(12, 12)),
    "odd": dict(image_size=(17, 31)),
    "tall": dict(image_size=(61, 9)),
    "large": dict(image_size=(224, 224)),
    "centre": dict(image_size=(24, 24), shortest_edge=27),
    "centre with black edges": dict(image_size=(30, 20), shortest_edge=16),
    "centre of both sides": dict(image_size=(20, 21), resized=(25, 26)),
    "centre, not resized": dict(image_size=(20, 21), resized=(32, 32)),
}


@pytest.mark.parametrize("resample", [BILINEAR, BICUBIC])
@pytest.mark.parametrize("rule", RULES)
def test_a_device_gives_the_pixels_that_pillow_gives(rule, resample):
    """To the bit: noise, and black beside white, where bicubic weights overshoot."""
    preprocessing = Preprocessing(resample=resample, **RULES[rule])
    rng = np.random.RandomState(0)
    for size in SIZES:
        pixels = rng.randint(0, 256, (3, *size, 3)).astype(np.uint8)
        pixels[1] = 255 * rng.randint(0, 2, (*size, 3))
        expected = np.stack([to_pixels(Image.fromarray(image), preprocessing) for image in pixels])
        for resize in (DeviceResize(size, preprocessing, CPU), resizing(size, preprocessing, CPU)):
            found = resize(torch.from_numpy(pixels))
            assert found.dtype == torch.uint8 and np.array_equal(found.numpy(), expected), size


def test_a_large_batch_is_resized_in_parts(monkeypatch):
    from vit_hf.data import resize

    pixels = torch.randint(0, 256, (7, 10, 12, 3), dtype=torch.uint8)
    whole = DeviceResize((10, 12), Preprocessing((16, 16)), CPU)(pixels)
    monkeypatch.setattr(resize, "AT_ONCE", 3 * 16 * 16 * 3)
    assert torch.equal(DeviceResize((10, 12), Preprocessing((16, 16)), CPU)(pixels), whole)


def test_images_that_are_the_input_already_are_left_alone():
    pixels = torch.zeros(2, 32, 24, 3, dtype=torch.uint8)
    assert resizing((32, 24), Preprocessing((32, 24)), CPU)(pixels) is pixels
    assert resizing((32, 24), Preprocessing((32, 24)), torch.device("meta"))(pixels) is pixels
    assert resizing((32, 32), Preprocessing((32, 32), shortest_edge=36), CPU)(pixels) is not pixels
