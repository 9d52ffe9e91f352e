"""Device-side augmentation: what is drawn for a sample depends on its key alone, and each operation is held against
an independent reference."""

import functools

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from torch.nn.functional import one_hot

from vit_hf.arguments import RandAugment, RandomCrop, RunArguments, pick
from vit_hf.data import randomness
from vit_hf.data.augment.crops import flips, random_padded_crop, random_resized_crop, resized_crop_boxes
from vit_hf.data.augment.erasing import erasing_boxes, random_erasing
from vit_hf.data.augment.mixing import Mixing, mix
from vit_hf.data.augment.pipeline import Augment, AugmentSettings, make_augment, normalise
from vit_hf.data.augment.policies import color_jitter, rand_augment, trivial_augment
from vit_hf.data.preprocessing import Preprocessing, PreprocessingSettings, choose_preprocessing
from vit_hf.data.randomness import sample_keys, uniform

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


def keys_of(num: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    index = np.arange(num, dtype=np.int64)
    return sample_keys(seed, np.full_like(index, epoch), index)


def pixels_of(batch: int, height: int = 12, width: int = 10, seed: int = 0) -> torch.Tensor:
    levels = np.random.RandomState(seed).randint(0, 256, (batch, height, width, 3))
    return torch.from_numpy(levels.astype(np.uint8))


def batch_of(index: np.ndarray, epoch: int = 3, num_classes: int = 5) -> dict[str, torch.Tensor]:
    """Sample i always has the same pixels and label."""
    return {
        "pixel_values": pixels_of(64)[torch.from_numpy(index)].permute(0, 3, 1, 2),
        "labels": torch.from_numpy(index) % num_classes,
        "visit": torch.full((len(index),), epoch),
        "index": torch.from_numpy(index),
    }


def make(**changes) -> Augment:
    options = dict(seed=7, num_classes=5, mean=MEAN, std=STD, device=torch.device("cpu"))
    return Augment(**{**options, **changes})


# --- operations ---


STAY = np.zeros(2000, dtype=bool)


def test_padded_crop_equals_numpy():
    pixels, keys = pixels_of(40), keys_of(40)
    flipped = np.arange(40) % 3 == 0
    found = random_padded_crop(pixels, keys, 3, flipped)
    tops = (uniform(keys, randomness.CROP_TOP) * 7).astype(int)
    lefts = (uniform(keys, randomness.CROP_LEFT) * 7).astype(int)
    assert set(tops) == set(lefts) == set(range(7))  # every shift occurs
    for image, top, left, mirrored, result in zip(pixels.numpy(), tops, lefts, flipped, found.numpy()):
        cut = np.pad(image, ((3, 3), (3, 3), (0, 0)))[top : top + 12, left : left + 10]
        assert np.array_equal(result, cut[:, ::-1] if mirrored else cut)
    assert found.dtype == torch.uint8


def bilinear(image: np.ndarray, box: tuple[float, ...]) -> np.ndarray:
    """The image at the pixel centres of a grid over the box, written out: (H, W, C) -> float64 (H, W, C)."""
    top, left, box_height, box_width = box
    height, width, _ = image.shape

    def weights(start, extent, size):
        centre = np.clip(start + (np.arange(size) + 0.5) * extent / size - 0.5, 0, size - 1)
        low = np.minimum(np.floor(centre).astype(int), size - 2)
        matrix = np.zeros((size, size))
        matrix[np.arange(size), low] = 1 - (centre - low)
        matrix[np.arange(size), low + 1] = centre - low
        return matrix

    rows, columns = weights(top, box_height, height), weights(left, box_width, width)
    return np.einsum("yi,ijc,xj->yxc", rows, image.astype(np.float64), columns)


def test_resized_crop_equals_numpy_and_pillow():
    """To the rounding of grey levels; Pillow, which rounds twice, within one grey level, borders too."""
    pixels, keys = pixels_of(50), keys_of(50)
    flipped = np.arange(50) % 2 == 0
    boxes = resized_crop_boxes(keys, (12, 10), RandomCrop("scale", 0.2))
    found = random_resized_crop(pixels, boxes, flipped)
    assert found.dtype == torch.uint8
    for image, (top, left, height, width), mirrored, result in zip(
        pixels.numpy(), boxes.astype(float), flipped, found.numpy().astype(int)
    ):
        result = result[:, ::-1] if mirrored else result
        np.testing.assert_allclose(result, bilinear(image, (top, left, height, width)), atol=0.5 + 1e-2)
        corners = (left, top, min(left + width, 10), min(top + height, 12))
        pillow = Image.fromarray(image).resize((10, 12), Image.Resampling.BILINEAR, box=corners)
        assert abs(result - np.asarray(pillow)).max() <= 1


def test_bicubic_crop_equals_pillow_and_leaves_the_others_bilinear():
    """Within one grey level, at the borders of the image too."""
    pixels, keys = pixels_of(50), keys_of(50)
    flipped, boxes = np.arange(50) % 2 == 0, resized_crop_boxes(keys, (12, 10), RandomCrop("scale", 0.2))
    sharp = np.arange(50) % 3 == 0
    every, some = (random_resized_crop(pixels, boxes, flipped, which) for which in (sharp | True, sharp))
    soft = random_resized_crop(pixels, boxes, flipped)
    assert torch.equal(some[sharp], every[sharp]) and torch.equal(some[~sharp], soft[~sharp])
    for image, (top, left, height, width), mirrored, result in zip(
        pixels.numpy(), boxes.astype(float), flipped, every.numpy().astype(int)
    ):
        result = result[:, ::-1] if mirrored else result
        corners = (left, top, min(left + width, 10), min(top + height, 12))
        pillow = Image.fromarray(image).resize((10, 12), Image.Resampling.BICUBIC, box=corners)
        assert abs(result - np.asarray(pillow)).max() <= 1
    whole = np.tile(np.array([0, 0, 12, 10], dtype=np.float32), (4, 1))
    assert torch.equal(random_resized_crop(pixels[:4], whole, STAY[:4], np.ones(4, dtype=bool)), pixels[:4])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_a_samples_crop_is_resized_alike_wherever_it_is_cut(interpolation):
    """On the device, by the keys: half of the samples bicubic where it is drawn. (Workers: test_loader.py.)"""
    keys = keys_of(2000)
    how = choose_preprocessing((12, 10), None, list, PreprocessingSettings(interpolation=interpolation))
    drawn = how.bicubic_crops(keys)
    assert drawn.mean() == {"bilinear": 0, "bicubic": 1}.get(interpolation, pytest.approx(0.5, abs=0.04))
    assert np.array_equal(how.bicubic_crops(keys[:7]), drawn[:7])  # by the key alone
    pixels, keys, crop = pixels_of(40), keys_of(40), RandomCrop("scale", 0.3)
    found = make(crop=crop, bicubic_crops=how.bicubic_crops).change(pixels, keys)
    boxes = resized_crop_boxes(keys, (12, 10), crop)
    assert torch.equal(found, random_resized_crop(pixels, boxes, np.zeros(40, dtype=bool), drawn[:40]))


def test_box_of_the_whole_image_keeps_it():
    pixels = pixels_of(4)
    whole = np.tile(np.array([0, 0, 12, 10], dtype=np.float32), (4, 1))
    assert torch.equal(random_resized_crop(pixels, whole, STAY[:4]), pixels)


def test_flip_mirrors_the_stated_share():
    pixels, keys = pixels_of(2000, 3, 4), keys_of(2000)
    found = make(flip=0.3).change(pixels, keys)
    mirrored = (found == pixels.flip(2)).all(dim=3).all(dim=2).all(dim=1)
    same = (found == pixels).all(dim=3).all(dim=2).all(dim=1)
    assert (mirrored | same).all()
    assert abs(mirrored.float().mean() - 0.3) < 5 * (0.3 * 0.7 / 2000) ** 0.5
    assert torch.equal(make(flip=1.0).change(pixels, keys), pixels.flip(2))
    assert torch.equal(make(flip=0.0).change(pixels, keys), pixels)
    assert np.array_equal(flips(keys, 0.3), mirrored.numpy())


def test_erasing_fills_one_box_of_the_stated_share_with_noise():
    """In about the stated share of the samples; 2 to 33 % of the area (rounded to pixels), even noise in each channel."""
    pixels = torch.full((1500, 40, 50, 3), 100, dtype=torch.uint8)
    found = random_erasing(pixels, keys_of(1500), 0.4)
    changed = (found != pixels).any(dim=3)
    rows = torch.nonzero(changed.flatten(1).any(1))[:, 0]
    assert abs(len(rows) / 1500 - 0.4) < 5 * (0.24 / 1500) ** 0.5
    values = []
    for row in rows.tolist():
        ys, xs = torch.nonzero(changed[row], as_tuple=True)
        box = found[row, ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        assert 0.01 < box[..., 0].numel() / 2000 < 0.36
        assert changed[row].sum() > 0.95 * box[..., 0].numel()  # one whole box; noise may hit the old level
        values.append(box.reshape(-1, 3))
    values = torch.cat(values).float()
    assert abs(values.mean(0) - 127.5).max() < 1 and abs(values.std(0) - 73.9).max() < 1
    assert abs(np.corrcoef(values.T.numpy())[0, 1]) < 0.02
    assert torch.equal(random_erasing(pixels, keys_of(1500), 0.0), pixels)


@pytest.mark.parametrize("mode", ["pixel", "const"])
def test_erasing_after_normalisation_fills_the_same_boxes(mode):
    """timm's modes: zeros, the mean colour, or normal noise of each value; by the key alone."""
    batch = {**batch_of(np.arange(64)), "pixel_values": torch.full((64, 3, 40, 50), 255, dtype=torch.uint8)}
    plain, _ = make()(batch, 0, 0, 0)
    before, _ = make(erasing=0.5)(batch, 0, 0, 0)
    found, _ = make(erasing=0.5, erasing_mode=mode)(batch, 0, 0, 0)
    inside = (found != plain).any(1)
    rows, start, end = erasing_boxes(keys_of(64, seed=7, epoch=3), (40, 50), 0.5)
    expected = torch.zeros(64, 40, 50, dtype=torch.bool)
    for row, (top, left), (bottom, right) in zip(rows, start.astype(int), end.astype(int)):
        expected[row, top:bottom, left:right] = True
    assert torch.equal(inside, expected) and not (before != plain).any(1)[~expected].any()
    filled = found.permute(0, 2, 3, 1)[expected]
    if mode == "const":
        assert (filled == 0).all()
    else:
        assert scipy.stats.kstest(filled.flatten().numpy(), "norm").statistic < 1.95 / filled.numel() ** 0.5
        assert abs(np.corrcoef(filled.T.numpy()) - np.eye(3)).max() < 5 / len(filled) ** 0.5
    turned = torch.arange(63, -1, -1)
    backwards = {name: value[turned] for name, value in batch.items()}
    assert torch.equal(make(erasing=0.5, erasing_mode=mode)(backwards, 9, 1, 3)[0], found[turned])


def test_normalised_values_are_the_image_processors():
    pixels = pixels_of(4)
    processor = Preprocessing((12, 10), image_mean=tuple(MEAN), image_std=tuple(STD)).image_processor()
    expected = processor([image.numpy() for image in pixels], return_tensors="pt")["pixel_values"]
    found = normalise(pixels.permute(0, 3, 1, 2), torch.tensor(MEAN), torch.tensor(STD))
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

CROPS = [RandomCrop(kind, amount) for kind, amount in (("none", 0), ("padding", 2), ("simple", 4), ("scale", 0.2))]
CROPS += [RandomCrop("scale", 0.2, "tensorflow")]
POLICIES = {
    "none": {},
    "RandAugment": {"policies": [rand_augment]},
    "the other op set": {"policies": [functools.partial(rand_augment, magnitude=10, ops="big_vision")], "fill": 128},
    "timm": {
        "policies": [functools.partial(rand_augment, ops="timm", magnitude_std=0.5)], "fill": (9, 99, 199),
        "erasing": 0.5, "erasing_mode": "pixel",
    },
    "TrivialAugment, jitter, erasing": {
        "policies": [trivial_augment, functools.partial(color_jitter, strength=0.4)], "erasing": 0.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("crop", CROPS)
def test_a_sample_does_not_depend_on_its_batch_step_or_rank(crop, policy):
    apply = make(crop=crop, flip=0.5, label_smoothing=0.1, **POLICIES[policy])
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
        assert changed > (0.2 if crop.kind == "none" else 0.7)  # a flip alone changes about half


# --- mixup and cutmix ---


def inputs(batch: int = 5, height: int = 12, width: int = 10):
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(batch, 3, height, width, generator=generator)
    return pixel_values, one_hot(torch.arange(batch) % 4, 4).float()


@pytest.mark.parametrize("seed", range(4))
def test_mixup_written_out(seed):
    pixel_values, targets = inputs()
    before = pixel_values.clone()
    mixed, mixed_targets = mix(pixel_values, targets, np.random.default_rng(seed), Mixing(0.4, 0.0))
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
    mixed, mixed_targets = mix(pixel_values, targets, np.random.default_rng(seed), Mixing(0.0, 1.0))
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


def test_elementwise_mixing_draws_for_each_sample():
    """Each sample is its own mixup or cutmix with its mirror place, and its target follows its own share."""
    pixel_values, targets = inputs(batch=64)
    targets = torch.eye(64)
    mixed, mixed_targets = mix(pixel_values, targets, np.random.default_rng(0), Mixing(1.0, 1.0, mode="elem"))
    shares, cuts = set(), 0
    for sample in range(64):
        own, other = pixel_values[sample], pixel_values[63 - sample]
        share = mixed_targets[sample, sample].item()
        shares.add(round(share, 5))
        torch.testing.assert_close(mixed_targets[sample].sum(), torch.tensor(1.0))
        taken = (mixed[sample] == other).all(0)
        if ((mixed[sample] == own).all(0) | taken).all():
            cuts += 1
            assert share == pytest.approx(1 - taken.float().mean().item(), abs=1e-6)
        else:
            torch.testing.assert_close(mixed[sample], share * own + (1 - share) * other, rtol=1e-4, atol=1e-4)
    assert len(shares) > 40 and 15 < cuts < 50


def test_both_on_draws_each_half_of_the_time():
    pixel_values, targets = inputs()
    cut = 0
    for seed in range(200):
        mixed, _ = mix(pixel_values, targets, np.random.default_rng(seed), Mixing(1.0, 1.0))
        partner = pixel_values.flip(0)
        cut += bool(((mixed == pixel_values) | (mixed == partner)).all())  # cutmix only moves values
    assert 70 <= cut <= 130


@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_some_draws_mix_nothing(mode):
    """With probability 1 - prob the sample and its target stay as they are, of mixup and of cutmix alike."""
    pixel_values, targets = inputs(batch=64)
    targets = torch.eye(64)
    for alphas in ((1.0, 0.0), (0.0, 1.0)):
        still = []
        for seed in range(8 if mode == "elem" else 300):
            mixing = Mixing(*alphas, mode=mode, prob=0.7)
            mixed, mixed_targets = mix(pixel_values, targets, np.random.default_rng(seed), mixing)
            own = mixed_targets.diagonal() == 1
            assert torch.equal(mixed[own], pixel_values[own])
            still += own.tolist() if mode == "elem" else [own.all().item()]
        # a cutmix box that leaves no pixel changes nothing either
        assert abs(np.mean(still) - 0.3) < 0.075 + (0.03 if alphas[1] else 0)
    mixed, mixed_targets = mix(pixel_values, targets, np.random.default_rng(0), Mixing(1.0, 1.0, mode, prob=0.0))
    assert torch.equal(mixed, pixel_values) and torch.equal(mixed_targets, targets)


@pytest.mark.parametrize(("switch_prob", "low", "high"), [(0.0, 0, 0), (0.2, 40, 80), (1.0, 300, 300)])
def test_cutmix_is_chosen_with_the_stated_probability(switch_prob, low, high):
    pixel_values, targets = inputs()
    cut = 0
    for seed in range(300):
        mixing = Mixing(1.0, 1.0, switch_prob=switch_prob)
        mixed, _ = mix(pixel_values, targets, np.random.default_rng(seed), mixing)
        cut += bool(((mixed == pixel_values) | (mixed == pixel_values.flip(0))).all())
    assert low <= cut <= high


def test_mixing_ends_at_its_step():
    batch = batch_of(np.arange(6))
    plain, plain_targets = make()(batch, 0, 0, 0)
    with_end, endless = make(mixing=Mixing(0.8, off_step=7)), make(mixing=Mixing(0.8))
    assert torch.equal(with_end(batch, 6, 0, 0)[0], endless(batch, 6, 0, 0)[0])
    assert not torch.equal(with_end(batch, 6, 0, 0)[0], plain)
    for step in (7, 8, 10_000):
        pixel_values, targets = with_end(batch, step, 1, 3)
        assert torch.equal(pixel_values, plain) and torch.equal(targets, plain_targets)


def test_the_flags_of_mixing_and_erasing_reach_the_batches():
    """From the flags to the values, with the end of mixing as a step."""
    args = RunArguments(
        mixup_alpha=0.8, cutmix_alpha=1.0, mixup_mode="elem", mixup_prob=0.9, mixup_switch_prob=0.2, mixup_off_epoch=3,
        random_erasing=0.3, random_erasing_mode="pixel", randaugment=RandAugment(ops="timm"),
        random_crop=RandomCrop("scale", 0.1),
    )  # fmt: skip
    preprocessing = Preprocessing((32, 32), image_mean=(0.485, 0.456, 0.406))
    crop = RandomCrop("scale", 0.1)
    made = functools.partial(
        make_augment, preprocessing=preprocessing, device=torch.device("cpu"), seed=0, num_classes=10
    )
    augment = made(pick(AugmentSettings, args), crop=crop, first_step_of=lambda epoch: 100 * epoch)
    assert augment.mixing == Mixing(0.8, 1.0, "elem", prob=0.9, switch_prob=0.2, off_step=300)
    assert (augment.erasing, augment.erasing_mode) == (0.3, "pixel") and augment.crop == crop
    assert augment.fill.tolist() == [124, 116, 104]
    other = made(pick(AugmentSettings, RunArguments()), crop=RandomCrop(), first_step_of=int)
    assert other.crop == RandomCrop() and other.mixing.off_step is None


def test_augment_draws_the_mix_from_seed_step_micro_step_and_rank():
    batch = batch_of(np.arange(6))
    apply = make(mixing=Mixing(0.8), label_smoothing=0.1)
    found, targets = apply(batch, 3, 1, 2)
    plain, plain_targets = make(label_smoothing=0.1)(batch, 3, 1, 2)
    share = np.random.default_rng([7, 3, 1, 2]).beta(0.8, 0.8)
    torch.testing.assert_close(found, share * plain + (1 - share) * plain.flip(0))
    torch.testing.assert_close(targets, share * plain_targets + (1 - share) * plain_targets.flip(0))
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    for place in ((4, 1, 2), (3, 0, 2), (3, 1, 1)):
        assert not torch.equal(apply(batch, *place)[0], found)
