"""Streaming: rows of parquet shards by index, an order that no number of processes or workers changes, exact positions."""

import collections
import errno
import io

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.runs import evaluation, lines, trajectory
from tests.test_loader import CPU, PREPROCESSING
from vit_hf.arguments.fields import DataArguments as TrainDefaults
from vit_hf.data.augment.crops import torchvision_boxes
from vit_hf.data.batches import ImageBatches
from vit_hf.data.device import DeviceBatches
from vit_hf.data.faults import Faults
from vit_hf.data.feed import LoadingSettings, train_batches
from vit_hf.data.order import StepPlan, StreamOrder, TrainOrder, stream_order, stream_shape
from vit_hf.data.processes import Processes
from vit_hf.data.randomness import sample_keys
from vit_hf.data.rows import parquet
from vit_hf.data.rows import retries as reading
from vit_hf.data.rows.parquet import ParquetRows
from vit_hf.data.sets.fractals import FractalRows, parse_options, render
from vit_hf.data.sets.load import load_image_splits
from vit_hf.data.sets.subset import SubsetRule, keep_fraction
from vit_hf.errors import UserError

CLASSES = ["a", "b", "c"]


def shard(path, first: int, rows: int, labels=None) -> None:
    """A shard as the Hub has them; the colour of an image is its row."""
    images = []
    for row in range(first, first + rows):
        buffer = io.BytesIO()
        Image.new("RGB", (14, 12), (row % 256, row // 256, 7)).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": f"{row}.png"})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    if labels is not None:  # written past the check of `datasets`
        features["label"] = datasets.Value("int64")
    columns = {"image": images, "label": labels or [row % 3 for row in range(first, first + rows)]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path, batch_size=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """200 training rows in 8 shards of unlike sizes, row groups of 10; 33 test rows in 2 shards."""
    path = tmp_path_factory.mktemp("set")
    (path / "data").mkdir()
    first = 0
    for number, rows in enumerate((25, 25, 30, 20, 25, 35, 15, 25)):
        shard(path / f"data/train-{number:05d}-of-00008.parquet", first, rows)
        first += rows
    shard(path / "data/test-00000-of-00002.parquet", 1000, 20)
    shard(path / "data/test-00001-of-00002.parquet", 1020, 13)
    return path


def rows_of(folder, split="train") -> ParquetRows:
    return ParquetRows(sorted(map(str, folder.glob(f"data/{split}-*"))), "image", "label", CLASSES)


def number_in(image: dict) -> int:
    red, green, _ = Image.open(io.BytesIO(image["bytes"])).getpixel((0, 0))
    return red + 256 * green


def places(rows, world=1, rank=0, workers=0, **changes) -> StreamOrder:
    options = dict(seed=3, first_step=0, total_steps=60, num_processes=world, rank=rank)
    options |= dict(micro_batch_size=12 // world, accumulation=2)
    plan = StepPlan(**{name: changes.pop(name, value) for name, value in options.items()})
    return StreamOrder(plan, **{**dict(groups=rows.groups(), num_workers=workers, buffer_size=45), **changes})


def steps(rows, world=1, workers=0, **changes) -> list[list[tuple[int, int]]]:
    """The (visit, index) pairs of each step over all processes, ascending."""
    found = collections.defaultdict(list)
    for rank in range(world):
        order = places(rows, world, rank, workers, **changes)
        for number, piece in enumerate(order):
            found[number // (2 * order.pieces)] += pairs([piece])
    return [sorted(found[number]) for number in sorted(found)]


def pairs(batches):
    return [pair for batch in batches for pair in zip(batch.visit.tolist(), batch.index.tolist())]


# --- rows ---


def test_rows_are_those_of_the_shards_in_any_order(folder):
    rows = rows_of(folder)
    index = np.random.RandomState(0).permutation(200)
    images, labels = rows.read(index)
    assert len(rows) == 200 and [number_in(image) for image in images] == index.tolist()
    assert labels.tolist() == (index % 3).tolist() and images[0]["path"] == f"{index[0]}.png"


@pytest.mark.parametrize(
    "world, workers, buffer_size",
    # below a row group and so one stream, one row group of each of four streams, four of each
    [(1, 0, 3), (1, 0, 45), (2, 1, 45), (2, 2, 45), (4, 1, 45), (1, 0, 160), (2, 2, 160)],
)
def test_each_row_group_is_read_about_once_and_few_are_held(folder, monkeypatch, world, workers, buffer_size):
    """An epoch over all processes and workers, each with rows of its own; four groups are cut between two streams."""
    read, held = collections.Counter(), 0
    original = ParquetRows._read_group
    monkeypatch.setattr(ParquetRows, "_read_group", lambda rows, group, columns: (
        read.update([group]), original(rows, group, columns))[1])  # fmt: skip
    for rank in range(world):
        order = places(rows_of(folder), world, rank, workers, total_steps=9, buffer_size=buffer_size)
        copies = [rows_of(folder) for _ in range(order.pieces)]
        for number, piece in enumerate(order):
            rows = copies[number % order.pieces]
            rows.held_rows = order.held_rows
            rows.read(piece.index[piece.visit == 0])
            assert sum(len(table) for table in rows._groups.values()) <= rows.held_rows
        held += order.held_rows * order.pieces
    groups = len(rows.group_file)
    assert set(read) == set(range(groups)) and read.total() <= 1.4 * groups
    assert held <= 1.25 * (max(buffer_size, 10) + 12) + 20 * world * max(1, workers)


def test_of_a_subset_only_the_rows_that_are_kept_are_held(folder):
    rows = rows_of(folder)
    kept = keep_fraction(200, 0.4, 1)
    rows.keep(kept)
    rows.held_rows = 1000
    images, labels = rows.read(np.arange(len(kept))[::-1])
    assert [number_in(image) for image in images] == kept[::-1].tolist()
    assert labels.tolist() == (kept[::-1] % 3).tolist()
    assert sum(len(table) for table in rows._groups.values()) == len(kept) == rows.groups()[-1]


def test_a_label_out_of_range_is_named(folder, tmp_path):
    shard(tmp_path / "bad.parquet", 0, 12, labels=[0, 1, 2] * 3 + [0, 1, 5])
    rows = ParquetRows([str(tmp_path / "bad.parquet")], "image", "label", CLASSES)
    rows.read(np.arange(5))
    with pytest.raises(UserError, match=r"bad.parquet, row 1 of row group 1: label 5, allowed are 0..2"):
        rows.read(np.arange(12))


def test_a_missing_label_is_named(tmp_path):
    shard(tmp_path / "bad.parquet", 0, 3, labels=[0, None, 2])
    with pytest.raises(UserError, match="label missing"):
        ParquetRows([str(tmp_path / "bad.parquet")], "image", "label", CLASSES).read(np.arange(3))


def test_a_shard_that_vanishes_is_named(folder, tmp_path):
    for number in range(2):
        shard(tmp_path / f"{number}.parquet", 0, 10)
    rows = ParquetRows([str(tmp_path / f"{number}.parquet") for number in range(2)], "image", "label", CLASSES)
    rows.read(np.arange(10))
    (tmp_path / "1.parquet").unlink()
    loader = DeviceBatches(ImageBatches(rows, PREPROCESSING), places(rows, total_steps=4), CPU, 0, Faults())
    with pytest.raises(UserError, match="cannot be read: .*1.parquet: FileNotFoundError"):
        list(loader)


def test_a_read_that_fails_is_tried_again_with_back_off_and_then_named(folder, monkeypatch):
    waits, failures = [], [OSError(errno.EIO, "flaky"), ConnectionError("reset")]
    original = parquet.open_shard

    def stumbling(name):
        if failures:
            raise failures.pop(0)
        return original(name)

    rows = rows_of(folder)
    monkeypatch.setattr(parquet, "open_shard", stumbling)
    monkeypatch.setattr(reading.time, "sleep", waits.append)
    images, _ = rows.read(np.array([3]))
    assert number_in(images[0]) == 3 and waits == [0.5, 2.0]
    assert len(rows.retried) == 2 and "train-00000" in rows.retried[0] and "flaky" in rows.retried[0]
    failures.extend(OSError(errno.EIO, "broken") for _ in range(9))
    with pytest.raises(UserError, match="cannot be read: .*train-00001.*broken"):
        rows.read(np.array([30]))
    assert waits == [0.5, 2.0, 0.5, 2.0, 8.0]


# --- order ---


@pytest.mark.parametrize("world, workers", [(2, 1), (2, 3), (3, 0), (4, 2), (12, 1)])
def test_a_step_has_the_same_samples_on_any_number_of_processes_and_workers(folder, world, workers):
    rows = rows_of(folder)
    assert steps(rows, world, workers) == steps(rows) and len(steps(rows)) == 60


def test_each_sample_comes_once_an_epoch_and_the_next_epoch_is_another(folder):
    whole = [pair for step in steps(rows_of(folder), 2, 3, total_steps=75) for pair in step]
    assert sorted(whole) == [(visit, index) for visit in range(9) for index in range(200)]
    epochs = [stream_order(3, epoch, rows_of(folder).groups(), 4, 1).tolist() for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert [pair[1] for step in steps(rows_of(folder), total_steps=8) for pair in step] != list(range(192))


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("first_step", [1, 7, 30, 59])
def test_a_start_at_a_step_equals_skipping_the_steps_before(folder, first_step, workers):
    """In the middle of an epoch and of a row group too."""
    rows = rows_of(folder)
    whole = list(places(rows, 2, 1, workers))
    rest = list(places(rows, 2, 1, workers, first_step=first_step))
    pieces = 2 * max(1, workers)
    assert len(rest) == (60 - first_step) * pieces == len(places(rows, 2, 1, workers, first_step=first_step))
    assert [pairs([piece]) for piece in rest] == [pairs([piece]) for piece in whole[first_step * pieces :]]


def equal_groups(num_groups, rows=100) -> np.ndarray:
    return np.arange(num_groups + 1) * rows


@pytest.mark.parametrize(
    "num_groups, rows, buffer_size, shape",
    [
        (13000, 100, 32768, (256, 1)),  # ImageNet, by default
        (13000, 100, 102_400, (1024, 1)),
        (13000, 100, 80_000, (512, 1)),
        (13000, 10, 32768, (1024, 3)),
        (13000, 100, 10_000, (64, 1)),
        (50, 1000, 32768, (8, 4)),  # few row groups
        (7, 5000, 32768, (1, 6)),
        (20, 100_000, 32768, (1, 1)),  # none fits
    ],
)
def test_how_many_streams_there_are(num_groups, rows, buffer_size, shape):
    assert stream_shape(equal_groups(num_groups, rows), buffer_size) == shape


@pytest.mark.parametrize("world, workers, most", [(1, 16, 1.02), (8, 4, 1.02), (2, 3, 1.02), (6, 4, 1.1)])
@pytest.mark.parametrize("per_process", [32, 48, 50])
def test_workers_do_not_read_the_row_groups_of_others(world, workers, most, per_process):
    """Whatever the batch. Of 2,570 row groups 256 are cut between two streams; processes that are no power of two take a
    few samples from the streams of their neighbours. Three steps of each hundred: what is counted does not build up."""
    groups = np.cumsum([0, *np.random.RandomState(0).randint(60, 100, 2570)])
    group_of = np.repeat(np.arange(2570), np.diff(groups))
    pairs_, seen = 0, set()
    for rank in range(world):
        plan = dict(seed=3, total_steps=150, num_processes=world, rank=rank, micro_batch_size=per_process)
        order = StreamOrder(
            StepPlan(first_step=0, accumulation=1, **plan), groups=groups, num_workers=workers, buffer_size=25_600
        )
        of_worker = collections.defaultdict(set)
        for number, piece in enumerate(order):
            assert abs(len(piece.index) - per_process / workers) < 6
            of_worker[number % workers].update(group_of[piece.index[piece.visit == 0]].tolist())
        pairs_ += sum(map(len, of_worker.values()))
        seen |= set().union(*of_worker.values())
    assert pairs_ <= most * len(seen) + 256


@pytest.mark.parametrize("batch_size, buffer_size", [(64, None), (256, None), (1024, 102_400)])
def test_batches_of_a_sorted_set_hold_the_classes_of_a_random_batch(batch_size, buffer_size):
    """1,281,000 rows of 1,000 classes, sorted, in row groups of 100, as ImageNet has them: with the default buffer, and
    with one that holds as many row groups as a larger batch has images."""
    buffer_size = buffer_size or LoadingSettings().shuffle_buffer_size
    assert LoadingSettings().shuffle_buffer_size == TrainDefaults().shuffle_buffer_size
    groups = equal_groups(12_810)
    order = stream_order(0, 1, groups, *stream_shape(groups, buffer_size))
    batches = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)[:: 12_800 // batch_size] // 1281
    found = np.array([len(set(batch)) for batch in batches.tolist()])
    expected = 1000 * (1 - 0.999**batch_size)
    assert found.min() > 0.8 * expected and found.mean() > 0.95 * expected


def sorted_shards(path, num_classes=50, each=40):
    """2,000 rows that lie class by class in 8 shards, row groups of 10."""
    (path / "data").mkdir(parents=True)
    rows = np.repeat(np.arange(num_classes), each)
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    names = [f"class {number}" for number in range(num_classes)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    for split, labels in (("train", rows), ("test", rows[::20])):
        for number, part in enumerate(np.array_split(labels, 8 if split == "train" else 1)):
            columns = {"image": [{"bytes": buffer.getvalue(), "path": None}] * len(part), "label": part}
            table = datasets.Dataset.from_dict(columns, features=features)
            table.to_parquet(path / f"data/{split}-{number}.parquet", batch_size=10)


def test_a_sorted_set_trains_on_mixed_batches(tmp_path):
    """On the whole path, from a folder to batches."""
    sorted_shards(tmp_path)
    splits = load_image_splits(str(tmp_path), streaming=True)
    plan = StepPlan(0, 0, 62, num_processes=1, rank=0, micro_batch_size=32, accumulation=1)
    settings = LoadingSettings(dataloader_num_workers=0, shuffle_buffer_size=330)
    batches, _ = train_batches(
        splits.train, PREPROCESSING, plan, Processes(CPU, say=lambda line: None), settings, Faults()
    )
    found = [len(batch["labels"].unique()) for batch in batches]
    expected = 50 * (1 - 0.98**32)
    assert min(found) > 0.6 * expected and np.mean(found) > 0.8 * expected


def test_a_sorted_set_is_noted_with_the_command_that_mends_it(tmp_path, folder):
    sorted_shards(tmp_path)
    (note,) = load_image_splits(str(tmp_path), streaming=True).notes
    assert "a row group of 10 rows holds 1.0 classes, and would hold 5.9" in note
    assert f"`vit-hf data prepare --dataset_name {tmp_path} --output_dir FOLDER`" in note
    assert load_image_splits(str(tmp_path), streaming=True, need_train=False).notes == []
    assert load_image_splits(str(folder), streaming=True).notes == []


def test_pieces_of_workers_make_the_same_micro_batch_whatever_their_number(folder):
    """Also where a worker has nothing for it, where rows do not decode, and with a thread that copies ahead."""
    rows = rows_of(folder)
    expected = list(places(rows, total_steps=20, micro_batch_size=3))
    assert any(len(piece.index) == 0 for piece in places(rows, workers=3, total_steps=20, micro_batch_size=3))
    assert len(expected) == 40 and {len(batch.index) for batch in expected} == {3}
    for workers, ahead in ((0, 0), (2, 0), (3, 2)):
        order = places(rows, workers=workers, total_steps=20, micro_batch_size=3)
        batches = ImageBatches(rows, PREPROCESSING, training=True)
        loader = DeviceBatches(batches, order, CPU, workers, Faults(), ahead, pieces=order.pieces)
        for batch, wanted in zip(loader, expected, strict=True):
            assert batch["visit"].tolist() == wanted.visit.tolist()
            assert batch["index"].tolist() == wanted.index.tolist() and batch["valid"].all()
            assert (batch["pixel_values"][:, 0, 0, 0] == torch.as_tensor(wanted.index % 256)).all()
            assert batch["pixel_values"].permute(0, 2, 3, 1).is_contiguous()  # on which the bits of a sum may depend
            assert batch["labels"].tolist() == (wanted.index % 3).tolist()
        loader.close()


def test_what_goes_wrong_in_a_piece_is_told_once(folder, monkeypatch):
    rows, bad = rows_of(folder), {5, 60, 133}
    original = ParquetRows.read

    def read(rows, index):
        images, labels = original(rows, index)
        rows.retried += [f"row {row}" for row in bad & set(index.tolist())]
        return [
            {"bytes": b"no", "path": None} if row in bad else image for row, image in zip(index.tolist(), images)
        ], labels

    monkeypatch.setattr(ParquetRows, "read", read)
    order, faults = places(rows, workers=2, total_steps=9), Faults()
    batches = ImageBatches(rows, PREPROCESSING, training=True, on_bad_image="skip")
    loader = DeviceBatches(batches, order, CPU, 2, faults, pieces=2)
    assert all(batch["valid"].all() for batch in loader)
    assert set(faults.bad) == bad and {f"row {row}" for row in bad} == set(faults.retried)
    loader.close()
    loader = DeviceBatches(ImageBatches(rows, PREPROCESSING, training=True), order, CPU, 2, Faults(), pieces=2)
    with pytest.raises(UserError, match="image in row (5|60|133) does not decode"):
        list(loader)
    loader.close()


def test_a_worker_that_would_have_no_stream_is_not_started(folder):
    plan = StepPlan(0, 0, 4, num_processes=2, rank=1, micro_batch_size=4, accumulation=1)
    settings, said = LoadingSettings(dataloader_num_workers=7, shuffle_buffer_size=45), []
    batches, _ = train_batches(
        rows_of(folder), PREPROCESSING, plan, Processes(CPU, say=said.append), settings, Faults()
    )
    assert said == [
        "images: read and decoded batch by batch, 2 workers a process (4 streams of row groups of up to 10 rows)"
    ]
    assert batches.loader.num_workers == batches.pieces == 2


# --- loading ---


def test_a_folder_of_shards_streams(folder):
    splits = load_image_splits(str(folder), streaming=True)
    assert len(splits.train) == 200 and len(splits.eval) == 33 and splits.class_names == CLASSES
    assert (splits.train_split, splits.eval_split) == ("train", "test")
    stored = load_image_splits(str(folder))
    index = np.array([0, 57, 199])
    images, labels = splits.train.read(index)
    assert [image["bytes"] for image in images] == [row["bytes"] for row in stored.train[index]["image"]]
    assert labels.tolist() == stored.train[index]["label"]


def test_the_subset_of_a_stream_is_a_hash_of_the_row(folder):
    splits = load_image_splits(str(folder), streaming=True, subset=SubsetRule(fraction=0.5, seed=4))
    assert np.array_equal(splits.train.source_rows, keep_fraction(200, 0.5, 4))
    assert 75 < len(splits.train) < 125 and splits.subset["train_samples"] == len(splits.train)
    assert len(splits.notes) == 1 and "other images than without --streaming" in splits.notes[0]
    other = load_image_splits(str(folder), streaming=True, subset=SubsetRule(fraction=0.5, seed=5))
    assert other.subset["subset_hash"] != splits.subset["subset_hash"]
    large = keep_fraction(1_000_000, 2 / 3, 0)
    assert abs(len(large) / 1_000_000 - 2 / 3) < 0.002
    images, _ = splits.train.read(np.arange(5))
    assert [number_in(image) for image in images] == splits.train.source_rows[:5].tolist()


@pytest.mark.parametrize("rule", [SubsetRule(per_class=3), SubsetRule(classes=["a"])])
def test_subsets_that_need_all_labels_are_refused(folder, rule):
    with pytest.raises(
        UserError, match="--streaming: a subset of classes or by class .* would have to read all labels"
    ):
        load_image_splits(str(folder), streaming=True, subset=rule)


def test_what_cannot_stream_says_what_to_do(tmp_path):
    (tmp_path / "train/a").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "train/a/0.png")
    with pytest.raises(
        UserError, match="--streaming: .* is stored as imagefolder, allowed is parquet; .*data prepare"
    ):
        load_image_splits(str(tmp_path), streaming=True)
    with pytest.raises(UserError, match="--streaming: digits is generated"):
        load_image_splits("digits", streaming=True)
    (tmp_path / "plain/data").mkdir(parents=True)
    shard(tmp_path / "plain/data/train-0.parquet", 0, 6, labels=[0, 1] * 3)
    with pytest.raises(UserError, match="no part of a stream is held out"):
        load_image_splits(str(tmp_path / "plain"), streaming=True)
    shard(tmp_path / "plain/data/test-0.parquet", 0, 6, labels=[0, 1] * 3)
    with pytest.raises(UserError, match="names no classes"):
        load_image_splits(str(tmp_path / "plain"), streaming=True)


def test_a_test_split_without_labels_is_passed_over(folder, tmp_path):
    """As ImageNet's: all its labels are -1."""
    (tmp_path / "data").mkdir()
    shard(tmp_path / "data/train-0.parquet", 0, 6)
    shard(tmp_path / "data/validation-0.parquet", 0, 6)
    table = pq.read_table(tmp_path / "data/train-0.parquet")
    unknown = table.set_column(1, table.schema.field("label"), [[-1] * 6])
    pq.write_table(unknown.replace_schema_metadata(table.schema.metadata), tmp_path / "data/test-0.parquet")
    splits = load_image_splits(str(tmp_path), streaming=True)
    assert splits.eval_split == "validation" and "test split has no labels" in splits.notes[0]


def test_fractals_are_computed_as_they_are_needed():
    options = "num_classes=4,instances_per_class=5,image_size=16"
    splits = load_image_splits("fractal", dataset_config_name=options, streaming=True, max_train_samples=6)
    assert len(splits.train) == 6 and len(splits.eval) == 4 and len(splits.class_names) == 4
    images, labels = splits.train.read(np.arange(6))
    rows = splits.train.source_rows
    whole = FractalRows(parse_options(options), "train")
    assert labels.tolist() == (rows % 4).tolist()
    for image, row in zip(images, rows.tolist()):
        assert np.array_equal(image, render(whole.systems[row % 4], whole.options, "train", row))


# --- runs ---


@pytest.mark.slow
def test_a_streamed_run_resumes_exactly_also_with_other_workers(run, folder, tmp_path):
    flags = dict(dataset_name=folder, streaming="true", save_steps=5, max_steps=11, global_batch_size=24)
    flags |= dict(random_crop="scale=0.3", max_eval_samples=None, shuffle_buffer_size=45)
    flags |= dict(mixup_alpha=0.5, per_device_train_batch_size=12)
    whole = run("pretrain", output_dir=tmp_path / "whole", dataloader_num_workers=2, **flags)
    for workers in (0, 2, 3):
        folder = tmp_path / f"with {workers}"
        again = run(
            "pretrain", output_dir=folder, resume_from_checkpoint=tmp_path / "whole/checkpoint-5",
            dataloader_num_workers=workers, **flags,
        )  # fmt: skip
        assert trajectory(again) == trajectory(whole)[5:] and len(trajectory(whole)) == 11
        assert '"exact": true' in (folder / "events.jsonl").read_text()
        assert evaluation(whole) == evaluation(again)
    assert lines(whole, "eval_accuracy")[-1]["eval_samples"] == 33


def test_the_crops_of_a_streams_batch_are_as_unlike_as_those_of_any_batch():
    """Where a row comes in its row group and how large its crop is are drawn independently."""
    groups, keys = np.arange(0, 256_001, 100), []
    plan = StepPlan(3, 0, 400, num_processes=1, rank=0, micro_batch_size=256, accumulation=1)
    for order in (
        StreamOrder(plan, groups=groups, num_workers=0, buffer_size=32_768),
        TrainOrder(plan, num_samples=256_000),
    ):
        areas = [
            np.prod(
                torchvision_boxes(sample_keys(3, batch.visit, batch.index), (375, 500), 0.08)[:, 2:], axis=1
            ).mean()
            for batch in order
        ]
        keys.append(np.std(areas) / (375 * 500))
    assert keys[0] < 1.2 * keys[1]  # 12 times as much where they are the same number
