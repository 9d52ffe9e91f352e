"""The subset filter: exact, stratified by class, and the same rows whatever order the source has them in."""

import hashlib

import datasets
import numpy as np
import pytest

from vit_hf.data.sets.origin import image_digests
from vit_hf.data.sets.subset import (
    SubsetRule,
    class_quotas,
    draw_samples,
    hold_out,
    resolve_classes,
    select_indices,
    subset_hash,
)
from vit_hf.errors import UserError

NAMES = ["airplane", "bird", "cat", "dog", "ship"]


def _labels(seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).permutation(np.repeat(np.arange(5), [40, 33, 17, 9, 101]))


def _digests(num_rows: int) -> np.ndarray:
    return np.random.RandomState(7).randint(0, 256, (num_rows, 32)).astype(np.uint8)


def _select(labels, digests, rule):
    return select_indices(labels, rule, NAMES, lambda rows: digests[rows])


@pytest.mark.parametrize("fraction", [0.1, 0.29, 1 / 3, 0.5, 0.6667, 0.99, 1.0])
def test_fraction_is_exact_in_total_and_within_one_of_each_class(fraction):
    labels = _labels()
    rows = _select(labels, _digests(len(labels)), SubsetRule(fraction=fraction))
    assert len(rows) == int(fraction * len(labels) + 0.5)
    assert np.all(np.diff(rows) > 0)
    kept, counts = np.bincount(labels[rows], minlength=5), np.bincount(labels)
    assert np.all(np.abs(kept - fraction * counts) < 1)


def test_quotas_round_halves_up_and_share_by_largest_remainder():
    assert class_quotas(np.array([5]), 0.5).tolist() == [3]
    assert class_quotas(np.array([100]), 0.29).tolist() == [29]  # 0.29 * 100 is below 29 in binary
    assert class_quotas(np.array([13, 16, 11]), 0.1).tolist() == [1, 2, 1]
    assert class_quotas(np.array([3, 3, 3, 3]), 0.5).tolist() == [2, 2, 1, 1]


@pytest.mark.parametrize("rule", [SubsetRule(fraction=0.37), SubsetRule(per_class=6), SubsetRule(per_class=3, seed=5)])
def test_the_same_images_are_chosen_from_a_shuffled_source(rule):
    labels = _labels()
    digests = _digests(len(labels))
    digests[10], labels[10] = digests[20], labels[20]  # a duplicate must not upset it
    chosen = _select(labels, digests, rule)
    for seed in range(3):
        order = np.random.RandomState(seed).permutation(len(labels))
        shuffled = _select(labels[order], digests[order], rule)
        assert sorted(digests[order][shuffled].tolist()) == sorted(digests[chosen].tolist())


def test_per_class_keeps_exactly_that_many_and_the_seed_decides_which():
    labels = _labels()
    digests = _digests(len(labels))
    rows = _select(labels, digests, SubsetRule(per_class=9))
    assert np.bincount(labels[rows]).tolist() == [9] * 5
    other = _select(labels, digests, SubsetRule(per_class=9, seed=1))
    assert rows.tolist() == _select(labels, digests, SubsetRule(per_class=9)).tolist() != other.tolist()
    small = _select(labels, digests, SubsetRule(per_class=4))
    assert set(small) < set(rows), "a smaller subset lies inside a larger one of the same seed"


def test_per_class_beyond_a_class_names_it_and_its_count():
    with pytest.raises(UserError, match=r"--subset_per_class 10: class 'dog' has 9 training images"):
        _select(_labels(), _digests(200), SubsetRule(per_class=10))
    kept = _select(_labels(), _digests(200), SubsetRule(per_class=10, classes=["cat", "ship"]))
    assert np.bincount(_labels()[kept]).tolist() == [0, 0, 10, 0, 10]


def test_classes_alone_need_no_hashing_and_keep_every_row():
    def fail(rows):
        raise AssertionError("read every image for a rule that needs no ranking")

    labels = _labels()
    rows = select_indices(labels, SubsetRule(classes=["ship", "0"]), NAMES, fail)
    assert rows.tolist() == [row for row, label in enumerate(labels) if label in (0, 4)]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"fraction": 0.5, "per_class": 3}, "--subset_fraction 0.5 and --subset_per_class 3 exclude each other"),
        ({"fraction": 0.0}, "--subset_fraction 0.0: must be above 0 and at most 1"),
        ({"fraction": 1.5}, "--subset_fraction 1.5: must be above 0 and at most 1"),
        ({"per_class": 0}, "--subset_per_class 0: must be at least 1"),
        ({"classes": []}, "--subset_classes names no class"),
    ],
)
def test_a_rule_out_of_range_is_refused(values, message):
    with pytest.raises(UserError) as error:
        SubsetRule(**values)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_an_empty_rule_says_so_and_a_set_one_describes_itself():
    assert SubsetRule(seed=4).is_empty and SubsetRule(seed=4).describe() == {}
    assert SubsetRule(per_class=3, classes=["cat"]).describe() == {"per_class": 3, "classes": ["cat"], "seed": 0}


def test_classes_resolve_in_the_order_of_the_source_and_names_go_before_indices():
    assert resolve_classes(["ship", "cat", "1", "cat"], NAMES).tolist() == [1, 2, 4]
    assert resolve_classes(["7"], ["9", "8", "7", "6", "5", "4", "3", "2"]).tolist() == [2]
    assert resolve_classes(None, NAMES).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match=r"--subset_classes: 'shp' is not a class \(nearest: ship; or an index 0..4"):
        resolve_classes(["cat", "shp"], NAMES)
    with pytest.raises(UserError, match=r"'5' is not a class \(classes: airplane, bird, cat, dog, ship"):
        resolve_classes(["5"], NAMES)


def test_the_hash_identifies_the_rows_on_every_machine():
    # sha256 of the 24 bytes 0100000000000000 0300000000000000 0500000000000000
    expected = "a5e64abb5dacf3e7febe111383d2f193"
    assert subset_hash(np.array([5, 1, 3], dtype=np.int32)) == subset_hash(np.array([1, 3, 5]))
    assert subset_hash(np.array([1, 3, 5]))[:32] == expected
    assert subset_hash(np.array([1, 3, 6]))[:32] != expected


def test_a_drawn_trial_is_seeded_sorted_and_never_larger_than_the_set():
    drawn = draw_samples(1000, 50, seed=3)
    assert drawn.tolist() == draw_samples(1000, 50, seed=3).tolist() != draw_samples(1000, 50, seed=4).tolist()
    assert len(set(drawn)) == 50 and np.all(np.diff(drawn) > 0) and drawn.max() < 1000
    assert draw_samples(20, 50, seed=0).tolist() == draw_samples(20, None, seed=0).tolist() == list(range(20))
    assert draw_samples(5, 2, seed=0).tolist() == [0, 2], "the draw is part of what a recipe means"


def test_held_out_rows_are_stratified_and_leave_every_class_something():
    labels = np.array([0] * 40 + [1] * 20 + [2])
    kept, held_out = hold_out(labels, 0.1, seed=0)
    assert sorted([*kept, *held_out]) == list(range(61))
    assert np.bincount(labels[held_out], minlength=3).tolist() == [4, 2, 0]
    assert held_out.tolist() == hold_out(labels, 0.1, seed=0)[1].tolist() != hold_out(labels, 0.1, seed=1)[1].tolist()


def test_a_row_of_bytes_and_a_row_of_a_path_have_the_digest_of_the_same_image(tmp_path):
    contents = [b"first", b"second", b"third"]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.png").write_bytes(content)
    images = datasets.Features({"image": datasets.Image(decode=False)})
    by_bytes = datasets.Dataset.from_dict({"image": [{"bytes": c, "path": None} for c in contents]}, features=images)
    by_path = datasets.Dataset.from_dict({"image": [str(tmp_path / f"{n}.png") for n in range(3)]}, features=images)
    cache = str(tmp_path / "cache")
    packed = image_digests(by_bytes, np.arange(3), cache)
    assert packed.shape == (3, 32) and np.array_equal(packed, image_digests(by_path, np.arange(3), cache))
    assert np.array_equal(image_digests(by_path, np.array([2, 0]), cache), packed[[2, 0]])
    (tmp_path / "1.png").unlink()
    with pytest.raises(UserError, match=r"needs every image file: .*1\.png: .*No such file"):
        image_digests(by_path, np.array([1, 2]), cache)


def test_digests_are_read_once_and_follow_a_changed_file(tmp_path, monkeypatch):
    from vit_hf.data.sets import origin

    def saved(contents, folder):
        images = datasets.Features({"image": datasets.Image(decode=False)})
        rows = [{"bytes": content, "path": None} for content in contents]
        datasets.Dataset.from_dict({"image": rows}, features=images).save_to_disk(folder)
        return datasets.load_from_disk(folder)

    source, rows = saved([b"a", b"b"], tmp_path / "set"), np.arange(2)
    first = image_digests(source, rows, str(tmp_path / "cache"))
    assert first[1].tobytes() == hashlib.sha256(b"b").digest()
    changed = saved([b"a", b"c"], tmp_path / "other")
    changed._fingerprint = source._fingerprint
    assert not np.array_equal(image_digests(changed, rows, str(tmp_path / "cache")), first)

    def fail(table):
        raise AssertionError("the images were read again")

    monkeypatch.setattr(origin, "_digest_batch", fail)
    again = image_digests(datasets.load_from_disk(tmp_path / "set"), rows, str(tmp_path / "cache"))
    assert np.array_equal(first, again)
