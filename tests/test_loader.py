"""Which sample comes where, and the way from a dataset to batches."""

import io
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from vit_hf.data import loader
from vit_hf.data.augment import REPLACEMENT, sample_keys, uniform
from vit_hf.data.decode import Preprocessing, open_image, to_pixels
from vit_hf.data.loader import EvalPlaces, ImageBatches, Places, TrainPlaces, device_batches
from vit_hf.errors import UserError

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing((12, 12))


def train_places(world: int = 1, rank: int = 0, micro: int | None = None, **changes) -> TrainPlaces:
    """7 steps of a global batch of 12 over 30 samples, cut as asked for."""
    micro = micro or 12 // world
    options = dict(num_samples=30, seed=3, first_step=0, total_steps=7)
    options |= dict(num_processes=world, rank=rank, micro_batch_size=micro, accumulation=12 // (world * micro))
    return TrainPlaces(**{**options, **changes})


def pairs(places: Places) -> list[tuple[int, int]]:
    return list(zip(places.epoch.tolist(), places.index.tolist()))


def steps_of(all_ranks: list[TrainPlaces]) -> list[list[tuple[int, int]]]:
    """The sorted (epoch, index) of each global step, over all ranks and micro-steps."""
    accumulation, steps = all_ranks[0].accumulation, []
    for number, together in enumerate(zip(*all_ranks, strict=True)):
        if number % accumulation == 0:
            steps.append([])
        for places in together:
            steps[-1] += pairs(places)
    return [sorted(step) for step in steps]


# --- training places ---


@pytest.mark.parametrize("world, micro", [(1, 1), (1, 4), (2, 6), (2, 3), (4, 3), (4, 1)])
def test_a_global_step_holds_the_same_samples_however_it_is_cut(world, micro):
    expected = steps_of([train_places()])
    assert [len(step) for step in expected] == [12] * 7
    assert steps_of([train_places(world, rank, micro) for rank in range(world)]) == expected


def test_the_order_over_all_ranks_is_the_stream():
    """Micro-step by micro-step, rank 0 first: so that accumulation 1x8 = 8x1 = 2 processes x 4 in mean and order."""
    stream = [pair for places in train_places() for pair in pairs(places)]
    ranks = [train_places(2, rank, 3) for rank in range(2)]
    assert [pair for both in zip(*ranks) for places in both for pair in pairs(places)] == stream


def test_each_sample_comes_exactly_once_an_epoch():
    seen = Counter(pair for step in steps_of([train_places(total_steps=10)]) for pair in step)  # 4 whole epochs
    assert seen == Counter((epoch, index) for epoch in range(4) for index in range(30))


def test_epochs_differ_in_order_and_a_batch_may_hold_the_border_of_two():
    stream = [pair for places in train_places() for pair in pairs(places)]
    assert [epoch for epoch, _ in stream] == [0] * 30 + [1] * 30 + [2] * 24
    assert [index for _, index in stream[:30]] != [index for _, index in stream[30:60]]
    other_seed = [pair for places in train_places(seed=4) for pair in pairs(places)]
    assert other_seed != stream


@pytest.mark.parametrize("first_step", [1, 3, 6, 7])
def test_a_start_at_a_step_equals_skipping_the_steps_before(first_step):
    whole, rest = train_places(2, 1, 3), train_places(2, 1, 3, first_step=first_step)
    assert [pairs(p) for p in rest] == [pairs(p) for p in whole][first_step * 2 :]
    assert len(rest) == (7 - first_step) * 2


def test_a_batch_larger_than_the_set_spans_epochs():
    (places,) = train_places(num_samples=5, total_steps=1)
    assert Counter(epoch for epoch, _ in pairs(places)) == {0: 5, 1: 5, 2: 2}
    assert all(len({i for e, i in pairs(places) if e == epoch}) == 5 for epoch in (0, 1))


# --- evaluation places ---


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
@pytest.mark.parametrize("num_samples", [1, 2, 7, 8, 29])
def test_each_evaluation_sample_is_valid_exactly_once(num_samples, world, batch_size):
    ranks = [
        list(EvalPlaces(num_samples=num_samples, num_processes=world, rank=rank, batch_size=batch_size))
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1  # ZeRO-3 gathers weights in each forward pass
    assert {len(places.index) for batches in ranks for places in batches} == {len(ranks[0][0].index)}
    places = [p for batches in ranks for p in batches]
    valid = np.concatenate([p.index[p.valid] for p in places])
    assert sorted(valid) == list(range(num_samples))
    assert all(0 <= index < num_samples for p in places for index in p.index)  # fillers can be read too
    assert len(ranks[0]) == len(
        EvalPlaces(num_samples=num_samples, num_processes=world, rank=0, batch_size=batch_size)
    )
    assert len(ranks[0]) * len(ranks[0][0].index) * world < num_samples + world * batch_size  # no batch of fillers


# --- batches ---


def png(seed: int, width: int = 20, height: int = 16) -> bytes:
    levels = np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    return buffer.getvalue()


def image_set(num: int = 10, bad: dict[int, bytes] | None = None) -> datasets.Dataset:
    """Images of different sizes; `bad` puts other bytes in place of some."""
    content = [png(i, 14 + i, 20 - i % 5) for i in range(num)]
    for row, data in (bad or {}).items():
        content[row] = data
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    columns = {
        "image": [{"bytes": data, "path": f"images/{row}.png"} for row, data in enumerate(content)],
        "label": [row % 3 for row in range(num)],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def places_of(*index: int, epoch: int = 2) -> Places:
    index = np.array(index, dtype=np.int64)
    return Places(np.full_like(index, epoch), index, np.ones(len(index), dtype=bool))


@pytest.mark.parametrize("preprocessing", [PREPROCESSING, Preprocessing((10, 8), shortest_edge=12)])
@pytest.mark.parametrize("in_memory", [True, False])
def test_pixels_and_labels_are_those_of_the_rows(preprocessing, in_memory):
    rows = image_set()
    batch = ImageBatches(rows, preprocessing, keep_in_memory=in_memory)[places_of(7, 0, 7, 3)]
    for place, row in enumerate((7, 0, 7, 3)):
        expected = to_pixels(open_image(rows[row]["image"]), preprocessing)
        assert np.array_equal(batch["pixel_values"][place].numpy(), expected)
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["labels"].tolist() == [1, 0, 1, 0] and batch["index"].tolist() == [7, 0, 7, 3]
    assert batch["epoch"].tolist() == [2] * 4 and batch["valid"].all() and batch["bad"] == {}


def test_a_set_is_kept_in_memory_when_its_pixels_fit(monkeypatch):
    pixels = 10 * 12 * 12 * 3
    monkeypatch.setattr(loader, "CACHE_BYTES", pixels)
    assert ImageBatches(image_set(), PREPROCESSING).crops_on_device
    monkeypatch.setattr(loader, "CACHE_BYTES", pixels - 1)
    batches = ImageBatches(image_set(), PREPROCESSING, crop_scale=0.3)
    assert not batches.crops_on_device and batches.crop_scale == 0.3


def test_class_index_renumbers_labels():
    batch = ImageBatches(image_set(), PREPROCESSING, class_index=[5, 9, 1])[places_of(0, 1, 2, 3)]
    assert batch["labels"].tolist() == [5, 9, 1, 5]


def test_crop_while_decoding_depends_on_seed_epoch_and_index_alone():
    batches = ImageBatches(image_set(), PREPROCESSING, seed=1, crop_scale=0.2, keep_in_memory=False)
    together = batches[places_of(4, 5, 6)]["pixel_values"]
    for place, row in enumerate((4, 5, 6)):
        assert torch.equal(batches[places_of(row)]["pixel_values"][0], together[place])
    assert not torch.equal(batches[places_of(4, 5, 6, epoch=3)]["pixel_values"], together)
    other = ImageBatches(image_set(), PREPROCESSING, seed=2, crop_scale=0.2, keep_in_memory=False)
    assert not torch.equal(other[places_of(4, 5, 6)]["pixel_values"], together)
    whole = ImageBatches(image_set(), PREPROCESSING, keep_in_memory=False)
    assert not torch.equal(whole[places_of(4, 5, 6)]["pixel_values"], together)


def moved(batches, places, workers=0, bad=None):
    return list(device_batches(batches, places, CPU, workers, {} if bad is None else bad))


def test_workers_give_the_same_batches_in_the_same_order():
    """Decoded row by row, with crops; and the tensors are as the loop wants them."""
    batches = ImageBatches(image_set(30), PREPROCESSING, seed=3, crop_scale=0.2, keep_in_memory=False)
    alone, shared = (moved(batches, train_places(2, 1, 3, total_steps=3), workers) for workers in (0, 2))
    assert len(alone) == len(shared) == 6
    for first, second, places in zip(alone, shared, train_places(2, 1, 3, total_steps=3)):
        assert first.keys() == second.keys() == {"pixel_values", "labels", "epoch", "index", "valid"}
        for name in first:
            assert torch.equal(first[name], second[name]), name
        assert first["pixel_values"].shape == (3, 3, 12, 12)
        assert first["index"].tolist() == places.index.tolist() and first["epoch"].tolist() == places.epoch.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_default_generator_is_left_alone(workers):
    """Dropout draws from it; a loader that did too would change a run with the number of workers."""
    torch.manual_seed(11)
    before = torch.get_rng_state()
    batches = ImageBatches(image_set(30), PREPROCESSING, crop_scale=0.2, keep_in_memory=False, training=True)
    moved(batches, train_places(1, 0, 12, total_steps=2), workers)
    assert torch.equal(torch.get_rng_state(), before)


# --- images that do not decode ---

BAD = {4: b"no image", 7: png(7)[:200]}


@pytest.mark.parametrize("in_memory", [True, False])
def test_bad_image_is_an_error_with_row_and_file(in_memory):
    with pytest.raises(UserError) as caught:
        batches = ImageBatches(image_set(bad=BAD), PREPROCESSING, keep_in_memory=in_memory)
        moved(batches, EvalPlaces(num_samples=10, num_processes=1, rank=0, batch_size=10))
    message = str(caught.value)
    assert "row 4 " in message and "images/4.png" in message and "1 more" in message and "--on_bad_image" in message
    assert "\n" not in message


def test_bad_image_in_a_worker_is_the_same_error():
    batches = ImageBatches(image_set(bad=BAD), PREPROCESSING, keep_in_memory=False)
    with pytest.raises(UserError, match="row 4 .*images/4.png"):
        moved(batches, EvalPlaces(num_samples=10, num_processes=1, rank=0, batch_size=5), workers=1)


@pytest.mark.parametrize("in_memory", [True, False])
def test_skipped_training_rows_are_replaced_by_rows_chosen_from_their_key(in_memory):
    batches = ImageBatches(
        image_set(bad=BAD), PREPROCESSING, seed=5, on_bad_image="skip", training=True, keep_in_memory=in_memory
    )
    good = ImageBatches(image_set(), PREPROCESSING, keep_in_memory=True)
    bad: dict[int, str] = {}
    replacements = set()
    for epoch in range(12):
        places = Places(np.full(10, epoch), np.arange(10), np.ones(10, dtype=bool))
        batch = batches[places]
        assert batch["valid"].all() and batch["index"].tolist() == list(range(10))
        bad.update(batch["bad"])
        for row in range(10):
            source, attempt = row, 0
            key = sample_keys(5, np.array([epoch]), np.array([row]))
            while source in BAD:
                source, attempt = int(uniform(key, REPLACEMENT + attempt)[0] * 10), attempt + 1
            assert torch.equal(batch["pixel_values"][row], good[places_of(source)]["pixel_values"][0])
            assert batch["labels"][row] == source % 3
            replacements |= {source} if row in BAD else set()
    assert len(replacements) > 3  # not always the same row
    assert set(bad) == {4, 7} and "images/4.png" in bad[4]


@pytest.mark.parametrize("in_memory", [True, False])
def test_skipped_evaluation_rows_do_not_count(in_memory):
    batches = ImageBatches(image_set(bad=BAD), PREPROCESSING, on_bad_image="skip", keep_in_memory=in_memory)
    bad: dict[int, str] = {}
    found = moved(batches, EvalPlaces(num_samples=10, num_processes=1, rank=0, batch_size=4), bad=bad)
    valid = [index for batch in found for index in batch["index"][batch["valid"]].tolist()]
    assert valid == [0, 1, 2, 3, 5, 6, 8, 9]
    assert set(bad) == {4, 7}


def test_a_set_without_any_good_image_ends_instead_of_looping():
    batches = ImageBatches(
        image_set(3, {0: b"", 1: b"", 2: b""}), PREPROCESSING, on_bad_image="skip", training=True, keep_in_memory=False
    )
    assert not batches[places_of(0, 1)]["valid"].any()
