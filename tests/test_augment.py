"""Device-side augmentation: what is drawn for a sample depends on its key alone, and each operation is held against
an independent reference."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import one_hot

from vit_hf.data import augment
from vit_hf.data.augment import (
    Augment,
    epoch_order,
    mix,
    normalise,
    random_flip,
    random_padded_crop,
    random_resized_crop,
    resized_crop_boxes,
    sample_keys,
    uniform,
)
from vit_hf.data.decode import Preprocessing

USES = [augment.FLIP, augment.CROP_TOP, augment.CROP_LEFT, augment.CROP_AREA, augment.CROP_RATIO, augment.REPLACEMENT]
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


def keys_of(num: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    index = np.arange(num, dtype=np.int64)
    return sample_keys(seed, np.full_like(index, epoch), index)


def pixels_of(batch: int, height: int = 12, width: int = 10, seed: int = 0) -> torch.Tensor:
    levels = np.random.RandomState(seed).randint(0, 256, (batch, 3, height, width))
    return torch.from_numpy(levels.astype(np.uint8))


def batch_of(index: np.ndarray, epoch: int = 3, num_classes: int = 5) -> dict[str, torch.Tensor]:
    """Sample i always has the same pixels and label."""
    return {
        "pixel_values": pixels_of(64)[torch.from_numpy(index)],
        "labels": torch.from_numpy(index) % num_classes,
        "epoch": torch.full((len(index),), epoch),
        "index": torch.from_numpy(index),
    }


def make(**changes) -> Augment:
    options = dict(seed=7, num_classes=5, mean=MEAN, std=STD, device=torch.device("cpu"))
    return Augment(**{**options, **changes})


# --- keys ---


def test_numpy_and_torch_draw_the_same_bits():
    rng = np.random.RandomState(0)
    epoch = rng.randint(0, 10**6, 1000).astype(np.int64)
    index = rng.randint(0, 2**62, 1000).astype(np.int64)
    for seed in (0, 1, 2**31):
        keys = sample_keys(seed, epoch, index)
        assert (torch.from_numpy(keys) == sample_keys(seed, torch.from_numpy(epoch), torch.from_numpy(index))).all()
        for use in [*USES, augment.REPLACEMENT + 99]:
            drawn = uniform(keys, use)
            assert drawn.dtype == np.float32
            assert np.array_equal(drawn, uniform(torch.from_numpy(keys), use).numpy())


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


# --- operations ---


def test_padded_crop_equals_numpy():
    pixels, keys = pixels_of(40), keys_of(40)
    found = random_padded_crop(pixels, torch.from_numpy(keys), 3)
    tops = (uniform(keys, augment.CROP_TOP) * 7).astype(int)
    lefts = (uniform(keys, augment.CROP_LEFT) * 7).astype(int)
    assert set(tops) == set(lefts) == set(range(7))  # every shift occurs
    for image, top, left, result in zip(pixels.numpy(), tops, lefts, found.numpy()):
        padded = np.pad(image, ((0, 0), (3, 3), (3, 3)))
        assert np.array_equal(result, padded[:, top : top + 12, left : left + 10])
    assert found.dtype == torch.uint8


def bilinear(image: np.ndarray, box: tuple[float, ...]) -> np.ndarray:
    """The image at the pixel centres of a grid over the box, written out: (C, H, W) -> float64 (C, H, W)."""
    top, left, box_height, box_width = box
    _, height, width = image.shape

    def weights(start, extent, size):
        centre = np.clip(start + (np.arange(size) + 0.5) * extent / size - 0.5, 0, size - 1)
        low = np.minimum(np.floor(centre).astype(int), size - 2)
        matrix = np.zeros((size, size))
        matrix[np.arange(size), low] = 1 - (centre - low)
        matrix[np.arange(size), low + 1] = centre - low
        return matrix

    rows, columns = weights(top, box_height, height), weights(left, box_width, width)
    return np.einsum("yi,cij,xj->cyx", rows, image.astype(np.float64), columns)


def test_resized_crop_equals_numpy_and_pillow():
    """Float arithmetic to 1e-2 of a grey level; Pillow, which rounds twice, within one grey level, borders too."""
    pixels, keys = pixels_of(50), keys_of(50)
    found = random_resized_crop(pixels, torch.from_numpy(keys), 0.2)
    boxes = np.stack(resized_crop_boxes(keys, 12, 10, 0.2), axis=1).astype(np.float64)
    for image, (top, left, height, width), result in zip(pixels.numpy(), boxes, found.numpy()):
        np.testing.assert_allclose(result, bilinear(image, (top, left, height, width)), atol=1e-2)
        corners = (left, top, min(left + width, 10), min(top + height, 12))
        pillow = Image.fromarray(image.transpose(1, 2, 0)).resize((10, 12), Image.Resampling.BILINEAR, box=corners)
        assert abs(result - np.asarray(pillow).transpose(2, 0, 1).astype(np.float32)).max() <= 1.0


def test_crop_boxes_lie_inside_and_cover_the_stated_share():
    height, width = 40, 60
    top, left, box_height, box_width = resized_crop_boxes(keys_of(20_000), height, width, 0.1)
    assert min(top.min(), left.min()) >= 0
    assert (top + box_height).max() <= height + 1e-4 and (left + box_width).max() <= width + 1e-4
    share, ratio = box_height * box_width / (height * width), box_width / box_height
    whole = (box_height < height) & (box_width < width)  # not cut to the image
    assert ratio[whole].min() >= 3 / 4 - 1e-5 and ratio[whole].max() <= 4 / 3 + 1e-5
    assert share[whole].min() >= 0.1 - 1e-5 and share.max() <= 1 + 1e-5
    small = share[share < 0.5]  # boxes this small always fit: uniform in area
    assert whole[share < 0.5].all()
    assert abs(np.histogram(small, 8, (0.1, 0.5))[0] / len(share) - 0.05 / 0.9).max() < 0.01
    # uniform places: the centre of the box is the centre of the image on average
    assert (
        abs((top + box_height / 2).mean() - height / 2) < 0.2 and abs((left + box_width / 2).mean() - width / 2) < 0.3
    )
    for found, torch_found in zip(
        (top, left, box_height, box_width), resized_crop_boxes(torch.from_numpy(keys_of(20_000)), height, width, 0.1)
    ):
        np.testing.assert_allclose(found, torch_found.numpy(), atol=1e-4)


def test_whole_area_of_a_square_image_is_possible_and_crop_keeps_it():
    """A box that is the image gives the image back."""
    pixels = pixels_of(4, 12, 12)
    grid_keys = torch.from_numpy(keys_of(4))
    original = augment.resized_crop_boxes
    try:
        augment.resized_crop_boxes = lambda keys, height, width, scale: (
            torch.zeros(4), torch.zeros(4), torch.full((4,), float(height)), torch.full((4,), float(width))
        )  # fmt: skip
        found = random_resized_crop(pixels, grid_keys, 1.0)
    finally:
        augment.resized_crop_boxes = original
    torch.testing.assert_close(found, pixels.float(), rtol=0, atol=1e-2)


def test_flip_mirrors_the_stated_share():
    pixels, keys = pixels_of(2000, 3, 4), torch.from_numpy(keys_of(2000))
    found = random_flip(pixels, keys, 0.3)
    mirrored = (found == pixels.flip(-1)).all(dim=(1, 2, 3))
    same = (found == pixels).all(dim=(1, 2, 3))
    assert (mirrored | same).all()
    assert abs(mirrored.float().mean() - 0.3) < 5 * (0.3 * 0.7 / 2000) ** 0.5
    assert torch.equal(random_flip(pixels, keys, 1.0), pixels.flip(-1))
    assert torch.equal(random_flip(pixels, keys, 0.0), pixels)


def test_normalised_values_are_the_image_processors():
    pixels = pixels_of(4)
    processor = Preprocessing((12, 10), image_mean=tuple(MEAN), image_std=tuple(STD)).image_processor()
    expected = processor([image.permute(1, 2, 0).numpy() for image in pixels], return_tensors="pt")["pixel_values"]
    found = normalise(pixels, torch.tensor(MEAN), torch.tensor(STD))
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-6)


def test_everything_off_is_the_plain_normalised_image():
    batch = batch_of(np.arange(6))
    pixel_values, targets = make()(batch, 0, 0, 0)
    assert torch.equal(pixel_values, normalise(batch["pixel_values"], torch.tensor(MEAN), torch.tensor(STD)))
    assert torch.equal(targets, torch.eye(5)[[0, 1, 2, 3, 4, 0]])


def test_label_smoothing_spreads_over_all_classes():
    _, targets = make(label_smoothing=0.1)(batch_of(np.arange(2)), 0, 0, 0)
    expected = torch.tensor([[0.92, 0.02, 0.02, 0.02, 0.02], [0.02, 0.92, 0.02, 0.02, 0.02]])
    torch.testing.assert_close(targets, expected)


# --- what a sample looks like depends on its key alone ---

CROPS = [("none", 0.0), ("padding", 2.0), ("scale", 0.2)]


@pytest.mark.parametrize("crop", CROPS)
def test_a_sample_does_not_depend_on_its_batch_step_or_rank(crop):
    apply = make(crop=crop, flip=0.5, label_smoothing=0.1)
    whole, targets = apply(batch_of(np.arange(24)), step=4, micro_step=0, rank=0)
    cut = [apply(batch_of(part), 9, micro, 3) for micro, part in enumerate(np.split(np.arange(24), [1, 8, 12]))]
    assert torch.equal(torch.cat([pixels for pixels, _ in cut]), whole)
    assert torch.equal(torch.cat([part for _, part in cut]), targets)
    order = np.random.RandomState(0).permutation(24)
    shuffled, _ = apply(batch_of(order), 0, 0, 0)
    assert torch.equal(shuffled, whole[torch.from_numpy(order)])


@pytest.mark.parametrize("crop", CROPS)
def test_epoch_and_seed_change_what_a_sample_looks_like(crop):
    apply, other = make(crop=crop, flip=0.5), make(crop=crop, flip=0.5, seed=8)
    index = np.arange(24)
    first, _ = apply(batch_of(index, epoch=0), 0, 0, 0)
    for pixels in (apply(batch_of(index, epoch=1), 0, 0, 0)[0], other(batch_of(index, epoch=0), 0, 0, 0)[0]):
        changed = (pixels != first).any(dim=3).any(dim=2).any(dim=1).float().mean()
        assert changed > (0.2 if crop[0] == "none" else 0.7)  # a flip alone changes about half


# --- mixup and cutmix ---


def inputs(batch: int = 5, height: int = 12, width: int = 10):
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(batch, 3, height, width, generator=generator)
    return pixel_values, one_hot(torch.arange(batch) % 4, 4).float()


@pytest.mark.parametrize("seed", range(4))
def test_mixup_written_out(seed):
    pixel_values, targets = inputs()
    before = pixel_values.clone()
    mixed, mixed_targets = mix(pixel_values, targets, np.random.default_rng(seed), 0.4, 0.0)
    share = np.random.default_rng(seed).beta(0.4, 0.4)
    for sample in range(5):
        partner = 4 - sample
        expected = share * pixel_values[sample] + (1 - share) * pixel_values[partner]
        torch.testing.assert_close(mixed[sample], expected)
        torch.testing.assert_close(mixed_targets[sample], share * targets[sample] + (1 - share) * targets[partner])
    assert torch.equal(pixel_values, before)
    torch.testing.assert_close(mixed_targets.sum(1), torch.ones(5))


@pytest.mark.parametrize("seed", range(6))
def test_cutmix_written_out(seed):
    """A box of the other sample around a random centre, cut to the image; the targets follow its area as it is."""
    pixel_values, targets = inputs()
    before = pixel_values.clone()
    mixed, mixed_targets = mix(pixel_values, targets, np.random.default_rng(seed), 0.0, 1.0)
    rng = np.random.default_rng(seed)
    side = (1 - rng.beta(1.0, 1.0)) ** 0.5
    y, x = rng.integers(12), rng.integers(10)
    rows = range(max(int(y - side * 6), 0), min(int(y + side * 6), 12))
    columns = range(max(int(x - side * 5), 0), min(int(x + side * 5), 10))
    expected, inside = pixel_values.clone(), 0
    for row in rows:
        for column in columns:
            inside += 1
            for sample in range(5):
                expected[sample, :, row, column] = pixel_values[4 - sample, :, row, column]
    assert torch.equal(mixed, expected)
    share = 1 - inside / 120
    torch.testing.assert_close(mixed_targets, share * targets + (1 - share) * targets.flip(0))
    assert torch.equal(pixel_values, before)


def test_both_on_draws_each_half_of_the_time():
    pixel_values, targets = inputs()
    cut = 0
    for seed in range(200):
        mixed, _ = mix(pixel_values, targets, np.random.default_rng(seed), 1.0, 1.0)
        partner = pixel_values.flip(0)
        cut += bool(((mixed == pixel_values) | (mixed == partner)).all())  # cutmix only moves values
    assert 70 <= cut <= 130


def test_augment_draws_the_mix_from_seed_step_micro_step_and_rank():
    batch = batch_of(np.arange(6))
    apply = make(mixup_alpha=0.8, label_smoothing=0.1)
    found, targets = apply(batch, 3, 1, 2)
    plain, plain_targets = make(label_smoothing=0.1)(batch, 3, 1, 2)
    share = np.random.default_rng([7, 3, 1, 2]).beta(0.8, 0.8)
    torch.testing.assert_close(found, share * plain + (1 - share) * plain.flip(0))
    torch.testing.assert_close(targets, share * plain_targets + (1 - share) * plain_targets.flip(0))
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    for place in ((4, 1, 2), (3, 0, 2), (3, 1, 1)):
        assert not torch.equal(apply(batch, *place)[0], found)
