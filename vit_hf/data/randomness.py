"""The randomness of a sample: a stateless hash of (seed, visit, index), drawn on the host.

What is drawn for a sample is a function of its key alone: not of the process, the worker, the micro-batch or a resume.
"""

from typing import TypeVar

import numpy as np
from torch import Tensor

# One number for each use of a sample's randomness, so that no two draws of a sample hang together. (Operations of
# policies.py start at 1000, eight numbers a layer.)
FLIP, CROP_TOP, CROP_LEFT = 1, 2, 3
DISPLACE = 4  # where a row of a stream comes in its row group
ERASE = 6
INTERPOLATION = 90  # bilinear or bicubic, for a random crop
REPLACEMENT = 100  # and the 99 after it: another row in place of one that does not decode
CROP_ATTEMPTS = 200  # and the 399 after it: four numbers for each of up to a hundred boxes
ERASE_ATTEMPTS = 600  # and the 39 after it: four numbers for each of ten boxes

Array = TypeVar("Array", np.ndarray, Tensor)  # int64: the mixing works for both, on every device
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def mix_bits(x: Array) -> Array:
    """The finaliser of splitmix64. Source: Steele, Lea, Flood, OOPSLA 2014; shifts made logical by the masks."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def sample_keys(seed: int, visit: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The key of each sample's randomness: int64 (B,) from the run's seed, the number of times that the run has seen
    the sample before (its epoch, where no sample is repeated inside one), and the sample's index."""
    return mix_bits(mix_bits(mix_bits(index * 0 + (seed + 1)) + visit * _GOLDEN) + index * _GOLDEN)


def uniform(keys: np.ndarray, use: int | np.ndarray) -> np.ndarray:
    """One float32 in [0, 1) for each key and each use, in steps of 2**-24: (B,), or (B, U) for uses (U,)."""
    offset = np.asarray(use, dtype=np.int64) * np.int64(_GOLDEN) & np.int64((1 << 63) - 1)
    keys = keys[:, None] if offset.ndim else keys
    return ((mix_bits(keys + offset) >> 40) & ((1 << 24) - 1)).astype(np.float32) * np.float32(2**-24)
