"""Streaming: rows of parquet shards by index, an order that keeps each worker inside its shards, and exact positions."""

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
from vit_hf.data.batches import ImageBatches
from vit_hf.data.device import DeviceBatches
from vit_hf.data.faults import Faults
from vit_hf.data.order import StepPlan, StreamOrder
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
    options |= dict(micro_batch_size=6 // world, accumulation=2)
    plan = StepPlan(**{name: changes.pop(name, value) for name, value in options.items()})
    return StreamOrder(plan, **{**dict(shards=rows.shards(), num_workers=workers, buffer_size=24), **changes})


def pairs(batches):
    return [pair for batch in batches for pair in zip(batch.visit.tolist(), batch.index.tolist())]


# --- rows ---


def test_rows_are_those_of_the_shards_in_any_order(folder):
    rows = rows_of(folder)
    index = np.random.RandomState(0).permutation(200)
    images, labels = rows.read(index)
    assert len(rows) == 200 and [number_in(image) for image in images] == index.tolist()
    assert labels.tolist() == (index % 3).tolist() and images[0]["path"] == f"{index[0]}.png"


@pytest.mark.parametrize("buffer_size", [3, 24])  # below and above a row group
def test_only_the_row_groups_at_hand_are_held(folder, monkeypatch, buffer_size):
    """A walk in stream order reads each group about once, and holds no more than it says."""
    rows = rows_of(folder)
    rows.hold(buffer_size, 0)
    read, held = [], 0
    original = rows._read_group
    monkeypatch.setattr(rows, "_read_group", lambda group: (read.append(group), original(group))[1])
    for batch in places(rows, total_steps=17, buffer_size=buffer_size):
        rows.read(batch.index)
        held = max(held, sum(len(table) for table in rows._groups.values()))
    groups = len(rows.group_file)
    assert held <= rows.held_rows <= 1.5 * buffer_size + 21 and groups <= len(read) <= 1.3 * groups
    assert set(read) == set(range(len(rows.group_file)))


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


@pytest.mark.parametrize("world, workers", [(1, 0), (1, 2), (2, 0), (2, 3)])
def test_each_sample_comes_once_an_epoch_over_all_processes(folder, world, workers):
    rows = rows_of(folder)
    seen = collections.Counter()
    for rank in range(world):
        seen.update(pairs(places(rows, world, rank, workers, total_steps=150)))
    assert max(seen.values()) == 1
    for epoch in range(3):  # processes end an epoch at unlike times, so the last ones are not whole
        assert {index for visit, index in seen if visit == epoch} == set(range(200))


def test_a_worker_stays_inside_its_shards(folder):
    """Within an epoch the shards of any two of the four streams are disjoint."""
    rows = rows_of(folder)
    shard_of = np.repeat(np.arange(8), [len(part) for part in rows.shards()])
    streams_ = collections.defaultdict(set)
    for rank in range(2):
        for number, batch in enumerate(places(rows, 2, rank, workers=2, total_steps=8)):
            assert set(batch.visit) == {0}
            streams_[rank, number % 2] |= set(shard_of[batch.index].tolist())
    found = list(streams_.values())
    assert len(found) == 4 and sum(map(len, found)) == len(set.union(*found))


def test_rows_move_back_by_up_to_the_buffer(folder):
    """Neighbours are mixed, epochs differ, and no row is away from its place by more than the buffer."""
    rows = rows_of(folder)
    order = [index for visit, index in pairs(places(rows, total_steps=34)) if visit == 0]
    epoch_1 = [index for visit, index in pairs(places(rows, total_steps=34)) if visit == 1]
    stream = np.concatenate(places(rows)._share(0, 0))
    position = {index: number for number, index in enumerate(stream.tolist())}
    distance = np.array([number - position[index] for number, index in enumerate(order)])
    assert abs(distance).max() <= 24 and abs(distance).mean() > 5 and len(order) == 200
    assert order != epoch_1[: len(order)] and order != stream.tolist()
    whole = places(rows, buffer_size=1)
    assert [index for visit, index in pairs(whole) if visit == 0] == stream.tolist()


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("first_step", [1, 7, 30, 59])
def test_a_start_at_a_step_equals_skipping_the_steps_before(folder, first_step, workers):
    """In the middle of an epoch, of a buffer and of the workers' turn too."""
    rows = rows_of(folder)
    whole = list(places(rows, 2, 1, workers))
    rest = list(places(rows, 2, 1, workers, first_step=first_step))
    assert len(rest) == (60 - first_step) * 2 and pairs(rest) == pairs(whole[first_step * 2 :])


def test_fewer_shards_than_processes_need_are_refused(folder):
    rows = rows_of(folder)
    with pytest.raises(UserError, match="8 shards for 3 processes with 3 workers each, which need 9; take fewer"):
        places(rows, world=3, workers=3)
    assert len(places(rows, world=2, workers=4)) == 120


def test_batches_of_workers_are_those_of_the_places(folder):
    """Read and decoded by two processes that each hold their own shards; in the order of the places."""
    rows = rows_of(folder)
    course = places(rows, workers=2, total_steps=12)
    batches = list(DeviceBatches(ImageBatches(rows, PREPROCESSING, training=True), course, CPU, 2, Faults()))
    for batch, expected in zip(batches, course, strict=True):
        assert batch["index"].tolist() == expected.index.tolist()
        assert (batch["pixel_values"][:, 0, 0, 0] == torch.as_tensor(expected.index % 256)).all()
        assert batch["labels"].tolist() == (expected.index % 3).tolist()


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
def test_a_streamed_run_resumes_exactly(run, folder, tmp_path):
    flags = dict(dataset_name=folder, streaming="true", save_steps=5, max_steps=11, global_batch_size=24)
    flags |= dict(random_crop="scale=0.3", dataloader_num_workers=2, max_eval_samples=None, shuffle_buffer_size=20)
    whole = run("pretrain", output_dir=tmp_path / "whole", **flags)
    again = run(
        "pretrain", output_dir=tmp_path / "again", resume_from_checkpoint=tmp_path / "whole/checkpoint-5", **flags
    )
    assert trajectory(again) == trajectory(whole)[5:] and len(trajectory(whole)) == 11
    assert '"exact": true' in (tmp_path / "again/events.jsonl").read_text()
    assert evaluation(whole) == evaluation(again)
    assert lines(whole, "eval_accuracy")[-1]["eval_samples"] == 33
    run(
        "pretrain", output_dir=tmp_path / "other", resume_from_checkpoint=tmp_path / "whole/checkpoint-5",
        **{**flags, "dataloader_num_workers": 1},
    )  # fmt: skip
    assert "dataloader_num_workers 2 then, 1 now" in (tmp_path / "other/events.jsonl").read_text()
