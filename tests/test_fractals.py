"""The fractal set: its classes are attractors of the size they promise, its rows never change, no picture is empty."""

import dataclasses
import io
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vit_hf.data.sets import fractals
from vit_hf.data.sets.fractals import FractalOptions, FractalRows, fractal_classes, parse_options, render
from vit_hf.errors import UserError

SMALL = FractalOptions(num_classes=12, instances_per_class=4, image_size=32)
OFDB = FractalOptions(num_classes=12, instances_per_class=1)
HALF = [0.5, 0, 0, 0.5]
SIERPINSKI = np.array([[*HALF, 0, 0], [*HALF, 0.5, 0], [*HALF, 0, 0.5]])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("fractals"))


@pytest.fixture(scope="module")
def splits(cache):
    return fractals.load_fractal_splits(SMALL, cache_dir=cache)


def _contents(split):
    return [image["bytes"] for image in split.with_format("arrow")[:]["image"].to_pylist()]


def _chaos_game(system, num_points, rng, chains=2000):
    """Plain chaos games side by side, maps chosen by |determinant|: x and y (num_points,)."""
    area = np.abs(np.linalg.det(system[:, :4].reshape(-1, 2, 2)))
    point, points = np.zeros((chains, 2)), []
    for step in range(50 + num_points // chains):
        chosen = system[rng.choice(len(system), size=chains, p=area / area.sum())]
        point = np.einsum("nij,nj->ni", chosen[:, :4].reshape(-1, 2, 2), point) + chosen[:, 4:]
        if step >= 50:
            points.append(point)
    return np.concatenate(points).T


def _covered(x, y, size):
    """The pixels that hold a point when the points' bounding box is the picture, y upwards: bool (size, size)."""
    return np.histogram2d(-y, x, bins=size)[0] > 0


def _overlap(one, other):
    return np.count_nonzero(one & other) / np.count_nonzero(one | other)


def test_options_are_read_from_the_flag():
    assert parse_options(None) == parse_options("") == FractalOptions()
    read = parse_options("num_classes=10, instances_per_class=1,image_size=224,colour=False,seed=3,")
    assert read == FractalOptions(num_classes=10, instances_per_class=1, image_size=224, colour=False, seed=3)


@pytest.mark.parametrize(
    "text, parts",
    [
        ("num_classes=1", ["num_classes=1", "2..100000"]),
        ("num_classes=many", ["num_classes='many'", "2..100000"]),
        ("num_classes=1e3", ["'1e3'", "2..100000"]),
        ("instances_per_class=0", ["instances_per_class=0", "1..1000000"]),
        ("image_size=2048", ["image_size=2048", "16..1024"]),
        ("image_size=true", ["image_size=True", "16..1024"]),
        ("seed=-1", ["seed=-1", "0.."]),
        ("colour=grey", ["colour='grey'", "true and false"]),
        ("colour", ["colour=''", "true and false"]),
        ("color=true", ["'color'", "did you mean 'colour'?"]),
        ("num_class=10", ["'num_class'", "'num_classes'"]),
        ("seed=1,seed=2", ["seed is given twice"]),
        ("seed\n=1\nx", ["'1\\nx'"]),
    ],
)
def test_wrong_options_are_one_line_with_the_flag(text, parts):
    with pytest.raises(UserError) as caught:
        parse_options(text)
    message = str(caught.value)
    assert "--dataset_config_name" in message and "\n" not in message
    assert all(part in message for part in parts), message


def test_a_class_depends_on_seed_and_number_alone():
    few, more = fractal_classes(OFDB), fractal_classes(dataclasses.replace(OFDB, num_classes=70))
    assert len(few) == 12 and len(more) == 70
    assert all(np.array_equal(few[number], more[number]) for number in range(12))
    assert len({system.tobytes() for system in map(more.__getitem__, range(70))}) == 70
    other = fractal_classes(dataclasses.replace(OFDB, seed=1))
    assert not any(np.array_equal(few[number], other[number]) for number in range(12))
    for system in map(more.__getitem__, range(70)):
        assert 2 <= len(system) <= 8 and system.shape[1] == 6 and np.abs(system).max() <= 1
    assert len({len(more[number]) for number in range(70)}) >= 5, "systems of many sizes"


def test_every_class_fills_a_fifth_of_the_search_picture():
    """By a chaos game of FractalDB's own size; the two ways to draw 100,000 points differ by a few percent."""
    systems, rng = fractal_classes(dataclasses.replace(OFDB, num_classes=70)), np.random.default_rng(0)
    fills = [_covered(*_chaos_game(systems[number], 100_000, rng), 500).sum() / 512**2 for number in range(40)]
    assert min(fills) > 0.19 and np.mean(fills) > 0.21, fills


def test_the_sierpinski_triangle_is_drawn_pixel_by_pixel():
    """Its cell (i, j) of 64 x 64 is covered where i and j have no binary digit in common."""
    options = FractalOptions(num_classes=2, instances_per_class=1, image_size=66, colour=False)
    cells = np.arange(64)
    expected = (cells[:, None] & cells)[::-1] == 0
    for index in range(4):
        pixels = render(SIERPINSKI, options, "train", index)[:, :, 0] > 0
        assert pixels.sum() == pixels[1:-1, 1:-1].sum(), "the margin is empty"
        assert not np.any(expected & ~pixels[1:-1, 1:-1])
        # the sampled bounding box is a little too small, so some points at a cell's edge are in the next one
        assert _overlap(expected, pixels[1:-1, 1:-1]) > 0.94


def test_points_are_those_of_a_chaos_game():
    """Where the points are, and how dense: about as like a chaos game as a second chaos game is."""
    systems, rng = fractal_classes(OFDB), np.random.default_rng(0)
    for number in range(12):
        system = systems[number]
        drawn = fractals._attractor_points(system, fractals._probabilities(system), fractals._draw(rng, 64))
        games = [_chaos_game(system, 64 * 512, rng) for _ in range(2)]
        edges = [np.linspace(low, high, 33) for low, high in zip(games[0].min(axis=1), games[0].max(axis=1))]
        counts = [np.histogram2d(x.ravel(), y.ravel(), bins=edges)[0] for x, y in (*games, drawn[:2])]
        twin, ours = (np.corrcoef(counts[0].ravel(), other.ravel())[0, 1] for other in counts[1:])
        assert counts[2].sum() > 0.995 * drawn[0].size, "the points are on the attractor"
        assert ours > min(0.95, twin - 0.02), (number, ours, twin)
        assert _overlap(counts[0] > 0, counts[2] > 0) > _overlap(counts[0] > 0, counts[1] > 0) - 0.06


def test_every_map_of_a_picture_has_its_own_colour():
    pixels = render(SIERPINSKI, FractalOptions(num_classes=2, instances_per_class=1, image_size=66), "train", 0)
    corners = [pixels[40:65, 1:25], pixels[40:65, 40:65], pixels[1:25, 1:25]]  # the three copies of the triangle
    hues = []
    for corner in corners:
        colours = corner[corner.max(axis=2) > 128].astype(float)
        hues.append((colours / colours.max(axis=1, keepdims=True)).mean(axis=0))
        assert (colours / colours.max(axis=1, keepdims=True)).std(axis=0).max() < 0.02, "one hue in each copy"
    assert min(np.abs(hues[i] - hues[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.05
    # and all of it is the grey picture's brightness
    grey = render(
        SIERPINSKI, FractalOptions(num_classes=2, instances_per_class=1, image_size=66, colour=False), "train", 0
    )
    assert np.array_equal(grey[:, :, 0], grey[:, :, 1]) and np.array_equal(grey[:, :, 0], grey[:, :, 2])
    assert np.mean((grey.max(axis=2) > 0) == (pixels.max(axis=2) > 0)) > 0.97


def test_a_row_is_the_same_in_any_order_and_in_every_form(splits):
    rows = FractalRows(SMALL, "train")
    assert len(rows) == len(splits["train"]) == 48
    np.random.seed(1)  # a global generator must not matter
    order = np.random.default_rng(2).permutation(48)
    images, labels = rows.read(order)
    assert labels.dtype == np.int64 and np.array_equal(labels, order % 12)
    for image, label, index in zip(images, labels, order.tolist()):
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8
        assert np.array_equal(image, render(fractal_classes(SMALL)[label], SMALL, "train", index))
        row = splits["train"][index]
        assert row["image"].format == "PNG" and row["label"] == label
        assert np.array_equal(np.asarray(row["image"]), image)
    again, _ = pickle.loads(pickle.dumps(rows)).read(np.array([7, 7]))
    assert np.array_equal(again[0], again[1]) and np.array_equal(again[0], images[order.tolist().index(7)])
    assert splits["train"].features["label"].names[11] == "fractal_0011"


def test_another_process_draws_the_same_pixels():
    code = (
        "import numpy as np, sys; from vit_hf.data.sets.fractals import *\n"
        "rows = FractalRows(parse_options('num_classes=12,instances_per_class=4,image_size=32'), 'test')\n"
        "sys.stdout.buffer.write(rows.read(np.array([5]))[0][0].tobytes())"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, cwd=root, capture_output=True, check=True, timeout=120).stdout
    assert output == FractalRows(SMALL, "test").read(np.array([5]))[0][0].tobytes()


def test_seed_split_and_row_change_the_picture():
    system, seen = fractal_classes(SMALL)[7], set()
    for seed, split, index in ((0, "train", 7), (0, "train", 19), (0, "test", 7), (1, "train", 7)):
        seen.add(render(system, dataclasses.replace(SMALL, seed=seed), split, index).tobytes())
    assert len(seen) == 4


def test_rows_outside_a_split_are_refused():
    rows = FractalRows(SMALL, "test")
    assert len(rows) == 12
    for wrong in (12, -1):
        with pytest.raises(IndexError):
            rows.read(np.array([0, wrong]))
    assert rows.read(np.array([], dtype=np.int64))[0] == []


def test_no_picture_is_empty_or_a_dot():
    options = dataclasses.replace(OFDB, instances_per_class=40)
    for image in FractalRows(options, "train").read(np.arange(480))[0]:
        lit = image.max(axis=2) > 30
        assert lit.mean() > 0.1 and not lit.all() and image.max() > 180
        assert np.ptp(np.flatnonzero(lit.any(axis=0))) > 50 and np.ptp(np.flatnonzero(lit.any(axis=1))) > 50


def test_variations_weigh_one_parameter_in_all_maps():
    system, seen = np.full((3, 6), 0.25), set()
    for choice in range(25):
        ratios = next(fractals._variations(system, choice)) / system
        assert np.array_equal(ratios[0], ratios[1]) and np.array_equal(ratios[0], ratios[2])
        seen.add(tuple(np.round(ratios[0], 6).tolist()))
    expected = {
        tuple(factor if k == parameter else 1.0 for k in range(6))
        for parameter in range(6)
        for factor in (0.2, 0.6, 1.0, 1.4, 1.8)
    }
    assert seen == expected


@pytest.mark.filterwarnings("error")
def test_a_variation_that_diverges_or_empties_the_picture_becomes_milder():
    """A factor of 1.4 or 1.8 makes these maps expand; the thin system nearly vanishes when its heights shrink."""
    expanding = np.array([[0.9, 0.1, -0.3, 0.9, 0.2, 0.0], [0.9, -0.2, 0.2, -0.9, -0.4, 0.3]])
    assert not fractals._is_bounded(expanding * [1.8, 1, 1, 1, 1, 1])
    offered = [list(fractals._variations(expanding, choice)) for choice in range(25)]
    assert all(fractals._is_bounded(system) for systems in offered for system in systems)
    assert all(systems[-1] is expanding for systems in offered)
    factors = {round(system[0, 0] / 0.9, 3) for systems in offered for system in systems}
    assert {0.2, 0.6, 1.0, 1.05} <= factors and max(factors) < 1.2
    thin = np.array([[0.5, 0, 0, 0.55, 0, 0], [0.5, 0, 0, 0.55, 0.5, 0], [0.5, 0, 0, 0.55, 0, 0.5]])
    for system in (expanding, thin):
        plain = render(system, OFDB, "train", 0)
        assert (plain.max(axis=2) > 0).mean() > 0.1
        for index in range(120):
            image = render(system, dataclasses.replace(SMALL, image_size=64, colour=False), "train", index)
            assert (image[:, :, 0] > 0).mean() >= 0.08, index
    with pytest.raises(ValueError, match="no picture"):
        render(2 * expanding, OFDB, "train", 0)


def test_instances_vary_but_resemble_their_class():
    """The nearest training picture, up to flips and at 16 x 16 pixels, has a new picture's class far above chance."""
    options = FractalOptions(num_classes=12, instances_per_class=27, colour=False)

    def features(split):
        rows = FractalRows(options, split)
        images, labels = rows.read(np.arange(len(rows)))
        assert len({image.tobytes() for image in images}) == len(images)
        small = np.stack(images)[:, :, :, 0].reshape(-1, 16, 4, 16, 4).mean(axis=(2, 4))
        small = sum(small[:, ::rows_step, ::step] for rows_step in (1, -1) for step in (1, -1)).reshape(len(small), -1)
        small -= small.mean(axis=1, keepdims=True)
        return small / np.linalg.norm(small, axis=1, keepdims=True), labels

    (train, train_labels), (test, test_labels) = features("train"), features("test")
    assert len(test) == 36
    nearest = train_labels[np.argmax(test @ train.T, axis=1)]
    assert np.mean(nearest == test_labels) > 0.6  # chance is 1 / 12


def test_flips_and_patches_are_drawn():
    """Rows of one lopsided system."""
    options = dataclasses.replace(SMALL, image_size=66, colour=False)
    heavy, beyond = set(), set()
    for index in range(60):
        pixels = render(SIERPINSKI, options, "train", index)[:, :, 0] > 0
        rows, columns = pixels.sum(axis=1), pixels.sum(axis=0)
        heavy.add((bool(rows[:33].sum() > rows[33:].sum()), bool(columns[:33].sum() > columns[33:].sum())))
        beyond.add(
            (bool(pixels[0].any()), bool(pixels[-1].any()), bool(pixels[:, 0].any()), bool(pixels[:, -1].any()))
        )
    assert len(heavy) == 4
    assert len(beyond) > 8, "patches of many forms reach into the margin, which points leave empty"


@pytest.mark.parametrize("patch", [0b000010000, 0b000000001, 0b100000010, 0b111111111])
def test_a_point_is_drawn_as_its_patch(patch):
    hits = np.zeros((1, 64), dtype=np.int64)
    hits[0, 8 * 3 + 4] = 1
    lit = fractals._paint(hits, hits[0], None, patch).reshape(8, 8, 3)[:, :, 0] > 0
    bits = np.array([patch >> bit & 1 for bit in range(9)]).reshape(3, 3)
    assert np.array_equal(lit[2:5, 3:6], bits == 1) and lit.sum() == bits.sum()


def test_one_image_a_class_is_the_class_itself():
    rows, test = FractalRows(OFDB, "train"), FractalRows(OFDB, "test")
    assert len(rows) == len(test) == 12
    (images, labels), (varied, _) = rows.read(np.arange(12)), test.read(np.arange(12))
    assert np.array_equal(labels, np.arange(12))
    rng = np.random.default_rng(0)
    for label, (image, other) in enumerate(zip(images, varied)):
        game = _covered(*_chaos_game(rows.systems[label], 64 * 512, rng), 62)
        agreement = _overlap(image[1:-1, 1:-1].max(axis=2) > 0, game)
        assert agreement > 0.7, "unvaried, unflipped, in single pixels, up to the sampled bounding box"
        assert not np.array_equal(image, other)


def test_cached_pixels_are_renders_in_grey_too(cache):
    options = FractalOptions(num_classes=3, instances_per_class=1, colour=False)
    splits = fractals.load_fractal_splits(options, cache_dir=cache)
    assert splits.num_rows == {"train": 3, "test": 3}
    for split in splits:
        for index, data in enumerate(_contents(splits[split])):
            image = Image.open(io.BytesIO(data))
            assert image.mode == "L"
            assert np.array_equal(np.asarray(image.convert("RGB")), FractalRows(options, split).read([index])[0][0])


def test_every_option_has_a_cache_of_its_own_that_is_read_again(cache, splits, monkeypatch):
    options = FractalOptions(num_classes=2, instances_per_class=2, image_size=16)
    changes = [{}, {"num_classes": 3}, {"instances_per_class": 3}, {"image_size": 17}, {"colour": False}, {"seed": 1}]
    sets = [
        fractals.load_fractal_splits(dataclasses.replace(options, **change), cache_dir=cache) for change in changes
    ]
    files = [made["train"].cache_files[0]["filename"] for made in (*sets, splits)]
    assert len(set(files)) == len(changes) + 1

    def fail(*args, **kwargs):
        raise AssertionError("the set was generated again")

    monkeypatch.setattr(fractals.FractalsBuilder, "_generate_examples", fail)
    again = fractals.load_fractal_splits(options, cache_dir=cache)
    assert _contents(again["train"]) == _contents(sets[0]["train"])
