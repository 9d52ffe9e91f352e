"""Which operations a sample gets: the published op sets, drawn evenly, by key alone."""

import functools

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy.stats import kstest, norm

from tests.test_operations import pictures
from tests.test_randomness import keys_of
from vit_hf.data.augment.operations import NUMBER, OPERATIONS, apply_program
from vit_hf.data.augment.policies import (
    OP_SETS,
    TRIVIAL,
    chain,
    color_jitter,
    rand_augment,
    three_augment,
    trivial_augment,
)

SIZE = (40, 60)
SIGNED = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
# torchvision's RandAugment at magnitude 9 of its 31 bins, and big_vision's at 10, as their sources have them
AT_9 = dict(shear_x=0.09, shear_y=0.09, translate_x=8, translate_y=5, rotate=9) | dict(
    brightness=0.27, color=0.27, contrast=0.27, sharpness=0.27, posterize=7, solarize=178.5
)
AT_10 = dict(shear_x=0.3, shear_y=0.3, translate_x=26, translate_y=17, rotate=30, posterize=4, solarize=256) | dict(
    solarize_add=110, cutout=40 * 60 / 224, brightness=1.9, color=1.9, contrast=1.9, sharpness=1.9
)


def names_of(program):
    return np.array(OPERATIONS)[program.operation]


def test_torchvisions_op_set():
    program = rand_augment(keys_of(20_000), SIZE)
    names, values = names_of(program), program.value
    assert names.shape == (20_000, 2) and set(names.ravel()) == set(OP_SETS["torchvision"].ranges)
    for name, expected in AT_9.items():
        found = values[names == name]
        if name in SIGNED:
            np.testing.assert_allclose(abs(found), expected, rtol=1e-6)
            assert 0.45 < (found > 0).mean() < 0.55
        elif name in ("brightness", "color", "contrast", "sharpness"):
            np.testing.assert_allclose(abs(found - 1), expected, rtol=1e-6)
        else:
            np.testing.assert_allclose(found, expected)


def test_big_visions_op_set():
    program = rand_augment(keys_of(20_000), SIZE, magnitude=10, ops="big_vision")
    names, values = names_of(program), program.value
    assert set(names.ravel()) == set(OP_SETS["big_vision"].ranges) and len(set(names.ravel())) == 16
    for name, expected in AT_10.items():
        np.testing.assert_allclose(abs(values[names == name]), expected, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("ops", OP_SETS)
def test_operations_of_each_layer_are_drawn_evenly_and_independently(ops):
    names = names_of(rand_augment(keys_of(32_000), SIZE, num_ops=3, magnitude=5, ops=ops))
    count = len(OP_SETS[ops].ranges)
    for layer in range(3):
        done = names[:, layer][names[:, layer] != "identity"] if ops == "timm" else names[:, layer]
        _, found = np.unique(done, return_counts=True)
        assert len(found) == count and abs(found / len(done) * count - 1).max() < 0.12
    if ops != "timm":
        pairs = np.unique(names[:, 0] + names[:, 1], return_counts=True)[1]
        assert len(pairs) == count**2 and pairs.max() < 2 * 32_000 / count**2


def test_torchvisions_set_at_magnitude_zero_is_the_identity():
    program = rand_augment(keys_of(2000), SIZE, magnitude=0)
    names, values = names_of(program), program.value
    for name in set(names.ravel()) - {"autocontrast", "equalize"}:
        neutral = {
            "posterize": 8,
            "solarize": 256,
            **dict.fromkeys(("brightness", "color", "contrast", "sharpness"), 1),
        }
        assert (values[names == name] == neutral.get(name, 0)).all()


# timm's operations that grow with the magnitude, written out for one image: (name of ours) -> (argument at a level of 0
# to 10, a sign and the side in pixels; what Pillow does with it)
MEAN_COLOUR = (124, 116, 104)


def moved(image, a, b, c, d, e, f):
    matrix = (a, b, c, d, e, f)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=MEAN_COLOUR)


def enhanced(kind):
    return (
        lambda level, sign, side: max(0.1, 1.0 + sign * (level / 10) * 0.9),
        lambda image, value: kind(image).enhance(value),
    )


TIMM = {
    "autocontrast": (lambda level, sign, side: 0, lambda image, value: ImageOps.autocontrast(image)),
    "equalize": (lambda level, sign, side: 0, lambda image, value: ImageOps.equalize(image)),
    "invert": (lambda level, sign, side: 0, lambda image, value: ImageOps.invert(image)),
    "rotate": (
        lambda level, sign, side: sign * level / 10 * 30,
        lambda image, value: image.rotate(value, Image.Resampling.NEAREST, fillcolor=MEAN_COLOUR),
    ),
    "posterize": (
        lambda level, sign, side: 4 - int(level / 10 * 4),
        lambda image, value: image.point(lambda grey: grey & (0xFF << (8 - int(value))) & 0xFF),
    ),
    "solarize": (
        lambda level, sign, side: 256 - int(level / 10 * 256),
        lambda image, value: image.point(lambda grey: grey if grey < value else 255 - grey),
    ),
    "solarize_add": (
        lambda level, sign, side: int(level / 10 * 110),
        lambda image, value: image.point(lambda grey: min(255, grey + int(value)) if grey < 128 else grey),
    ),
    "color": enhanced(ImageEnhance.Color),
    "contrast": enhanced(ImageEnhance.Contrast),
    "brightness": enhanced(ImageEnhance.Brightness),
    "sharpness": enhanced(ImageEnhance.Sharpness),
    "shear_x": (
        lambda level, sign, side: sign * level / 10 * 0.3, lambda image, value: moved(image, 1, value, 0, 0, 1, 0)
    ),
    "shear_y": (
        lambda level, sign, side: sign * level / 10 * 0.3, lambda image, value: moved(image, 1, 0, 0, value, 1, 0)
    ),
    "translate_x": (
        lambda level, sign, side: sign * level / 10 * 0.45 * side,
        lambda image, value: moved(image, 1, 0, value, 0, 1, 0),
    ),
    "translate_y": (
        lambda level, sign, side: sign * level / 10 * 0.45 * side,
        lambda image, value: moved(image, 1, 0, 0, 0, 1, value),
    ),
}  # fmt: skip


@pytest.mark.parametrize("level", [0, 1, 2.5, 5, 7.3, 9, 10])
def test_timms_operations_at_each_magnitude(level):
    """Their arguments, and what becomes of pictures, within one grey level of Pillow's."""
    before = pictures()
    height, width = before.shape[1:3]
    program = rand_augment(keys_of(4000), (height, width), num_ops=1, magnitude=level, ops="timm")
    names, values = names_of(program)[:, 0], program.value[:, 0]
    assert set(names) == {*TIMM, "identity"} and len(TIMM) == 15
    for name, (argument, operate) in TIMM.items():
        side = height if name == "translate_y" else width
        expected = {argument(level, sign, side) for sign in (-1, 1)}
        found = {float(value) for value in values[names == name]}
        assert sorted(found) == pytest.approx(sorted(expected), abs=1e-12), name
        row = int(np.flatnonzero(names == name)[0])
        repeated = type(program)(*(part[[row] * len(before)] for part in vars(program).values()))
        after = apply_program(before, repeated, torch.tensor(MEAN_COLOUR, dtype=torch.uint8))
        for picture, result in zip(before.numpy(), after.numpy().astype(int)):
            reference = np.asarray(operate(Image.fromarray(picture), values[row])).astype(int)
            differs = abs(result - reference)
            assert differs.max() <= 1 and (differs > 0).mean() < (0.5 if name == "color" else 0.01), name


def test_timms_operations_are_done_half_of_the_time_each_of_a_magnitude_of_its_own():
    keys = keys_of(40_000)
    program = rand_augment(keys, SIZE, num_ops=2, magnitude=9, ops="timm", magnitude_std=0.5)
    names, values = names_of(program), program.value
    done = names != "identity"
    assert abs(done.mean(0) - 0.5).max() < 0.0125 and abs((done[:, 0] & done[:, 1]).mean() - 0.25) < 0.011
    levels = [abs(values[:, layer][names[:, layer] == "rotate"]) / 3 for layer in (0, 1)]
    for found in levels:  # a normal distribution about 9, cut at 10
        assert found.max() == 10 and kstest(found[found < 10], norm(9, 0.5).cdf).statistic < 0.06
        assert abs((found == 10).mean() - norm(9, 0.5).sf(10)) < 0.015
    both = (names == "rotate").all(1)
    assert abs(np.corrcoef(abs(values[both]).T)[0, 1]) < 0.4 and both.sum() > 30
    again = functools.partial(rand_augment, size=SIZE, num_ops=2, magnitude=9, ops="timm", magnitude_std=0.5)
    assert np.array_equal(again(keys[500:600]).value, values[500:600])


def test_trivial_augment_draws_all_strengths():
    program = trivial_augment(keys_of(30_000), SIZE)
    names, values = names_of(program), program.value
    assert names.shape == (30_000, 1) and set(names.ravel()) == set(TRIVIAL)
    assert (
        len(np.unique(abs(values[names == "rotate"]).round(6))) == 31 and abs(values[names == "rotate"]).max() == 135
    )
    assert set(values[names == "posterize"]) == {2, 3, 4, 5, 6, 7, 8}
    assert set(abs(values[names == "translate_x"])) <= set(range(33)) and values[names == "translate_x"].max() == 32
    assert values[names == "solarize"].min() == 0 and values[names == "solarize"].max() == 256


def test_three_augment_takes_one_of_three():
    program = three_augment(keys_of(9000), SIZE)
    names, values = names_of(program), program.value
    for name, low, high in (("color", 0, 0), ("solarize", 128, 128), ("blur", 0.1, 2.0)):
        found = values[names == name]
        assert abs(len(found) - 3000) < 250 and found.min() >= low and found.max() <= high
    assert np.ptp(values[names == "blur"]) > 1.8


def test_jitter_takes_all_three_in_every_order():
    program = color_jitter(keys_of(6000), SIZE, 0.4)
    names = names_of(program)
    assert (np.sort(names, axis=1) == np.sort(["brightness", "contrast", "color"])).all()
    orders, counts = np.unique(names[:, 0] + "," + names[:, 1], return_counts=True)
    assert len(orders) == 6 and abs(counts - 1000).max() < 160
    assert 0.6 <= program.value.min() < 0.62 and 1.38 < program.value.max() <= 1.4


def test_a_chain_is_one_program_after_the_other():
    keys = keys_of(10)
    parts = [three_augment(keys, SIZE), color_jitter(keys, SIZE, 0.3)]
    whole = chain(parts)
    assert whole.operation.shape == (10, 4) and whole.centre.shape == (10, 4, 2)
    assert np.array_equal(whole.value[:, 1:], parts[1].value) and np.array_equal(
        whole.operation[:, :1], parts[0].operation
    )


def test_strength_and_choice_of_a_policy_do_not_hang_together():
    """Which operation a sample gets tells nothing of how strong it is."""
    program = trivial_augment(keys_of(30_000), SIZE)
    strong = abs(program.value) > 67.5
    here = program.operation == NUMBER["rotate"]
    assert 0.45 < strong[here].mean() < 0.55
