"""Each batched operation against Pillow's, within one grey level, and its identity at strength zero."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

from vit_hf.data.augment.operations import NUMBER, OPERATIONS, Program, apply_program

HEIGHT, WIDTH = 33, 40


def pictures(batch: int = 6, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """Smooth pictures, noise, one of few levels, a constant and a nearly constant one: uint8 (B, H, W, 3)."""
    rng = np.random.RandomState(0)
    noise = rng.randint(0, 256, (batch, height, width, 3)).astype(np.uint8)
    smooth = rng.randint(40, 220, (4, 4, 3)).astype(np.uint8)
    noise[1] = np.asarray(Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC))
    noise[2] = noise[2] // 64 * 50
    noise[3] = 77
    noise[4] = 77
    noise[4, 5, 6] = 200
    noise[5, :, :, 1:] = noise[5, :, :, 1:] // 4 + 100
    return torch.from_numpy(noise)


def program(name: str, value: float, batch: int = 6) -> Program:
    return Program(np.full((batch, 1), NUMBER[name]), np.full((batch, 1), float(value)), np.full((batch, 1, 2), 0.3))


def affine(image, matrix, fill):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=(fill,) * 3)


def solarize_add(image, value):
    return image.point([min(level + int(value), 255) if level < 128 else level for level in range(256)] * 3)


def cut(image, value):
    y, x = int(0.3 * image.height), int(0.3 * image.width)
    image.paste((128,) * 3, (x - int(value), y - int(value), x + int(value), y + int(value)))
    return image


PILLOW = {
    "identity": lambda image, v: image,
    "shear_x": lambda image, v: affine(image, (1, v, 0, 0, 1, 0), 128),
    "shear_y": lambda image, v: affine(image, (1, 0, 0, v, 1, 0), 128),
    "translate_x": lambda image, v: affine(image, (1, 0, v, 0, 1, 0), 128),
    "translate_y": lambda image, v: affine(image, (1, 0, 0, 0, 1, v), 128),
    "rotate": lambda image, v: image.rotate(v, Image.Resampling.NEAREST, fillcolor=(128,) * 3),
    "brightness": lambda image, v: ImageEnhance.Brightness(image).enhance(v),
    "contrast": lambda image, v: ImageEnhance.Contrast(image).enhance(v),
    "color": lambda image, v: ImageEnhance.Color(image).enhance(v),
    "sharpness": lambda image, v: ImageEnhance.Sharpness(image).enhance(v),
    "posterize": lambda image, v: ImageOps.posterize(image, int(v)),
    "solarize": lambda image, v: ImageOps.solarize(image, v),
    "solarize_add": solarize_add,
    "invert": lambda image, v: ImageChops.invert(image),
    "autocontrast": lambda image, v: ImageOps.autocontrast(image),
    "equalize": lambda image, v: ImageOps.equalize(image),
    "blur": lambda image, v: image.filter(ImageFilter.GaussianBlur(v)),
    "cutout": cut,
}
VALUES = {
    "shear_x": (0.3, -0.27, 0.99),
    "shear_y": (0.3, -0.27),
    "translate_x": (7, -11),
    "translate_y": (7, -11, 60),
    "rotate": (30, -17.5, 90, 133.2),
    "brightness": (0.1, 0.73, 1.9),
    "contrast": (0.0, 0.1, 0.73, 1.9),
    "color": (0.0, 0.1, 0.73, 1.9),
    "sharpness": (0.1, 0.73, 1.9),
    "posterize": (1, 4, 7),
    "solarize": (0, 110, 178.5),
    "solarize_add": (55, 110),
    "blur": (0.1, 0.4, 1.0, 2.0),
    "cutout": (3, 12),
}
NEUTRAL = dict.fromkeys(("shear_x", "shear_y", "translate_x", "translate_y", "rotate", "solarize_add", "cutout"), 0)
NEUTRAL |= dict.fromkeys(("brightness", "contrast", "color", "sharpness"), 1) | {"posterize": 8, "solarize": 256}
NEUTRAL |= {"identity": 0, "blur": 1e-9}


def test_every_operation_is_held_against_pillow():
    assert set(PILLOW) == set(OPERATIONS)


@pytest.mark.parametrize("name, value", [(name, value) for name in PILLOW for value in VALUES.get(name, (0,))])
def test_operation_equals_pillows_within_one_grey_level(name, value):
    pixels = pictures()
    changed = apply_program(pixels, program(name, value), fill=128)
    assert changed.dtype == torch.uint8 and changed.shape == pixels.shape
    for before, after in zip(pixels, changed):
        expected = np.asarray(PILLOW[name](Image.fromarray(before.numpy()), value))
        difference = np.abs(after.numpy().astype(int) - expected.astype(int))
        assert difference.max() <= 1
        if name not in ("color", "blur"):
            assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("name", NEUTRAL)
def test_operation_without_strength_changes_nothing(name):
    pixels = pictures()
    assert torch.equal(apply_program(pixels, program(name, NEUTRAL[name])), pixels)


def test_each_sample_gets_its_own_operations_in_their_order():
    """All operations side by side in one batch of two layers, each as if it were alone; what came in stays."""
    names = list(OPERATIONS)
    pixels = pictures()[[0, 1]].repeat(len(names), 1, 1, 1)[: len(names)]
    before = pixels.clone()
    values = np.array([VALUES.get(name, (0,))[-1] for name in names], dtype=float)
    number = np.arange(len(names))
    both = Program(
        np.stack([number, number[::-1]], axis=1),
        np.stack([values, values[::-1]], axis=1),
        np.full((len(names), 2, 2), 0.3),
    )
    together = apply_program(pixels, both, fill=9)
    assert torch.equal(pixels, before)
    for row in range(len(names)):
        alone = pixels[row : row + 1]
        for layer in range(2):
            one = Program(
                *(part[row : row + 1, layer : layer + 1] for part in (both.operation, both.value, both.centre))
            )
            alone = apply_program(alone, one, fill=9)
        assert torch.equal(alone[0], together[row]), names[row]
