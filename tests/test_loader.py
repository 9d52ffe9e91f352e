"""Which sample comes where, and the way from a dataset to batches."""

import errno
import io
import signal
import threading
import time
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tests.runs import python
from vit_hf.arguments import RandomCrop
from vit_hf.data.batches import ImageBatches
from vit_hf.data.cache import decoded
from vit_hf.data.decode import crop_to_pixels, open_image, to_pixels
from vit_hf.data.device import DeviceBatches
from vit_hf.data.faults import Faults
from vit_hf.data.feed import LoadingSettings, open_batches, train_batches
from vit_hf.data.order import BatchIndices, EvalOrder, StepPlan, TrainOrder, balanced_order
from vit_hf.data.preprocessing import Preprocessing, PreprocessingSettings, choose_preprocessing
from vit_hf.data.processes import Processes
from vit_hf.data.randomness import REPLACEMENT, sample_keys, uniform
from vit_hf.data.rows import retries, table
from vit_hf.data.rows.table import TableRows
from vit_hf.errors import UserError

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing((12, 12))


def train_places(world: int = 1, rank: int = 0, micro: int | None = None, **changes) -> TrainOrder:
    """7 steps of a global batch of 12 over 30 samples, cut as asked for."""
    micro = micro or 12 // world
    options = dict(seed=3, first_step=0, total_steps=7, num_processes=world, rank=rank)
    options |= dict(micro_batch_size=micro, accumulation=12 // (world * micro))
    plan = StepPlan(**{name: changes.pop(name, value) for name, value in options.items()})
    return TrainOrder(plan, **{"num_samples": 30, **changes})


def pairs(places: BatchIndices) -> list[tuple[int, int]]:
    return list(zip(places.visit.tolist(), places.index.tolist()))


def steps_of(all_ranks: list[TrainOrder]) -> list[list[tuple[int, int]]]:
    """The sorted (epoch, index) of each global step, over all ranks and micro-steps."""
    accumulation, steps = all_ranks[0].plan.accumulation, []
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


@pytest.mark.parametrize("world, micro", [(1, 12), (2, 3), (4, 3)])
def test_repeated_samples_come_in_a_row_each_time_with_another_key(world, micro):
    ranks = [train_places(world, rank, micro, repeats=3, total_steps=10) for rank in range(world)]
    stream = [pair for together in zip(*ranks) for places in together for pair in pairs(places)]
    plain = [pair for places in train_places(total_steps=10) for pair in pairs(places)]
    assert [index for _, index in stream] == [index for _, index in plain for _ in range(3)][:120]
    assert [visit for visit, _ in stream[:90]] == [0, 1, 2] * 30  # an epoch of the samples, in three of the schedule
    assert len(set(stream)) == 120


LABELS = np.random.RandomState(0).permutation(np.repeat([0, 1, 3], [24, 5, 1]))  # 30 samples, none of class 2


def balanced(world: int = 1, micro: int | None = None, **changes) -> list[tuple[int, int]]:
    """The (visit, index) of all steps in the order of the stream."""
    ranks = [train_places(world, rank, micro, labels=LABELS, **changes) for rank in range(world)]
    return [pair for together in zip(*ranks) for places in together for pair in pairs(places)]


def test_balanced_epochs_keep_their_length_and_draw_all_classes_equally_often():
    stream = balanced(total_steps=100)
    visits, rows = np.zeros(30, dtype=int), np.array([index for _, index in stream])
    for epoch in range(40):
        counts = np.bincount(LABELS[rows[30 * epoch : 30 * epoch + 30]], minlength=4)
        assert counts.tolist() == [10, 10, 0, 10]
        assert len(set(LABELS[rows[30 * epoch : 30 * epoch + 10]])) > 1  # mixed
        for row in rows[30 * epoch : 30 * epoch + 30]:
            visits[row] += 1
        assert all(np.ptp(visits[LABELS == label]) <= 1 for label in (0, 1, 3))
    assert [visits[LABELS == label].tolist() for label in (1, 3)] == [[80] * 5, [400]]
    assert sorted(stream) == sorted((visit, row) for row in range(30) for visit in range(visits[row]))  # a key each


def test_shares_that_do_not_divide_differ_by_one_and_in_turn():
    labels = np.repeat([0, 1, 2], [25, 4, 2])  # 31 places an epoch
    counts = [np.bincount(labels[balanced_order(3, epoch, labels)[1]]).tolist() for epoch in range(6)]
    assert counts == [[11, 10, 10], [10, 11, 10], [10, 10, 11]] * 2
    visit, index = balanced_order(3, 2, labels)
    assert np.array_equal(index, balanced_order(3, 2, labels)[1]) and visit[labels[index] == 2].min() == 10
    assert not np.array_equal(index, balanced_order(4, 2, labels)[1])
    even = np.arange(12) % 3  # nothing to balance: each sample once an epoch
    visit, index = balanced_order(3, 5, even)
    assert sorted(index) == list(range(12)) and set(visit) == {5}


@pytest.mark.parametrize("world, micro", [(1, 4), (2, 6), (4, 3), (4, 1)])
def test_a_balanced_global_step_holds_the_same_samples_however_it_is_cut(world, micro):
    ranks = [train_places(world, rank, micro, labels=LABELS) for rank in range(world)]
    assert steps_of(ranks) == steps_of([train_places(labels=LABELS)])


@pytest.mark.parametrize("first_step", [1, 3, 6])
def test_a_balanced_start_at_a_step_equals_skipping_the_steps_before(first_step):
    assert balanced(first_step=first_step) == balanced()[12 * first_step :]


def test_repeated_samples_of_a_balanced_epoch_have_a_key_each():
    stream = balanced(repeats=3, total_steps=20)
    assert len(set(stream)) == 240
    assert [index for _, index in stream] == [index for _, index in balanced(total_steps=20) for _ in range(3)][:240]


def test_the_flag_balances_what_a_run_is_handed():
    rows = TableRows(image_set(12).remove_columns("label").add_column("label", [0] * 9 + [1] * 2 + [2]))
    plan = StepPlan(3, 0, 4, 1, 0, 6, 1)
    for flag, counts in ((False, [18, 4, 2]), (True, [8, 8, 8])):
        settings = LoadingSettings(dataloader_num_workers=0, class_balanced=flag)
        batches, _ = train_batches(rows, PREPROCESSING, plan, Processes(CPU), settings, Faults())
        labels = torch.cat([batch["labels"] for batch in batches])
        assert torch.bincount(labels).tolist() == counts


# --- evaluation places ---


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
@pytest.mark.parametrize("num_samples", [1, 2, 7, 8, 29])
@pytest.mark.parametrize("workers", [0, 3])
def test_each_evaluation_sample_is_valid_exactly_once(num_samples, world, batch_size, workers):
    options = dict(num_samples=num_samples, num_processes=world, batch_size=batch_size, num_workers=workers)
    ranks = [list(EvalOrder(rank=rank, **options)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1  # ZeRO-3 gathers weights in each forward pass
    assert {len(places.index) for batches in ranks for places in batches} == {len(ranks[0][0].index)}
    places = [p for batches in ranks for p in batches]
    valid = np.concatenate([p.index[p.valid] for p in places])
    assert sorted(valid) == list(range(num_samples))
    assert all(0 <= index < num_samples for p in places for index in p.index)  # fillers can be read too
    assert len(ranks[0]) == len(EvalOrder(num_samples=num_samples, num_processes=world, rank=0, batch_size=batch_size))
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


def places_of(*index: int, visit: int = 2) -> BatchIndices:
    index = np.array(index, dtype=np.int64)
    return BatchIndices(np.full_like(index, visit), index, np.ones(len(index), dtype=bool))


@pytest.fixture
def batches_of(tmp_path):
    """Batches over a dataset, decoded once or each time."""

    def make(dataset, preprocessing=PREPROCESSING, once=False, class_index=None, **options):
        rows = TableRows(dataset)
        if class_index is not None:
            rows.renumber(class_index)
        kept = decoded(rows, preprocessing, tmp_path) if once else None
        return ImageBatches(rows, preprocessing, kept, **options)

    return make


@pytest.mark.parametrize("preprocessing", [PREPROCESSING, Preprocessing((10, 8), shortest_edge=12)])
@pytest.mark.parametrize("once", [True, False])
def test_pixels_and_labels_are_those_of_the_rows(preprocessing, once, batches_of):
    rows = image_set()
    batch = batches_of(rows, preprocessing, once)[places_of(7, 0, 7, 3)]
    for place, row in enumerate((7, 0, 7, 3)):
        expected = to_pixels(open_image(rows[row]["image"]), preprocessing)
        assert np.array_equal(batch["pixel_values"][place].numpy(), expected)
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["labels"].tolist() == [1, 0, 1, 0] and batch["index"].tolist() == [7, 0, 7, 3]
    assert batch["visit"].tolist() == [2] * 4 and batch["valid"].all()
    assert batch["bad"] == {} and batch["error"] is None and batch["retried"] == []


def test_class_index_renumbers_labels(batches_of):
    batch = batches_of(image_set(), class_index=[5, 9, 1])[places_of(0, 1, 2, 3)]
    assert batch["labels"].tolist() == [5, 9, 1, 5]


CROPS = [RandomCrop("scale", 0.2), RandomCrop("scale", 0.2, "tensorflow"), RandomCrop("simple", 4)]


@pytest.mark.parametrize("crop", CROPS)
def test_crop_while_decoding_depends_on_seed_epoch_and_index_alone(crop, batches_of):
    batches = batches_of(image_set(), seed=1, crop=crop)
    together = batches[places_of(4, 5, 6)]["pixel_values"]
    for place, row in enumerate((4, 5, 6)):
        assert torch.equal(batches[places_of(row)]["pixel_values"][0], together[place])
    assert not torch.equal(batches[places_of(4, 5, 6, visit=3)]["pixel_values"], together)
    other = batches_of(image_set(), seed=2, crop=crop)
    assert not torch.equal(other[places_of(4, 5, 6)]["pixel_values"], together)
    whole = batches_of(image_set())
    assert not torch.equal(whole[places_of(4, 5, 6)]["pixel_values"], together)


def moved(batches, places, workers=0, faults=None):
    return list(DeviceBatches(batches, places, CPU, workers, faults or Faults()))


@pytest.mark.parametrize("crop", CROPS[1:])
def test_workers_give_the_same_batches_in_the_same_order(crop, batches_of):
    """Decoded row by row, with crops; and the tensors are as the loop wants them."""
    batches = batches_of(image_set(30), seed=3, crop=crop)
    alone, shared = (moved(batches, train_places(2, 1, 3, total_steps=3), workers) for workers in (0, 2))
    assert len(alone) == len(shared) == 6
    for first, second, places in zip(alone, shared, train_places(2, 1, 3, total_steps=3)):
        assert first.keys() == second.keys() == {"pixel_values", "labels", "visit", "index", "valid"}
        for name in first:
            assert torch.equal(first[name], second[name]), name
        assert first["pixel_values"].shape == (3, 3, 12, 12)
        assert first["index"].tolist() == places.index.tolist() and first["visit"].tolist() == places.visit.tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_default_generator_is_left_alone(workers, batches_of):
    """Dropout draws from it; a loader that did too would change a run with the number of workers."""
    torch.manual_seed(11)
    before = torch.get_rng_state()
    batches = batches_of(image_set(30), crop=RandomCrop("scale", 0.2), training=True)
    moved(batches, train_places(1, 0, 12, total_steps=2), workers)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers, ahead", [(0, 0), (0, 2), (2, 0), (2, 2)])
def test_batches_can_be_gone_through_again_and_left_in_the_middle(workers, ahead, batches_of):
    """As evaluation does, each time from the start; and no thread is left behind."""
    places = EvalOrder(num_samples=30, num_processes=1, rank=0, batch_size=4)
    loader = DeviceBatches(batches_of(image_set(30)), places, CPU, workers, Faults(), ahead)
    whole = [batch["index"].tolist() for batch in loader]
    before = set(threading.enumerate())
    for batch in loader:
        assert batch["index"].tolist() == whole[0]
        break
    assert [batch["index"].tolist() for batch in loader] == whole
    assert set(threading.enumerate()) <= before


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    """kill -9 leaves no process that goes on decoding."""
    code = """
import numpy as np, os, signal, sys, torch
from tests.test_loader import *
rows = TableRows(image_set(30))
places = train_places(total_steps=10_000)
loader = DeviceBatches(ImageBatches(rows, PREPROCESSING), places, CPU, 2, Faults())
batches = iter(loader)
next(batches)
workers = [process.pid for process in loader.loader._iterator._workers]
print(*workers, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = python("-c", code, env={"HF_HOME": str(tmp_path)})
    workers = [int(word) for word in done.stdout.split()]
    assert done.returncode == -signal.SIGKILL and len(workers) == 2
    deadline = time.monotonic() + 30
    while any(is_running(worker) for worker in workers) and time.monotonic() < deadline:
        pass
    assert not any(is_running(worker) for worker in workers)


def is_running(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- images that do not decode ---

BAD = {4: b"no image", 7: png(7)[:200]}


def test_what_is_worked_on_ahead_is_the_same_and_fails_the_same(batches_of):
    """The thread of a GPU's loader, here without a GPU; none is left behind."""
    before = set(threading.enumerate())  # other tests may have left some
    places = train_places(total_steps=3)
    plain = moved(batches_of(image_set(30)), places)
    ahead = list(DeviceBatches(batches_of(image_set(30)), places, CPU, 0, Faults(), ahead=2))
    for one, other in zip(plain, ahead, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    broken = batches_of(image_set(30))
    broken.rows.read = None  # not a user's mistake
    for batches, error in ((batches_of(image_set(30, BAD)), UserError), (broken, TypeError)):
        with pytest.raises(error):
            list(DeviceBatches(batches, places, CPU, 0, Faults(), ahead=2))
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("once", [True, False])
def test_bad_image_is_an_error_with_row_and_file(once, batches_of):
    with pytest.raises(UserError) as caught:
        batches = batches_of(image_set(bad=BAD), once=once)
        moved(batches, EvalOrder(num_samples=10, num_processes=1, rank=0, batch_size=10))
    message = str(caught.value)
    assert "row 4 " in message and "images/4.png" in message and "1 more" in message and "--on_bad_image" in message
    assert "\n" not in message


def test_bad_image_in_a_worker_is_the_same_error(batches_of):
    with pytest.raises(UserError, match="row 4 .*images/4.png"):
        places = EvalOrder(num_samples=10, num_processes=1, rank=0, batch_size=5)
        moved(batches_of(image_set(bad=BAD)), places, workers=1)


@pytest.mark.parametrize("once", [True, False])
def test_skipped_training_rows_are_replaced_by_rows_chosen_from_their_key(once, batches_of):
    """And all other places stay as they are."""
    batches = batches_of(image_set(bad=BAD), once=once, seed=5, on_bad_image="skip", training=True)
    good = batches_of(image_set(), once=True)
    bad: dict[int, str] = {}
    replacements = set()
    for visit in range(12):
        places = BatchIndices(np.full(10, visit), np.arange(10), np.ones(10, dtype=bool))
        batch = batches[places]
        assert batch["valid"].all() and batch["index"].tolist() == list(range(10)) and batch["error"] is None
        bad.update(batch["bad"])
        for row in range(10):
            source, attempt = row, 0
            key = sample_keys(5, np.array([visit]), np.array([row]))
            while source in BAD:
                source, attempt = int(uniform(key, REPLACEMENT + attempt)[0] * 10), attempt + 1
            assert torch.equal(batch["pixel_values"][row], good[places_of(source)]["pixel_values"][0])
            assert batch["labels"][row] == source % 3
            replacements |= {source} if row in BAD else set()
    assert len(replacements) > 3  # not always the same row
    assert set(bad) == {4, 7} and "images/4.png" in bad[4]


@pytest.mark.parametrize("once", [True, False])
def test_skipped_evaluation_rows_do_not_count(once, batches_of):
    batches = batches_of(image_set(bad=BAD), once=once, on_bad_image="skip")
    faults = Faults()
    places = EvalOrder(num_samples=10, num_processes=1, rank=0, batch_size=4)
    found = moved(batches, places, faults=faults)
    valid = [index for batch in found for index in batch["index"][batch["valid"]].tolist()]
    assert valid == [0, 1, 2, 3, 5, 6, 8, 9]
    assert set(faults.bad) == {4, 7}


@pytest.mark.parametrize("once", [True, False])
def test_a_set_without_any_good_image_ends_instead_of_looping(once, batches_of):
    bad = {0: b"", 1: b"", 2: b""}
    batches = batches_of(image_set(3, bad), once=once, on_bad_image="skip", training=True)
    with pytest.raises(UserError, match="does not decode.*no row that does was found"):
        moved(batches, train_places(num_samples=3, total_steps=1))


def test_a_decompression_bomb_is_a_bad_image(batches_of):
    """A few bytes that claim 400 million pixels: refused before any of them is made."""
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    with pytest.raises(UserError, match="row 2 .*DecompressionBomb"):
        moved(batches_of(image_set(4, {2: buffer.getvalue()})), train_places(num_samples=4, total_steps=1))


# --- reads that fail ---


def test_a_file_that_is_gone_is_a_bad_image_and_named(batches_of):
    rows = image_set(4).to_list()
    rows[1]["image"] = {"bytes": None, "path": "/nowhere/one.png"}
    gone = datasets.Dataset.from_list(rows, features=image_set(1).features)
    with pytest.raises(UserError, match="row 1 .*/nowhere/one.png"):
        moved(batches_of(gone), train_places(num_samples=4, total_steps=1))


def test_a_read_that_fails_is_tried_again_with_back_off(monkeypatch, batches_of, tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    rows = image_set(4).to_list()
    rows[1]["image"] = {"bytes": None, "path": str(tmp_path / "a.png")}
    dataset = datasets.Dataset.from_list(rows, features=image_set(1).features)
    waits, failures = [], [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle")]
    read = table.file_bytes

    def stumbling(path):
        if failures:
            raise failures.pop(0)
        return read(path)

    monkeypatch.setattr(table, "file_bytes", stumbling)
    monkeypatch.setattr(retries.time, "sleep", waits.append)
    faults = Faults()
    (batch,) = moved(batches_of(dataset), train_places(num_samples=4, total_steps=1), faults=faults)
    assert batch["valid"].all() and waits == [0.5, 2.0]
    assert len(faults.retried) == 2 and "a.png" in faults.retried[0] and "Input/output error" in faults.retried[0]


# --- workers that die, devices without a number ---


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 2])
def test_a_killed_worker_is_one_line(batches_of, ahead):
    """At once, also where a thread takes the batches, as on a GPU."""
    loader = DeviceBatches(batches_of(image_set(30)), train_places(total_steps=10_000), CPU, 1, Faults(), ahead)
    with pytest.raises(UserError, match="worker process that decodes images was killed.*--dataloader_num_workers"):
        for number, _ in enumerate(loader):
            if number == 0:
                loader.loader._iterator._workers[0].kill()
    loader.close()


def test_close_ends_the_workers(batches_of):
    loader = DeviceBatches(batches_of(image_set(30)), train_places(total_steps=10_000), CPU, 2, Faults())
    next(iter(loader))
    workers = loader.loader._iterator._workers
    loader.close()
    assert not any(worker.is_alive() for worker in workers)


def test_a_gpu_without_a_number_is_the_present_one(monkeypatch, batches_of):
    """accelerate gives a single process `cuda`, which a thread cannot be set to."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    places = train_places(total_steps=1)
    loader = DeviceBatches(batches_of(image_set()), places, torch.device("cuda"), 0, Faults())
    assert loader.device == loader.stream == torch.device("cuda", 3)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_crops_that_are_cut_while_decoding_take_the_interpolation(interpolation):
    """Each sample's by its key."""
    rows = image_set(30)
    how = choose_preprocessing((12, 12), None, list, PreprocessingSettings(interpolation=interpolation))
    batches = ImageBatches(TableRows(rows), how, seed=3, crop=RandomCrop("scale", 0.3), training=True)
    index = np.arange(30)
    batch = batches[BatchIndices(np.full(30, 2), index, np.ones(30, dtype=bool))]
    keys = sample_keys(3, np.full(30, 2), index)
    sharp, soft = how.bicubic_crops(keys), 0
    for place, row in enumerate(TableRows(rows).read(index)[0]):
        one, other = (
            crop_to_pixels(row, batches._cut_of(keys[place : place + 1])["box_of"], how, kind)
            for kind in (sharp[place], not sharp[place])
        )
        assert np.array_equal(batch["pixel_values"][place].numpy(), one)
        soft += not np.array_equal(one, other)
    assert soft > 20  # the two are not the same
    assert (interpolation == "random") == (0 < sharp.sum() < 30)


def test_a_decoded_set_whose_crops_are_cut_later_is_whole():
    """The random crop takes the place of the centre; evaluation has the centre."""
    rows, how = TableRows(image_set(6)), Preprocessing((10, 10), shortest_edge=14)
    settings, device, crop = LoadingSettings(dataloader_num_workers=0), torch.device("cpu"), RandomCrop("scale", 0.5)
    found = open_batches(rows, how, device, settings, crop=crop, training=True, keep=False)
    assert found.preprocessing == Preprocessing((10, 10)) and found.crop == crop
    assert open_batches(rows, how, device, settings, keep=False).preprocessing == how


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_no_more_memory_ends_the_run_in_a_line_that_says_so(monkeypatch, workers):
    """Also where bad images are skipped: it says nothing of the image."""

    def no_memory(*_, **__):
        raise MemoryError

    monkeypatch.setattr("vit_hf.data.batches.decode_row", no_memory)
    batches = ImageBatches(TableRows(image_set(30)), PREPROCESSING, on_bad_image="skip", training=True)
    faults = Faults()
    loader = DeviceBatches(batches, train_places(), torch.device("cpu"), workers, faults)
    with pytest.raises(UserError, match="no more memory .*--dataloader_num_workers"):
        next(iter(loader))
    loader.close()
    assert faults.bad == {}
