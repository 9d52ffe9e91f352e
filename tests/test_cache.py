"""Sets that are decoded once: made by one process, whole or not at all, and the same for whoever comes later."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys

import datasets
import numpy as np
import pytest

from tests.runs import ROOT, python
from tests.test_loader import BAD, image_set, png
from vit_hf.arguments import RandomCrop
from vit_hf.data import cache
from vit_hf.data.cache import decoded, worth_decoding
from vit_hf.data.decode import open_image, to_pixels
from vit_hf.data.preprocessing import Preprocessing
from vit_hf.data.rows.table import TableRows
from vit_hf.errors import UserError

PREPROCESSING = Preprocessing((12, 12))


def files(folder, suffix=".npy"):
    return sorted(path.name for path in (folder / "vit_hf_pixels").iterdir() if path.suffix == suffix)


def test_pixels_are_those_of_each_row_and_are_decoded_once(tmp_path, monkeypatch):
    dataset = image_set(100)
    pixels, bad = decoded(TableRows(dataset), PREPROCESSING, tmp_path)
    assert pixels.shape == (100, 12, 12, 3) and pixels.dtype == np.uint8 and bad == {}
    for row in (0, 63, 64, 99):
        assert np.array_equal(pixels[row], to_pixels(open_image(dataset[row]["image"]), PREPROCESSING))
    assert not pixels.flags.writeable
    monkeypatch.setattr(cache, "decode_row", None)  # a second time nothing is decoded
    again, _ = decoded(TableRows(image_set(100)), PREPROCESSING, tmp_path)
    assert np.array_equal(again, pixels)
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


def test_rows_that_do_not_decode_are_known_the_second_time_too(tmp_path):
    for _ in range(2):
        pixels, bad = decoded(TableRows(image_set(bad=BAD)), PREPROCESSING, tmp_path)
        assert set(bad) == {4, 7} and "images/4.png" in bad[4] and not pixels[[4, 7]].any()


@pytest.mark.slow
def test_a_half_written_file_of_a_killed_process_is_made_anew(tmp_path):
    """Killed in the middle of decoding: the lock is free again, what is left is not taken for the set."""
    code = f"""
import os, signal
import vit_hf.data.cache as cache
from tests.test_cache import *
def die(image, preprocessing, count=[0]):
    count[0] += 1
    if count[0] > 70:
        os.kill(os.getpid(), signal.SIGKILL)
    return to_pixels(open_image(image), preprocessing)
cache.decode_row = die
decoded(TableRows(image_set(100)), PREPROCESSING, {str(tmp_path)!r})
"""
    assert python("-c", code).returncode == -signal.SIGKILL
    assert files(tmp_path) == [] and len(files(tmp_path, ".tmp")) == 1
    pixels, _ = decoded(TableRows(image_set(100)), PREPROCESSING, tmp_path)
    assert pixels[99].any() and files(tmp_path, ".tmp") == []


@pytest.mark.slow
def test_two_runs_that_start_at_once_make_it_once(tmp_path):
    """Both wait at the lock; the one that comes second finds the file and leaves it alone."""
    code = f"""
import vit_hf.data.cache as cache
from tests.test_cache import *
made, make = [], cache._make
cache._make = lambda *a: (made.append(1), make(*a))
pixels, _ = decoded(TableRows(image_set(100)), PREPROCESSING, {str(tmp_path)!r})
print(len(made), int(pixels.astype(np.int64).sum()))
"""
    decoded(TableRows(image_set(5)), PREPROCESSING, tmp_path)  # only makes the folder
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
        for _ in range(2)
    ]
    results = [process.communicate(timeout=120)[0].split() for process in both]
    assert sorted(result[0] for result in results) == ["0", "1"] and results[0][1] == results[1][1]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, error):
    def full(path):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(cache, "_reserve", full)
    with pytest.raises(UserError, match="decoded images need .* GB in .*HF_DATASETS_CACHE"):
        decoded(TableRows(image_set(20)), PREPROCESSING, tmp_path)
    assert files(tmp_path) == files(tmp_path, ".tmp") == files(tmp_path, ".json") == []


def test_a_file_larger_than_the_system_allows_does_not_end_the_process(tmp_path):
    """The room is taken before a page is written: no bus error, no signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(UserError, match="decoded images need"):
            decoded(TableRows(image_set(40)), PREPROCESSING, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert files(tmp_path) == files(tmp_path, ".tmp") == []


def test_a_set_is_decoded_once_where_it_fits_and_loses_nothing(monkeypatch):
    rows = TableRows(image_set())  # 14 to 23 pixels wide, 16 to 20 high
    monkeypatch.setattr(cache, "DECODED_BYTES", 10 * 12 * 12 * 3)
    assert worth_decoding(rows, PREPROCESSING)
    assert not worth_decoding(rows, PREPROCESSING, RandomCrop("scale", 0.1))  # crops of the originals have more detail
    monkeypatch.setattr(cache, "DECODED_BYTES", 10 * 12 * 12 * 3 - 1)
    assert not worth_decoding(rows, PREPROCESSING)
    monkeypatch.undo()
    assert worth_decoding(rows, Preprocessing((32, 32)), RandomCrop("scale", 0.1))
    assert not worth_decoding(rows, Preprocessing((19, 32)), RandomCrop("scale", 0.1))
    assert not worth_decoding(rows, Preprocessing((32, 32)), RandomCrop("simple", 4))  # it keeps the images' shape
    square = TableRows(image_set(bad={row: png(row, 16, 16) for row in range(10)}))  # in place of the others
    assert worth_decoding(square, Preprocessing((32, 32)), RandomCrop("simple", 4))
    assert not worth_decoding(square, Preprocessing((32, 24)), RandomCrop("simple", 4))


@pytest.mark.parametrize("damage", ["no notes", "short file", "broken notes", "other notes"])
def test_a_damaged_cache_is_made_anew(tmp_path, damage):
    before, _ = decoded(TableRows(image_set(bad=BAD)), PREPROCESSING, tmp_path)
    before = before.copy()
    notes, pixels = (tmp_path / "vit_hf_pixels" / files(tmp_path, suffix)[0] for suffix in (".json", ".npy"))
    if damage == "no notes":
        notes.unlink()
    elif damage == "short file":
        pixels.write_bytes(pixels.read_bytes()[:500])
    else:
        notes.write_text("{" if damage == "broken notes" else "{}")
    again, bad = decoded(TableRows(image_set(bad=BAD)), PREPROCESSING, tmp_path)
    assert np.array_equal(again, before) and set(bad) == {4, 7}
    assert set(json.loads(notes.read_text())["bad"]) == {"4", "7"}


def test_a_file_that_could_not_be_read_is_tried_again_at_the_next_start(tmp_path):
    """An outage of the storage is not remembered as a bad image."""
    rows = image_set(4).to_list()
    path = tmp_path / "one.png"
    rows[1]["image"] = {"bytes": None, "path": str(path)}
    dataset = datasets.Dataset.from_list(rows, features=image_set(1).features)
    _, bad = decoded(TableRows(dataset), PREPROCESSING, tmp_path)
    assert set(bad) == {1} and "one.png" in bad[1]
    path.write_bytes(png(1))
    pixels, bad = decoded(TableRows(dataset), PREPROCESSING, tmp_path)
    assert bad == {} and pixels[1].any()
