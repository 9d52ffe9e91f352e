"""The stateless hash behind order and augmentation."""

import numpy as np
import pytest
import torch

from vit_hf.data import randomness
from vit_hf.data.augment import policies
from vit_hf.data.order import epoch_order
from vit_hf.data.randomness import mix_bits, sample_keys, uniform

USES = [
    randomness.FLIP,
    randomness.CROP_TOP,
    randomness.CROP_LEFT,
    randomness.REPLACEMENT,
    randomness.ERASE,
    randomness.CROP_ATTEMPTS,
    randomness.CROP_ATTEMPTS + 7,
    randomness.ERASE_ATTEMPTS + 1,
]


def keys_of(num: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    index = np.arange(num, dtype=np.int64)
    return sample_keys(seed, np.full_like(index, epoch), index)


def test_numpy_and_torch_mix_the_same_bits():
    """The noise of random erasing is mixed on the device."""
    numbers = np.random.RandomState(0).randint(-(2**62), 2**62, 1000).astype(np.int64)
    assert np.array_equal(mix_bits(numbers), mix_bits(torch.from_numpy(numbers)).numpy())


def test_many_uses_at_once_draw_what_each_draws_alone():
    keys = keys_of(100, seed=5)
    together = uniform(keys, np.array(USES))
    assert together.dtype == np.float32 and together.shape == (100, len(USES))
    for column, use in enumerate(USES):
        assert np.array_equal(together[:, column], uniform(keys, use))


def test_no_use_is_shared():
    layers = 1000 + 8 * np.arange(12)[:, None] + np.arange(8)
    counts = {"REPLACEMENT": 100, "CROP_ATTEMPTS": 4 * 100, "ERASE_ATTEMPTS": 4 * 10}  # of each other one use
    first = {name: value for name, value in vars(randomness).items() if name.isupper() and not name.startswith("_")}
    assert set(counts) < set(first) and "DISPLACE" in first
    others = [value + number for name, value in first.items() for number in range(counts.get(name, 1))]
    assert len(set(others)) == len(others) and not set(others) & set(layers.ravel().tolist())
    assert policies._JITTER_LAYER >= 8  # as many as RandAugment may have


def test_keys_are_the_documented_hash():
    """splitmix64's finaliser in Python's integers, so that a rewrite cannot change what old runs drew."""
    mask = 2**64 - 1

    def finalise(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    for seed, epoch, index in ((0, 0, 0), (3, 2, 17), (42, 1000, 10**9)):
        state = finalise(seed + 1)
        for number in (epoch, index):
            state = finalise((state + number * golden) & mask)
        key = int(sample_keys(seed, np.array([epoch]), np.array([index]))[0])
        assert key & mask == state
    keys = [int(key) & mask for key in keys_of(50, seed=3, epoch=2)]
    signed = [(finalise(key) + 2**63) % 2**64 for key in keys]  # as int64 sorts them
    assert epoch_order(3, 2, 50).tolist() == sorted(range(50), key=signed.__getitem__)


@pytest.mark.parametrize("use", USES)
def test_draws_are_uniform(use):
    """Chi-square over 64 bins within 5 standard deviations of its mean, for the keys of one epoch."""
    drawn = uniform(keys_of(64_000), use)
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = np.bincount((drawn * 64).astype(int), minlength=64)
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert abs(chi_square - 63) < 5 * (2 * 63) ** 0.5


def test_draws_are_independent_between_uses_epochs_seeds_and_neighbours():
    """Sample correlations of 50,000 pairs stay below 5 / sqrt(50,000)."""
    keys = keys_of(50_000)
    columns = [uniform(keys, use) for use in USES]
    columns += [uniform(keys_of(50_000, epoch=1), USES[0]), uniform(keys_of(50_000, seed=1), USES[0])]
    columns += [np.roll(columns[0], 1)]
    correlations = np.corrcoef(columns) - np.eye(len(columns))
    assert abs(correlations).max() < 5 / 50_000**0.5


def test_epoch_order_is_a_permutation_and_a_function_of_seed_and_epoch():
    orders = {(seed, epoch): epoch_order(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)}
    for order in orders.values():
        assert np.array_equal(np.sort(order), np.arange(1000))
    assert np.array_equal(orders[0, 1], epoch_order(0, 1, 1000))
    listed = list(orders.values())
    for first in range(4):
        for second in range(first):
            assert (listed[first] == listed[second]).sum() < 15  # chance alone leaves about one in place
    assert abs(np.corrcoef(listed[0], np.arange(1000))[0, 1]) < 0.15


def test_order_and_crops_are_not_drawn_from_the_same_numbers():
    """The samples that come first in an epoch are not cropped in another way than the last ones."""
    order = epoch_order(0, 0, 50_000)
    place = np.empty(50_000)
    place[order] = np.arange(50_000)
    for use in USES:
        assert abs(np.corrcoef(place, uniform(keys_of(50_000), use))[0, 1]) < 5 / 50_000**0.5
