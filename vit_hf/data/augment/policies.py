"""Which operations a sample gets: RandAugment, TrivialAugment, 3-Augment and colour jitter, as programs.

Each policy is a function of the samples' keys and the size of the pictures, and its result is carried out by
operations.py. Where a published op set names sizes in pixels, those are its own at 224 pixels, or a share of the side.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vit_hf.arguments import RandAugment
from vit_hf.data.augment.operations import NUMBER, Program
from vit_hf.data.randomness import uniform

# One number for each use of a sample's randomness; each layer of a policy takes its own.
_OPERATION, _STRENGTH, _SIGN, _CENTRE_Y, _CENTRE_X, _IS_DONE, _NOISE = range(7)
_JITTER_LAYER = 8  # after the layers of the other policies
# the keys of the samples and (height, width) of the pictures -> what happens to each
Policy = Callable[[np.ndarray, tuple[int, int]], Program]
# name -> argument of the operation, from strength 0..1, sign and the side (pixels) that a shift is along
Ranges = dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]]


def _common(shear: float, degrees: float, factor: float, bits: int, shift: Callable[[int], float]) -> Ranges:
    def enhance(strength, sign, side):
        return 1 + factor * strength * sign

    def sheared(strength, sign, side):
        return shear * strength * sign

    def shifted(strength, sign, side):
        return np.trunc(shift(side) * strength) * sign

    return {
        "identity": lambda strength, sign, side: 0 * strength,
        "shear_x": sheared,
        "shear_y": sheared,
        "translate_x": shifted,
        "translate_y": shifted,
        "rotate": lambda strength, sign, side: degrees * strength * sign,
        "brightness": enhance,
        "color": enhance,
        "contrast": enhance,
        "sharpness": enhance,
        "posterize": lambda strength, sign, side: 8 - np.round(bits * strength),
        # a threshold of 255 would turn white into black at no strength at all
        "solarize": lambda strength, sign, side: np.where(strength > 0, 255 * (1 - strength), 256),
        "autocontrast": lambda strength, sign, side: 0 * strength,
        "equalize": lambda strength, sign, side: 0 * strength,
    }


def _big_vision() -> Ranges:
    def enhance(strength, sign, side):
        return 0.1 + 1.8 * strength

    changed = {
        "invert": lambda strength, sign, side: 0 * strength,
        "posterize": lambda strength, sign, side: np.trunc(4 * strength),
        "solarize": lambda strength, sign, side: np.trunc(256 * strength),
        "solarize_add": lambda strength, sign, side: np.trunc(110 * strength),
        "cutout": lambda strength, sign, side: np.trunc(40 * strength) * side / 224,
        **dict.fromkeys(("brightness", "color", "contrast", "sharpness"), enhance),
    }
    ranges = _common(0.3, 30, 0, 0, lambda side: 100 / 224 * side) | changed
    del ranges["identity"]
    return ranges


def _timm() -> Ranges:
    def enhance(strength, sign, side):
        return np.maximum(1 + 0.9 * strength * sign, 0.1)

    def shifted(strength, sign, side):
        return 0.45 * strength * side * sign

    changed = {
        "invert": lambda strength, sign, side: 0 * strength,
        "posterize": lambda strength, sign, side: 4 - np.trunc(4 * strength),
        "solarize": lambda strength, sign, side: 256 - np.trunc(256 * strength),
        "solarize_add": lambda strength, sign, side: np.trunc(110 * strength),
        **dict.fromkeys(("translate_x", "translate_y"), shifted),
        **dict.fromkeys(("brightness", "color", "contrast", "sharpness"), enhance),
    }
    ranges = _common(0.3, 30, 0, 0, lambda side: 0) | changed
    del ranges["identity"]
    return ranges


class OpSet(NamedTuple):
    """A published set of operations for RandAugment.

    Args:
        full: the magnitude that is strength 1.
        fill: grey level that is moved in; None is the mean colour of the images.
        probability: with which each operation is done.
    """

    ranges: Ranges
    full: float
    fill: int | None
    probability: float = 1.0


# torchvision: transforms.RandAugment with its 31 bins. big_vision: pp/autoaugment.py, with which arXiv 2205.01580 was
# trained; there a magnitude of 0 is not the identity, and 10 leaves out the solarization. timm: the operations that grow
# with the magnitude of data/auto_augment.py, what its "rand-m9-mstd0.5-inc1" means.
OP_SETS = {
    "torchvision": OpSet(_common(0.3, 30, 0.9, 4, lambda side: 150 / 331 * side), 30, 0),
    "big_vision": OpSet(_big_vision(), 10, 128),
    "timm": OpSet(_timm(), 10, None, probability=0.5),
}
TRIVIAL = _common(0.99, 135, 0.99, 6, lambda side: 32)


def _program(
    keys: np.ndarray, layers: range, ranges: Ranges, strength: np.ndarray | float, size: tuple[int, int]
) -> Program:
    """One operation of `ranges` for each layer, all equally likely. strength: (B, L), or one number for all."""
    names = list(ranges)
    uses = 1000 + 8 * np.array(layers)[:, None] + np.arange(5)
    drawn = uniform(keys, uses.ravel()).reshape(len(keys), len(layers), 5).astype(np.float64)
    choice = (drawn[..., _OPERATION] * len(names)).astype(np.int64)
    sign = np.where(drawn[..., _SIGN] < 0.5, -1, 1)
    strength = np.broadcast_to(strength, choice.shape)
    value = np.zeros(choice.shape)
    for number, name in enumerate(names):
        here = choice == number
        value[here] = ranges[name](strength[here], sign[here], size[0] if name.endswith("_y") else size[1])
    numbers = np.array([NUMBER[name] for name in names])
    return Program(numbers[choice], value, drawn[..., [_CENTRE_Y, _CENTRE_X]])


def rand_augment(
    keys: np.ndarray,
    size: tuple[int, int],
    num_ops: int = 2,
    magnitude: float = 9,
    ops: str = "torchvision",
    magnitude_std: float = 0.0,
) -> Program:
    """`num_ops` operations for each sample, all of one magnitude, or about it.

    Args:
        size: (height, width) in pixels.
        magnitude: 0 to 30 for torchvision's op set, 0 to 10 for big_vision's and timm's.
        magnitude_std: standard deviation of each operation's magnitude, which is then cut to the op set's scale.

    Source: arXiv 1909.13719; the op sets above.
    """
    op_set, layers = OP_SETS[ops], 1000 + 8 * np.arange(num_ops)
    if magnitude_std > 0:
        drawn = normal(uniform(keys, layers + _STRENGTH), uniform(keys, layers + _NOISE))
        magnitude = np.clip(magnitude + magnitude_std * drawn, 0, op_set.full)
    program = _program(keys, range(num_ops), op_set.ranges, magnitude / op_set.full, size)
    if op_set.probability < 1:
        is_done = uniform(keys, layers + _IS_DONE) < op_set.probability
        program.operation = np.where(is_done, program.operation, NUMBER["identity"])
    return program


def normal(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Standard normal numbers, float64, from two independent numbers in [0, 1) each. Source: Box and Muller, "A note on
    the generation of random normal deviates", 1958."""
    return np.sqrt(-2 * np.log1p(-first.astype(np.float64))) * np.cos(2 * np.pi * second.astype(np.float64))


def trivial_augment(keys: np.ndarray, size: tuple[int, int]) -> Program:
    """One operation of one of 31 strengths. Source: arXiv 2103.10158, the wide space, as torchvision has it."""
    bins = np.floor(uniform(keys, np.array([1000 + _STRENGTH])) * 31)
    return _program(keys, range(1), TRIVIAL, bins / 30, size)


def three_augment(keys: np.ndarray, size: tuple[int, int]) -> Program:
    """Grey, solarized or blurred. Source: arXiv 2204.07118 (DeiT III), section 3; a blur of 0.1 to 2 pixels and a
    threshold of 128, as its authors' code has them."""
    ranges: Ranges = {
        "color": lambda strength, sign, side: 0 * strength,
        "solarize": lambda strength, sign, side: 128 + 0 * strength,
        "blur": lambda strength, sign, side: 0.1 + 1.9 * strength,
    }
    return _program(keys, range(1), ranges, uniform(keys, np.array([1000 + _STRENGTH])).astype(np.float64), size)


def color_jitter(keys: np.ndarray, size: tuple[int, int], strength: float) -> Program:
    """Brightness, contrast and saturation in random order, each by a factor of 1 - strength to 1 + strength. Source:
    arXiv 1409.4842's photometric distortions in torchvision's form, without the hue, as timm uses it."""
    names = np.array([NUMBER[name] for name in ("brightness", "contrast", "color")])
    drawn = uniform(keys, 1000 + 8 * _JITTER_LAYER + np.arange(6)).astype(np.float64)
    order = np.argsort(drawn[:, :3], axis=1)
    value = 1 + strength * (2 * drawn[:, 3:] - 1)
    return Program(names[order], np.maximum(value, 0), np.zeros((len(keys), 3, 2)))


def chain(programs: list[Program]) -> Program:
    """One program after the other, as one."""
    parts = ([getattr(program, name) for program in programs] for name in ("operation", "value", "centre"))
    return Program(*(np.concatenate(part, axis=1) for part in parts))


def make_policies(
    *,
    randaugment: RandAugment | None = None,
    trivial: bool = False,
    three: bool = False,
    jitter: float = 0.0,
) -> list[Policy]:
    """The policies that are on, in the order in which they are carried out.

    Args:
        randaugment: what `rand_augment` draws; None is off.
    """
    policies: list[Policy] = []
    if randaugment is not None:
        policies.append(functools.partial(rand_augment, **dataclasses.asdict(randaugment)))
    if trivial:
        policies.append(trivial_augment)
    if three:
        policies.append(three_augment)
    if jitter > 0:
        policies.append(functools.partial(color_jitter, strength=jitter))
    return policies
