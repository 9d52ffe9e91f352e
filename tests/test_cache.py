"""Sets that are decoded once: made by one process, whole or not at all, and the same for whoever comes later."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch

from tests.runs import ROOT, evaluation, python, trajectory
from tests.test_loader import BAD, image_set, png
from vit_hf.arguments import RandomCrop
from vit_hf.data import cache, cache_folder
from vit_hf.data.batches import ImageBatches
from vit_hf.data.cache import NotKept, decoded, worth_decoding
from vit_hf.data.cache_folder import cached_sets, drop
from vit_hf.data.decode import decode_row, open_image, to_pixels
from vit_hf.data.device import DeviceBatches
from vit_hf.data.faults import Faults
from vit_hf.data.feed import LoadingSettings, open_batches
from vit_hf.data.order import EvalOrder
from vit_hf.data.preprocessing import Preprocessing
from vit_hf.data.rows.parquet import ParquetRows
from vit_hf.data.rows.table import Source, TableRows
from vit_hf.data.sets.load import load_image_splits
from vit_hf.data.sets.subset import SubsetRule
from vit_hf.errors import UserError

PREPROCESSING = Preprocessing((12, 12))


def files(folder, suffix=".pixels"):
    return sorted(path.name for path in (folder / "vit_hf_pixels").iterdir() if path.suffix == suffix)


def rows_of(dataset, chosen=None):
    """All rows of a set, or some of them, with the set as their source."""
    if chosen is None:
        return TableRows(dataset)
    return TableRows(
        dataset.select(chosen), Source(dataset.select_columns(["image"]), np.array(chosen), ("s", "train"))
    )


def small_set(num=30, sizes=((8, 8),), name="plain"):
    """Images of one size, or of several in turn."""
    features = image_set(1).features
    content = [png(row, *sizes[row % len(sizes)][::-1]) for row in range(num)]
    images = [{"bytes": data, "path": f"{name}/{row}.png"} for row, data in enumerate(content)]
    return datasets.Dataset.from_dict({"image": images, "label": [row % 3 for row in range(num)]}, features=features)


def expected(dataset, preprocessing, index):
    return np.stack([to_pixels(open_image(dataset[int(row)]["image"]), preprocessing) for row in index])


def count_decoding(monkeypatch):
    """The number of images that are decoded from now on, in a list that grows."""
    seen = []
    monkeypatch.setattr(cache, "decode_row", lambda *a: (seen.append(1), decode_row(*a))[1])
    return seen


def test_pixels_are_those_of_each_row_and_are_decoded_once(tmp_path, monkeypatch):
    dataset = image_set(100)
    kept = decoded(TableRows(dataset), PREPROCESSING, tmp_path)
    assert kept.pixels.shape == (100, 12, 12, 3) and kept.pixels.dtype == np.uint8 and kept.bad == {}
    index = np.array([0, 63, 64, 99])
    assert np.array_equal(kept[index], expected(dataset, PREPROCESSING, index))
    assert not kept.pixels.flags.writeable
    monkeypatch.setattr(cache, "decode_row", None)  # a second time nothing is decoded
    again = decoded(TableRows(image_set(100)), PREPROCESSING, tmp_path)
    assert np.array_equal(again[:], kept[:])
    assert len(files(tmp_path)) == 1 and not [name for name in os.listdir(tmp_path / "vit_hf_pixels") if "tmp" in name]


def test_other_images_and_other_settings_have_files_of_their_own(tmp_path):
    for dataset in (image_set(20), image_set(21), image_set(20).select(range(1, 20))):
        decoded(TableRows(dataset), PREPROCESSING, tmp_path)
    for changed in (
        Preprocessing((12, 10)),
        Preprocessing((12, 12), shortest_edge=14),
        Preprocessing((12, 12), resample=3),
    ):
        decoded(TableRows(image_set(20)), changed, tmp_path)
    assert len(files(tmp_path)) == 6
    decoded(TableRows(image_set(20)), Preprocessing((12, 12), image_mean=(0.1,) * 3), tmp_path)  # the same pixels
    assert len(files(tmp_path)) == 6


@pytest.mark.parametrize("sizes", [((8, 8),), ((8, 8), (9, 7))])
def test_subsets_share_a_file_and_decode_what_is_missing(tmp_path, monkeypatch, sizes):
    dataset = small_set(30, sizes)
    decodings = count_decoding(monkeypatch)
    for chosen, more in (([3, 4, 9, 20], 4), ([4, 5, 20, 29], 2), (list(range(30)), 24), ([0, 29], 0)):
        before = len(decodings)
        kept = decoded(rows_of(dataset, chosen), PREPROCESSING, tmp_path)
        assert len(decodings) - before == more
        if len(sizes) == 2:
            assert np.array_equal(kept[:], expected(dataset, PREPROCESSING, chosen))
        else:
            assert np.array_equal(kept[:], expected(dataset, Preprocessing((8, 8)), chosen))
    assert len(files(tmp_path)) == 1


def test_image_sizes_and_rules_share_a_file_at_the_native_size(tmp_path):
    """A model of 224 pixels does not make CIFAR's file 49 times as large."""
    dataset = small_set(30, ((32, 32),))
    rules = [Preprocessing((224, 224)), Preprocessing((384, 384), resample=3), Preprocessing((16, 16))]
    rules += [Preprocessing((32, 32)), Preprocessing((224, 224), shortest_edge=256)]
    rules += [Preprocessing((32, 32), shortest_edge=36)]
    for preprocessing in rules:
        rows = TableRows(dataset)
        kept = decoded(rows, preprocessing, tmp_path)
        assert kept.size == (32, 32) and kept.nbytes == 30 * 32 * 32 * 3
        index = np.array([1, 7, 29])
        batches = ImageBatches(rows, preprocessing, kept)
        order = EvalOrder(num_samples=30, num_processes=1, rank=0, batch_size=30)
        (batch,) = DeviceBatches(batches, order, torch.device("cpu"), 0, Faults())
        found = batch["pixel_values"].permute(0, 2, 3, 1).numpy()[index]
        assert np.array_equal(found, expected(dataset, preprocessing, index))
    assert len(files(tmp_path)) == 1
    size = (tmp_path / "vit_hf_pixels" / files(tmp_path)[0]).stat().st_size
    assert 30 * 32 * 32 * 3 < size < 30 * 32 * 32 * 3 + 1000


def test_a_file_takes_room_for_the_rows_that_were_asked_for(tmp_path):
    dataset = small_set(400, ((64, 64),))
    decoded(rows_of(dataset, [200, 300]), Preprocessing((32, 32)), tmp_path)
    state = (tmp_path / "vit_hf_pixels" / files(tmp_path)[0]).stat()
    assert state.st_size > 400 * 64 * 64 * 3 and state.st_blocks * 512 < 100_000


def test_images_much_larger_than_the_input_are_kept_as_the_input(tmp_path):
    kept = decoded(TableRows(small_set(5, ((64, 64),))), Preprocessing((24, 24)), tmp_path)
    assert kept.size == (24, 24)


def test_a_stray_image_of_another_size_makes_it_a_set_of_several_sizes(tmp_path, monkeypatch):
    dataset = datasets.concatenate_datasets([small_set(200), small_set(1, ((9, 9),)), small_set(200, name="b")])
    for _ in range(2):
        kept = decoded(TableRows(dataset), PREPROCESSING, tmp_path)
        assert kept.size == (12, 12)
        assert np.array_equal(kept[:], expected(dataset, PREPROCESSING, range(401)))
        assert len(files(tmp_path)) == 1 and len(files(tmp_path, ".json")) == 2
        monkeypatch.setattr(cache, "decode_row", None)  # it is remembered


def test_rows_that_do_not_decode_are_known_the_second_time_too(tmp_path):
    for _ in range(2):
        kept = decoded(TableRows(image_set(bad=BAD)), PREPROCESSING, tmp_path)
        assert set(kept.bad) == {4, 7} and "images/4.png" in kept.bad[4] and not kept[[4, 7]].any()
    part = decoded(rows_of(image_set(bad=BAD), [3, 7]), PREPROCESSING, tmp_path)
    assert set(part.bad) == {1} and part.bad[1] == kept.bad[7]


@pytest.mark.slow
def test_a_half_written_file_of_a_killed_process_is_gone_on_with(tmp_path):
    """Killed in the middle of decoding: the lock is free again, and only rows whose pixels are written count."""
    code = f"""
import os, signal
import vit_hf.data.cache as cache
from tests.test_cache import *
cache.PART_BYTES = 20 * 12 * 12 * 3
write = cache.write_description
def die(*arguments, count=[0]):
    count[0] += 1
    if count[0] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*arguments)
cache.write_description = die
decoded(TableRows(image_set(100)), PREPROCESSING, {str(tmp_path)!r})
"""
    assert python("-c", code).returncode == -signal.SIGKILL
    assert len(files(tmp_path)) == 1
    content = (tmp_path / "vit_hf_pixels" / files(tmp_path)[0]).read_bytes()
    assert np.frombuffer(content[-100:], dtype=np.uint8).tolist() == [1] * 40 + [0] * 60
    with pytest.MonkeyPatch.context() as patch:
        decodings = count_decoding(patch)
        kept = decoded(TableRows(image_set(100)), PREPROCESSING, tmp_path)
    assert len(decodings) == 60
    assert np.array_equal(kept[:], expected(image_set(100), PREPROCESSING, range(100)))


@pytest.mark.slow
def test_two_runs_that_start_at_once_make_it_once(tmp_path):
    """Both wait at the lock; the one that comes second finds the file and leaves it alone."""
    code = f"""
import vit_hf.data.cache as cache
from tests.test_cache import *
made, fill = [], cache._fill
cache._fill = lambda *a: (made.append(1), fill(*a))[1]
kept = decoded(TableRows(image_set(100)), PREPROCESSING, {str(tmp_path)!r})
print(len(made), int(kept[:].astype(np.int64).sum()))
"""
    decoded(TableRows(image_set(5)), PREPROCESSING, tmp_path)  # only makes the folder
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
        for _ in range(2)
    ]
    results = [process.communicate(timeout=120)[0].split() for process in both]
    assert sorted(result[0] for result in results) == ["0", "1"] and results[0][1] == results[1][1]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_a_reason_and_leaves_nothing(tmp_path, monkeypatch, error):
    def full(descriptor):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(cache.os, "fsync", full)
    with pytest.raises(NotKept, match=f"{os.strerror(error)}; .* GB would go to"):
        decoded(TableRows(image_set(20)), PREPROCESSING, tmp_path)
    assert files(tmp_path) == files(tmp_path, ".json") == []


def test_a_disk_without_room_is_known_before_anything_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
    monkeypatch.setattr(cache, "decode_row", None)
    with pytest.raises(NotKept, match="No space left"):
        decoded(TableRows(image_set(20)), PREPROCESSING, tmp_path)


def test_a_file_larger_than_the_system_allows_does_not_end_the_process(tmp_path):
    """Nothing is written through the mapping: no bus error, no signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(NotKept, match="File too large"):
            decoded(TableRows(image_set(40)), PREPROCESSING, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert files(tmp_path) == []


def test_a_set_is_decoded_once_where_it_fits_and_loses_nothing(monkeypatch):
    rows = TableRows(image_set())  # 14 to 23 pixels wide, 16 to 20 high
    monkeypatch.setattr(cache, "DECODED_BYTES", 10 * 12 * 12 * 3)
    assert worth_decoding(rows, PREPROCESSING)
    assert not worth_decoding(rows, PREPROCESSING, RandomCrop("scale", 0.1))  # crops of the originals have more detail
    monkeypatch.setattr(cache, "DECODED_BYTES", 10 * 12 * 12 * 3 - 1)
    assert not worth_decoding(rows, PREPROCESSING)
    monkeypatch.undo()
    crop = RandomCrop("scale", 0.1)
    assert not worth_decoding(rows, Preprocessing((32, 32)), crop)  # the box would be drawn in a distorted image
    native = TableRows(small_set(10))  # 8 pixels: at 384 they would take 2,304 times as much
    monkeypatch.setattr(cache, "DECODED_BYTES", 10 * 8 * 8 * 3)
    assert worth_decoding(native, Preprocessing((384, 384)), crop)
    monkeypatch.undo()
    square = TableRows(image_set(bad={row: png(row, 16, 16) for row in range(10)}))  # in place of the others
    for each in (crop, RandomCrop("simple", 4)):
        assert worth_decoding(square, Preprocessing((32, 32)), each)
        assert not worth_decoding(square, Preprocessing((32, 24)), each)
        assert not worth_decoding(square, Preprocessing((12, 12)), each)


@pytest.mark.parametrize("damage", ["no notes", "short file", "broken notes", "other notes"])
def test_a_damaged_cache_is_made_anew(tmp_path, damage):
    before = decoded(TableRows(image_set(bad=BAD)), PREPROCESSING, tmp_path)[:].copy()
    notes, pixels = (tmp_path / "vit_hf_pixels" / files(tmp_path, suffix)[0] for suffix in (".json", ".pixels"))
    if damage == "no notes":
        notes.unlink()
    elif damage == "short file":
        pixels.write_bytes(pixels.read_bytes()[:500])
    else:
        notes.write_text("{" if damage == "broken notes" else "{}")
    again = decoded(TableRows(image_set(bad=BAD)), PREPROCESSING, tmp_path)
    assert np.array_equal(again[:], before) and set(again.bad) == {4, 7}
    assert set(json.loads(notes.read_text())["bad"]) == {"4", "7"}


def test_a_file_that_could_not_be_read_is_tried_again_at_the_next_start(tmp_path):
    """An outage of the storage is not remembered as a bad image."""
    rows = image_set(4).to_list()
    path = tmp_path / "one.png"
    rows[1]["image"] = {"bytes": None, "path": str(path)}
    dataset = datasets.Dataset.from_list(rows, features=image_set(1).features)
    kept = decoded(TableRows(dataset), PREPROCESSING, tmp_path)
    assert set(kept.bad) == {1} and "one.png" in kept.bad[1]
    path.write_bytes(png(1))
    kept = decoded(TableRows(dataset), PREPROCESSING, tmp_path)
    assert kept.bad == {} and kept[1].any()


# --- streams ---


def eval_pass(rows, preprocessing, kept=None):
    """(pixels, labels) of all rows, as evaluation gets them."""
    order = EvalOrder(num_samples=len(rows), num_processes=1, rank=0, batch_size=7)
    found = list(DeviceBatches(ImageBatches(rows, preprocessing, kept), order, torch.device("cpu"), 0, Faults()))
    keep = torch.cat([batch["valid"] for batch in found])
    return [torch.cat([batch[name] for batch in found])[keep] for name in ("pixel_values", "labels")]


@pytest.mark.parametrize("preprocessing", [PREPROCESSING, Preprocessing((12, 12), shortest_edge=14)])
@pytest.mark.parametrize("sizes", [((8, 8),), ((12, 12),), ((8, 8), (9, 7), (30, 41))])
def test_the_evaluation_split_of_a_stream_is_decoded_once(tmp_path, monkeypatch, sizes, preprocessing):
    dataset = small_set(150, sizes)
    shards = [tmp_path / f"test-{number}.parquet" for number in range(3)]
    for number, shard in enumerate(shards):
        dataset.select(range(50 * number, 50 * number + 50)).to_parquet(shard, batch_size=20)

    def stream():
        rows = ParquetRows([str(shard) for shard in shards], "image", "label", ["a", "b", "c"])
        rows.renumber([4, 0, 1])
        rows.keep(np.arange(3, 150, 2))
        return rows

    settings = LoadingSettings(per_device_eval_batch_size=7)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    before = eval_pass(stream(), preprocessing)
    decodings = count_decoding(monkeypatch)
    for expected_decodings in (74, 0):
        decodings.clear()
        batches = open_batches(stream(), preprocessing, torch.device("cpu"), settings)
        after = eval_pass(batches.rows, preprocessing, batches.decoded)
        assert len(decodings) == expected_decodings
        assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    dataset.select(range(50)).to_parquet(shards[0], batch_size=25)  # other content under the same name
    assert len(open_batches(stream(), preprocessing, torch.device("cpu"), settings).rows) == 74
    assert len(files(tmp_path)) == 2


# --- the folder ---


def used_at(tmp_path, key, seconds):
    for file in (tmp_path / "vit_hf_pixels").glob(f"{key}.*"):
        os.utime(file, (seconds, seconds))


def test_what_was_used_longest_ago_makes_room(tmp_path, monkeypatch):
    keys = []
    for number in range(3):
        decoded(TableRows(small_set(20, ((40, 40),), name=f"set{number}")), PREPROCESSING, tmp_path)
        keys += [name.split(".")[0] for name in files(tmp_path) if name.split(".")[0] not in keys]
        used_at(tmp_path, keys[number], 1_000_000 + number)
    decoded(TableRows(small_set(20, ((40, 40),), name="set0")), PREPROCESSING, tmp_path)  # used again, now
    folder = tmp_path / "vit_hf_pixels"
    total = sum(entry.size_bytes for entry in cached_sets(folder))
    monkeypatch.setattr(cache_folder, "CACHE_BYTES", total + 1000)
    decoded(TableRows(small_set(20, ((40, 40),), name="set3")), PREPROCESSING, tmp_path)
    left = {entry.key for entry in cached_sets(folder)}
    assert len(left) == 3 and left >= {keys[0], keys[2]}


def test_a_set_that_is_in_use_is_not_dropped(tmp_path):
    kept = decoded(TableRows(small_set()), PREPROCESSING, tmp_path)
    (entry,) = cached_sets(tmp_path / "vit_hf_pixels")
    assert entry.in_use and not drop(entry) and kept[:].any()
    del kept
    assert not entry.in_use and drop(entry) and files(tmp_path) == files(tmp_path, ".json") == []


def test_the_command_lists_and_clears(tmp_path, monkeypatch, capsys):
    from vit_hf.commands.data import main

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    main(["cache"])
    assert "holds no decoded sets" in capsys.readouterr().out
    for name, chosen in (("one", [3, 4]), ("two", [5])):
        source = small_set(name=name)
        rows = TableRows(source.select(chosen), Source(source, np.array(chosen), (name, "train")))
        decoded(rows, PREPROCESSING)
    main(["cache"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["one", "train"], ["two", "train"]]
    assert "8 x 8" in lines[1] and " 30 " in lines[1]
    main(["cache", "--clear", "--dataset_name", "one"])
    assert len(files(tmp_path)) == 1
    with pytest.raises(UserError, match="--dataset_name three: .* one of two"):
        main(["cache", "--clear", "--dataset_name", "three"])
    main(["cache", "--clear"])
    assert files(tmp_path) == files(tmp_path, ".json") == []


# --- runs ---


def test_a_full_disk_trains_on_to_the_same_bits(run, tmp_path, monkeypatch, capsys):
    """Also with crops, which stay with the device; and so does a run that asks for no cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    flags = dict(random_crop="scale=0.3", max_steps=3, dataloader_num_workers=0, max_train_samples=64)
    whole = run("pretrain", output_dir=tmp_path / "whole", **flags)
    assert "decoded once" in capsys.readouterr().out
    assert cached_sets(tmp_path / "cache/vit_hf_pixels")
    never = run("pretrain", output_dir=tmp_path / "never", decoded_cache="never", **flags)
    assert "batch by batch" in capsys.readouterr().out
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: type("", (), {"free": 0}))
    shutil.rmtree(tmp_path / "cache/vit_hf_pixels")
    full = run("pretrain", output_dir=tmp_path / "full", **flags)
    out = capsys.readouterr().out
    assert "note: decoded images are not kept (No space left on device;" in out and "batch by batch" in out
    assert trajectory(whole) == trajectory(never) == trajectory(full) and len(trajectory(full)) == 3
    assert evaluation(whole) == evaluation(never) == evaluation(full)


def test_subsets_draws_and_held_out_rows_of_a_set_share_its_file(tmp_path, monkeypatch):
    """Through the sets' own loading, where a subset of classes also numbers the labels anew."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for options in (
        dict(),
        dict(max_train_samples=30, split_seed=3),
        dict(subset=SubsetRule(classes=["3", "5"])),
        dict(train_split="test", eval_split="test"),
    ):
        splits = load_image_splits("digits", **options)
        for which in ("train", "eval"):
            rows = splits.rows(which)
            kept = decoded(rows, Preprocessing((32, 32)))
            index = np.array([0, len(rows) // 2, len(rows) - 1])
            stored = getattr(splits, which)
            assert np.array_equal(kept[index], expected(stored, Preprocessing((8, 8)), index))
            assert rows.labels[index].tolist() == stored[index]["label"]
    assert len(files(tmp_path)) == 2  # train and test


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    """Not the output folder, which is fine."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="digits: the cache of `datasets` cannot be written .*HF_DATASETS_CACHE"):
        load_image_splits("digits", cache_dir=str(tmp_path / "file/cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/vit_hf_pixels").write_text("")  # in place of the folder
    with pytest.raises(NotKept, match="vit_hf_pixels"):
        decoded(TableRows(image_set()), PREPROCESSING, tmp_path / "cache")
