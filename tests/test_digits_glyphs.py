"""The sets that are generated locally: what they hold, that they never change, and that processes can share them."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vit_hf.data.sets import digits, glyphs


@pytest.fixture(scope="module")
def digits_splits(tmp_path_factory):
    return digits.load_digits_splits(cache_dir=str(tmp_path_factory.mktemp("digits")))


@pytest.fixture(scope="module")
def glyphs_cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("glyphs"))


@pytest.fixture(scope="module")
def glyphs_splits(glyphs_cache):
    return glyphs.load_glyphs_splits(train_per_class=18, cache_dir=glyphs_cache)


def _contents(split):
    return split.with_format("arrow")[:]["image"].to_pylist()


def test_digits_are_the_real_ones_scaled_to_bytes(digits_splits):
    from sklearn.datasets import load_digits

    source = load_digits()
    assert digits_splits.num_rows == {"train": 1347, "test": 450}
    shown = {np.asarray(row["image"]).tobytes() for split in digits_splits.values() for row in split}
    assert shown == {np.rint(image * 255 / 16).astype(np.uint8).tobytes() for image in source.images}
    first = digits_splits["test"][0]
    assert first["image"].format == "PNG" and first["image"].size == (8, 8) and first["image"].mode == "L"
    match = [np.array_equal(np.rint(image * 255 / 16), np.asarray(first["image"])) for image in source.images]
    assert source.target[match.index(True)] == first["label"]
    assert digits_splits["train"].features["label"].names == list("0123456789")


def test_digits_split_is_stratified_and_disjoint(digits_splits):
    train = np.bincount(digits_splits["train"]["label"])
    test = np.bincount(digits_splits["test"]["label"])
    assert np.all(np.abs(test - 0.25 * (train + test)) < 1)
    train_bytes, test_bytes = ({image["bytes"] for image in _contents(split)} for split in digits_splits.values())
    assert not train_bytes & test_bytes


def test_a_second_call_only_reads_the_cache(digits_splits, tmp_path, monkeypatch):
    first = digits.load_digits_splits(cache_dir=str(tmp_path))

    def fail(*args, **kwargs):
        raise AssertionError("the set was generated again")

    monkeypatch.setattr(digits.DigitsBuilder, "_generate_examples", fail)
    second = digits.load_digits_splits(cache_dir=str(tmp_path))
    assert _contents(first["train"]) == _contents(second["train"]) == _contents(digits_splits["train"])


@pytest.mark.slow
def test_two_processes_may_generate_the_digits_at_once(digits_splits, tmp_path):
    code = (
        "import sys; from vit_hf.data.sets.digits import load_digits_splits; sys.stdin.readline()\n"
        f"splits = load_digits_splits(cache_dir={str(tmp_path)!r})\n"
        "print(len(splits['train']), len(splits['test']), splits['train'][1346]['label'])"
    )
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    processes = [subprocess.Popen(command, cwd=root, **pipes) for _ in range(2)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert output.split() == ["1347", "450", str(digits_splits["train"][1346]["label"])]


def test_glyphs_have_every_class_equally_often_and_no_digit(glyphs_splits):
    names = glyphs_splits["train"].features["label"].names
    assert len(names) == len(set(names)) >= 60
    assert not any(name.isdigit() for name in names)
    assert np.all(np.bincount(glyphs_splits["train"]["label"]) == 18)
    assert np.all(np.bincount(glyphs_splits["test"]["label"]) == 2)  # a tenth of all


def test_glyphs_are_white_on_black_and_never_blank(glyphs_splits):
    means = []
    for split in glyphs_splits.values():
        for image in _contents(split):
            pixels = np.asarray(Image.open(io.BytesIO(image["bytes"])))
            assert pixels.shape == (32, 32) and pixels.dtype == np.uint8
            assert pixels.max() > 60 and pixels.min() < 60
            means.append(pixels.mean())
    assert min(means) > 3 and max(means) < 160 and 30 < np.mean(means) < 80, "light strokes on a dark ground"


def test_a_glyph_is_a_function_of_seed_split_and_index(glyphs_splits):
    np.random.seed(1)  # a global generator must not matter
    row = 5 * len(glyphs.CLASS_NAMES) + 7
    again = glyphs.glyph_example(0, "train", row)
    assert again["image"]["bytes"] == _contents(glyphs_splits["train"])[row]["bytes"]
    assert again["label"] == glyphs_splits["train"][row]["label"] == 7
    others = [glyphs.glyph_example(1, "train", row), glyphs.glyph_example(0, "test", row)]
    assert all(other["image"]["bytes"] != again["image"]["bytes"] for other in others)
    assert not {i["bytes"] for i in _contents(glyphs_splits["train"])} & {
        i["bytes"] for i in _contents(glyphs_splits["test"])
    }


def test_seed_and_size_of_the_glyph_set_have_caches_of_their_own(glyphs_splits, glyphs_cache):
    other = glyphs.load_glyphs_splits(seed=3, train_per_class=2, cache_dir=glyphs_cache)
    assert other["train"].num_rows == 2 * len(glyphs.CLASS_NAMES)
    assert other["train"].cache_files != glyphs_splits["train"].cache_files
    same_size = glyphs.load_glyphs_splits(seed=0, train_per_class=2, cache_dir=glyphs_cache)
    assert _contents(same_size["train"]) == _contents(glyphs_splits["train"])[: same_size["train"].num_rows]
    assert _contents(same_size["train"]) != _contents(other["train"])


def test_fonts_really_draw_their_characters():
    """Every class can be drawn by at least 16 fonts, and no font draws its box for a missing character."""
    for character in glyphs.CLASS_NAMES:
        paths = glyphs.fonts_with(character)
        assert len(paths) >= 16
        for path in paths:
            font = glyphs.ImageFont.truetype(path, 32)
            missing = font.getmask("\U000f1234")
            drawn = font.getmask(character)
            assert drawn.getbbox() is not None
            assert (drawn.size, bytes(drawn)) != (missing.size, bytes(missing)), (character, path)
    assert not any(
        "cmex" in path or "STIXSiz" in path for name in glyphs.CLASS_NAMES for path in glyphs.fonts_with(name)
    )
