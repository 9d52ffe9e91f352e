"""Random boxes: the rules of torchvision, TensorFlow and timm, each written out for one image, and what is cut."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp

from tests.test_randomness import keys_of
from vit_hf.arguments import RandomCrop
from vit_hf.data import randomness
from vit_hf.data.augment.crops import random_padded_crop, resized_crop_boxes
from vit_hf.data.augment.erasing import erasing_boxes
from vit_hf.data.decode import decode_row
from vit_hf.data.preprocessing import Preprocessing
from vit_hf.data.randomness import uniform

BOXES = 50_000
SIZES = [(375, 500), (500, 375), (400, 1200), (32, 32)]  # height, width
# the statistic of two samples of 50,000 from one distribution is above this once in 1,000 times
SAME = 1.95 * (2 / BOXES) ** 0.5
Draws = Callable[[int], tuple[float, float, float, float]]  # the four numbers in [0, 1) of an attempt


def torchvision_box(size: tuple[int, int], scale: float, draws: Draws) -> tuple[int, ...]:
    height, width = size
    for attempt in range(10):
        area, ratio, top, left = draws(attempt)
        area = height * width * (scale + (1 - scale) * area)
        ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * ratio)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    w, h = width, height
    if width / height < 3 / 4:
        h = round(w / (3 / 4))
    elif width / height > 4 / 3:
        w = round(h * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def tensorflow_box(size: tuple[int, int], scale: float, draws: Draws) -> tuple[int, ...]:
    height, width = size
    single = np.float32
    smallest = float(single(scale) * single(width) * single(height))
    for attempt in range(100):
        ratio, tall, top, left = draws(attempt)
        ratio = single(ratio) * (single(1.33) - single(0.75)) + single(0.75)

        def width_of(h: int, ratio: np.float32 = ratio) -> int:
            return round(float(single(h) * ratio))

        low = round(float(np.sqrt(single(smallest) / ratio)))
        high = round(float(np.sqrt(single(height * width) / ratio)))
        if width_of(high) > width:
            high = int((width + 0.5 - 1e-7) / float(ratio))
            high -= width_of(high) > width
        high = min(high, height)
        low = min(low, high)
        h = low + int(tall * (high - low + 1))
        h += h * width_of(h) < smallest
        h -= h * width_of(h) > height * width
        w = width_of(h)
        if smallest <= h * w <= height * width and 0 < w <= width and 0 < h <= height:
            return int(top * (height - h)), int(left * (width - w)), h, w
    return 0, 0, height, width


def erased_box(size: tuple[int, int], draws: Draws) -> tuple[int, ...] | None:
    height, width = size
    for attempt in range(10):
        area, ratio, top, left = draws(attempt)
        area = height * width * (0.02 + (1 / 3 - 0.02) * area)
        ratio = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * ratio)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w < width and h < height:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    return None


def numbers_of(key: np.ndarray, first_use: int) -> Draws:
    """The draws of one key (1,)."""
    return lambda attempt: uniform(key, first_use + 4 * attempt + np.arange(4))[0].astype(float).tolist()


RULES = {"torchvision": (torchvision_box, 0.08), "tensorflow": (tensorflow_box, 0.05)}


def as_measures(boxes: np.ndarray) -> dict[str, np.ndarray]:
    top, left, height, width = np.asarray(boxes, dtype=np.float64).T
    return {"area": height * width, "aspect": width / height, "top": top, "left": left}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", SIZES)
def test_boxes_are_distributed_as_the_source_draws_them(size, rule):
    """Kolmogorov-Smirnov on area, aspect, top and left of 50,000 boxes against the rule with numpy's own generator."""
    box, scale = RULES[rule]
    rng = np.random.default_rng(0)
    expected = as_measures([box(size, scale, lambda attempt: rng.random(4).tolist()) for _ in range(BOXES)])
    found = as_measures(resized_crop_boxes(keys_of(BOXES, seed=2), size, RandomCrop("scale", scale, rule)))
    for name in expected:
        assert ks_2samp(found[name], expected[name]).statistic < SAME, name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [*SIZES, (1, 7), (40, 1000)])
def test_each_key_gets_the_box_of_its_own_numbers(size, rule):
    """Equal to the rule written out for one image on the numbers of the key, whatever other keys are drawn with it."""
    box, _ = RULES[rule]
    keys = keys_of(1500, seed=4)
    for scale in (0.05, 0.5):
        found = resized_crop_boxes(keys, size, RandomCrop("scale", scale, rule))
        for number in range(0, 1500, 5):
            key = keys[number : number + 1]
            expected = box(size, scale, numbers_of(key, randomness.CROP_ATTEMPTS))
            assert tuple(found[number]) == expected
            assert tuple(resized_crop_boxes(key, size, RandomCrop("scale", scale, rule))[0]) == expected


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [*SIZES, (1, 1), (3, 2), (20, 1000), (1000, 7)])
def test_boxes_are_whole_pixels_inside_the_image(size, rule):
    boxes = resized_crop_boxes(keys_of(5000), size, RandomCrop("scale", 0.08, rule))
    top, left, height, width = boxes.T
    assert np.array_equal(boxes, np.rint(boxes)) and min(top.min(), left.min()) >= 0
    assert min(height.min(), width.min()) >= 1 and (top + height).max() <= size[0] and (left + width).max() <= size[1]


def test_an_image_of_no_fitting_box_falls_back():
    """torchvision: the largest box of an allowed shape, in the centre; TensorFlow: the whole image."""
    for size, central in (((10, 1000), (0, 493, 10, 13)), ((1000, 10), (493, 0, 13, 10))):
        assert (resized_crop_boxes(keys_of(50), size, RandomCrop("scale", 0.5)) == central).all()
        found = resized_crop_boxes(keys_of(50), size, RandomCrop("scale", 0.5, "tensorflow"))
        assert (found == (0, 0, *size)).all()


@pytest.mark.parametrize("size", [(224, 224), (20, 60)])
def test_erased_boxes_are_drawn_again_until_one_fits(size):
    """Distributed and, on a key's own numbers, equal to timm's rule; where ten do not fit nothing is erased."""
    keys = keys_of(BOXES, seed=3)
    rows, start, end = erasing_boxes(keys, size, 0.5)
    assert np.array_equal(rows, rows[np.argsort(rows)]) and (uniform(keys, randomness.ERASE)[rows] < 0.5).all()
    found = as_measures(np.concatenate([start, end - start], axis=1))
    rng = np.random.default_rng(0)
    expected = [erased_box(size, lambda attempt: rng.random(4).tolist()) for _ in range(len(rows))]
    expected = as_measures([box for box in expected if box is not None])
    for name in expected:
        assert ks_2samp(found[name], expected[name]).statistic < SAME * 2**0.5, name
    for place in range(0, 1000, 5):
        box = erased_box(size, numbers_of(keys[rows[place] : rows[place] + 1], randomness.ERASE_ATTEMPTS))
        assert (*start[place], *(end - start)[place]) == box


def test_nothing_is_erased_where_no_box_fits():
    keys = keys_of(500)
    rows, _, _ = erasing_boxes(keys, (6, 300), 1.0)
    boxes = [erased_box((6, 300), numbers_of(keys[[row]], randomness.ERASE_ATTEMPTS)) for row in range(500)]
    assert rows.tolist() == [row for row in range(500) if boxes[row] is not None] and 50 < len(rows) < 450


# --- the simple random crop of DeiT III ---


def written_out(image: Image.Image, place: np.ndarray, height: int, width: int, resample: int) -> np.ndarray:
    """Resize of the shorter side, reflect padding of 4, crop anywhere."""
    factor = max(height / image.height, width / image.width)
    sides = [max(width, int(image.width * factor + 1e-6)), max(height, int(image.height * factor + 1e-6))]
    padded = np.pad(np.asarray(image.resize(sides, resample)), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    top = int(place[0] * (padded.shape[0] - height + 1))
    left = int(place[1] * (padded.shape[1] - width + 1))
    return padded[top : top + height, left : left + width]


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(width).randint(0, 256, (height, width, 3)).astype(np.uint8))


@pytest.mark.parametrize("sides", [(75, 50), (50, 75), (24, 20), (9, 9), (200, 20)])
@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_simple_crop_of_an_image_that_is_decoded_each_time(sides, resample):
    image = picture(*sides)
    for image_size in ((20, 20), (20, 24)):
        preprocessing = Preprocessing(image_size, resample=resample)
        for place in np.random.default_rng(0).random((20, 2)):
            found = decode_row(np.asarray(image), preprocessing, place=place, padding=4)
            assert np.array_equal(found, written_out(image, place, *image_size, resample))


def test_simple_crop_of_a_decoded_set_is_that_of_its_images():
    """An image that has the input's shape is cut alike by the workers and by the device."""
    keys = keys_of(60)
    images = np.stack([np.asarray(picture(20, 20).rotate(number)) for number in range(60)])
    places = uniform(keys, np.array([randomness.CROP_TOP, randomness.CROP_LEFT]))
    expected = np.stack(
        [written_out(Image.fromarray(image), place, 20, 20, 2) for image, place in zip(images, places)]
    )
    flipped = np.arange(60) % 2 == 0
    found = random_padded_crop(torch.from_numpy(images), keys, 4, flipped, reflect=True).numpy()
    assert np.array_equal(found, np.where(flipped[:, None, None, None], expected[:, :, ::-1], expected))
