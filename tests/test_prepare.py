"""A smaller copy of a set: what it holds, that it loads like any other set, and that no interruption shows in it."""

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.context import SpawnProcess
from pathlib import Path

import datasets
import numpy as np
import psutil
import pyarrow.parquet
import pytest
import yaml
from PIL import Image

from tests.runs import ROOT
from vit_hf.data.copy import plan, shard
from vit_hf.data.copy.prepare import prepare
from vit_hf.data.decode import open_image
from vit_hf.data.sets.load import load_image_splits
from vit_hf.data.sets.subset import SubsetRule
from vit_hf.errors import UserError

SIDE = 32
ORIENTATION = 0x0112


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Something smooth, as photographs are, in which no two places are alike."""
    levels = np.random.RandomState(width * height).randint(0, 256, (3, 4, 4)).astype(np.uint8)
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    bands = [Image.fromarray(levels[..., band]).resize((width, height), 3) for band in range(channels)]
    return Image.merge(mode, bands)


def encoded(image: Image.Image, kind: str = "JPEG", orientation: int | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    if orientation:
        options["exif"] = Image.Exif()
        options["exif"][ORIENTATION] = orientation
    image.save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}), **options)
    return buffer.getvalue()


LARGE = {  # names in the order of an imagefolder
    "0 twice.jpg": encoded(picture(101, 67), comment=b"from somewhere else"),
    "1 many times.jpg": encoded(picture(521, 390)),
    "2 upright.jpg": encoded(picture(67, 101)),
    "3 lying.jpg": encoded(picture(100, 70), orientation=6),
    "4 lying, many times.jpg": encoded(picture(500, 391), orientation=8),
    "5 transparent.png": encoded(picture(90, 60, "RGBA"), "PNG"),
    "6 grey.jpg": encoded(picture(80, 50, "L")),
    "7 CMYK.jpg": encoded(picture(301, 200, "CMYK")),
    "8 long.png": encoded(picture(33, 300), "PNG"),
}
SMALL = {
    "0 smaller.png": encoded(picture(20, 15, "RGBA"), "PNG"),
    "1 of the size.jpg": encoded(picture(90, SIDE)),
    "2 lying.jpg": encoded(picture(30, 20), orientation=6),
}


def image_folder(folder: Path, **splits: dict[str, dict[str, bytes]]) -> str:
    """{split: {class: {file name: bytes}}}"""
    for split, classes in splits.items():
        for name, files in classes.items():
            (folder / split / name).mkdir(parents=True)
            for file, data in files.items():
                (folder / split / name / file).write_bytes(data)
    return str(folder)


def many(count: int, first: int = 0) -> dict[str, bytes]:
    return {f"{number:03d}.jpg": encoded(picture(60 + number, 50)) for number in range(first, first + count)}


def plain_folder(folder: Path, train: int, test: int, more: dict[str, bytes] | None = None) -> str:
    """Training images 000.jpg, 001.jpg, ... in this order, all but the last of class a; `more` come before or between
    them."""
    classes = {"a": {**many(train - 1), **(more or {})}, "b": many(1, train - 1)}
    return image_folder(folder, train=classes, test={"b": many(test)})


def copy(folder: str, output_dir: Path, *, loading=None, source=None, **settings) -> dict:
    splits = load_image_splits(folder, **(loading or {}))
    settings = {"shorter_side": SIDE, "rows_per_shard": 4, "num_processes": 1, **settings}
    return prepare(splits, output_dir, source={"dataset_name": folder, **(source or {})}, **settings)


def refusal(*args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        copy(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message and len(message) < 700
    return message


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def mixed_rows(count: int) -> list[int]:
    """The order of the training rows of a copy, as its page says it."""
    return np.random.RandomState(0).permutation(count).tolist()


def rows_of(folder: Path, split: str) -> list[dict]:
    return list(load_image_splits(str(folder)).__dict__["train" if split == "train" else "eval"])


# ---- what the copy holds ----


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder with every kind of image, and its copy."""
    folder = tmp_path_factory.mktemp("mixed")
    source = image_folder(
        folder / "pets", train={"cat, tabby": LARGE, "dog": SMALL}, validation={"cat, tabby": many(1), "dog": many(2)}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        result = copy(source, folder / "copy", rows_per_shard=7, num_processes=2)
    return folder / "copy", result, folder


def test_the_copy_loads_as_any_other_set(mixed, tmp_path):
    folder, result, _ = mixed
    plain = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert list(plain) == ["train", "validation"]
    assert plain["train"].features == {
        "image": datasets.Image(), "label": datasets.ClassLabel(names=["cat, tabby", "dog"]),
        "source_row": datasets.Value("int64"), "source_sha256": datasets.Value("string"),
    }  # fmt: skip
    order = mixed_rows(12)
    assert plain["train"]["label"][:] == [int(row >= 9) for row in order] and plain["validation"]["label"][:] == [
        0,
        1,
        1,
    ]
    assert plain["train"]["source_row"][:] == order and plain["validation"]["source_row"][:] == [0, 1, 2]
    contents = [*LARGE.values(), *SMALL.values()]
    assert plain["train"]["source_sha256"][:] == [hashlib.sha256(contents[row]).hexdigest() for row in order]
    assert plain["train"][order.index(0)]["image"].size == (48, 32)
    loaded = load_image_splits(str(folder))
    assert (loaded.class_names, loaded.eval_split, loaded.notes) == (["cat, tabby", "dog"], "validation", [])
    assert [row["image"]["path"] for row in loaded.train] == [[*LARGE, *SMALL][row] for row in order]
    assert loaded.train.column_names == ["image", "label"]
    sizes = {split: sum(file.stat().st_size for file in folder.glob(f"data/{split}-*")) for split in result}
    assert result == {
        "train": {"rows": 12, "shards": 2, "bytes": sizes["train"], "skipped": 0},
        "validation": {"rows": 3, "shards": 1, "bytes": sizes["validation"], "skipped": 0},
    }


def test_large_images_are_resized_and_small_ones_keep_their_bytes(mixed):
    rows = {row["image"]["path"]: row["image"]["bytes"] for row in rows_of(mixed[0], "train")}
    assert {name: rows[name] for name in SMALL} == SMALL
    for name, original in LARGE.items():
        before, after = open_image({"bytes": original, "path": None}), open_image({"bytes": rows[name], "path": None})
        file = Image.open(io.BytesIO(rows[name]))
        assert (file.format, file.mode, min(file.size)) == ("JPEG", "RGB", SIDE), name
        assert not file.getexif() and "comment" not in file.info, name
        longer = int(SIDE * max(before.size) / min(before.size))
        assert after.size == ((SIDE, longer) if before.width <= before.height else (longer, SIDE)), name
        plain = np.asarray(before.resize(after.size, Image.Resampling.BICUBIC), dtype=float)
        assert np.abs(np.asarray(after) - plain).mean() < 3, name  # another image of the set: above 40


def test_a_reduced_decode_is_close_to_the_plain_resize(tmp_path):
    """Apart from the JPEG that is written: on an image with detail down to the pixel."""
    rng = np.random.RandomState(0)
    detail = Image.fromarray(rng.randint(0, 256, (500, 701, 3)).astype(np.uint8))
    image = Image.blend(picture(701, 500), detail, 0.3)
    for data in (encoded(image), encoded(image, orientation=6)):
        upright = open_image({"bytes": data, "path": None})
        size = (56, 40) if upright.width > upright.height else (40, 56)
        difference = np.asarray(upright.resize(size, Image.Resampling.BICUBIC), float) - shard._shrunk(data, 40)
        assert np.abs(difference).mean() < 1 and np.abs(difference).max() < 8


def test_files_carry_features_and_short_row_groups(tmp_path):
    label = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({"image": datasets.Image(), "label": label})
    images = [{"bytes": SMALL["0 smaller.png"], "path": None}] * 250
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1] * 125}, features=features)
    datasets.DatasetDict({"train": rows, "test": rows.select(range(5))}).save_to_disk(tmp_path / "set")
    copy(str(tmp_path / "set"), tmp_path / "copy", rows_per_shard=240)
    names = sorted(path.name for path in (tmp_path / "copy/data").iterdir())
    assert names == [
        f"{name}.parquet" for name in ("test-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002")
    ]
    footer = pyarrow.parquet.read_metadata(tmp_path / "copy/data" / names[1])
    assert [footer.row_group(number).num_rows for number in range(footer.num_row_groups)] == [100, 100, 40]
    schema = pyarrow.parquet.read_schema(tmp_path / "copy/data" / names[0])
    found = datasets.Features.from_arrow_schema(schema)
    assert {name: found[name] for name in features} == features
    assert rows_of(tmp_path / "copy", "test")[1] == {"image": images[0], "label": 1}


def test_card_and_checksums_and_no_path_of_this_machine(mixed):
    folder, _, parent = mixed
    front = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert front["configs"][0]["data_files"][1] == {"split": "validation", "path": "data/validation-*"}
    text = (folder / "README.md").read_text()
    for fact in ("the folder `pets`", "at most 32 pixels", "quality 90", "2 classes", "| 12 |", "All rows"):
        assert fact in text
    done = subprocess.run(["sha256sum", "-c", "checksums.sha256"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == 3
    assert not [name for name, data in files_of(folder).items() if str(parent).encode() in data]
    assert not list(folder.rglob("*.tmp"))


def test_a_subset_and_a_held_out_tenth_are_copied_as_they_were_chosen(tmp_path):
    folder = image_folder(tmp_path / "set", train={"a": many(20), "b": many(10, 20)})
    loading = {"subset": SubsetRule(fraction=0.5, seed=3), "split_seed": 7}
    chosen = load_image_splits(folder, **loading)
    result = copy(folder, tmp_path / "copy", loading=loading, source={"revision": "v2"})
    assert (result["train"]["rows"], result["test"]["rows"]) == (14, 3)  # half of 27, and a tenth
    for split, rows in (("train", chosen.train), ("test", chosen.eval)):
        names = [(os.path.basename(row["image"]["path"]), row["label"]) for row in rows]
        names = [names[row] for row in mixed_rows(14)] if split == "train" else names
        assert [(row["image"]["path"], row["label"]) for row in rows_of(tmp_path / "copy", split)] == names
    content = json.loads((tmp_path / "copy/prepare.json").read_text())
    assert content["source"] == {"dataset_name": "./set", "revision": "v2", "subset": chosen.subset}
    assert content["splits"]["test"]["source"] == "train (10% held out, split seed 7)"
    card = (tmp_path / "copy/README.md").read_text()
    assert chosen.subset["subset_hash"] in card and "- revision: `v2`\n" in card
    assert "source.subset.rule.fraction 0.5 then, None now" in refusal(
        folder, tmp_path / "copy", loading={"split_seed": 7}
    )


def test_splits_of_other_names_become_train_and_test(tmp_path):
    loaded = load_image_splits(plain_folder(tmp_path / "set", 3, 1))
    datasets.DatasetDict({"big": loaded.train, "little": loaded.eval}).save_to_disk(tmp_path / "saved")
    names = {"train_split": "big", "eval_split": "little"}
    result = copy(str(tmp_path / "saved"), tmp_path / "copy", loading=names)
    assert {split: total["rows"] for split, total in result.items()} == {"train": 3, "test": 1}
    loaded = load_image_splits(str(tmp_path / "copy"))
    assert (len(loaded.train), len(loaded.eval), loaded.notes) == (3, 1, [])


# ---- interruptions ----

INTERRUPTED = """
import os, sys
from pathlib import Path
from vit_hf.data.copy.prepare import prepare
from vit_hf.data.sets.load import load_image_splits

folder, first, output_dir, cache = sys.argv[1:]
splits = load_image_splits(folder, cache_dir=cache)
os.rename(first, first + ".kept")
os.mkfifo(first)  # whoever reads it waits until somebody writes
prepare(splits, Path(output_dir), source={"dataset_name": folder}, shorter_side=32, rows_per_shard=4, num_processes=2)
"""


def until(condition, seconds: float = 60):
    """Waits until a condition holds, and returns what it gave."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return value


def writer_of(fifo: str) -> int | None:
    try:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:  # nobody reads it yet, or it is not there yet
        assert error.errno in (errno.ENXIO, errno.ENOENT)
        return None


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_an_interrupted_copy_goes_on_and_shows_no_trace(tmp_path, number):
    """The first shard is in the middle, for as long as it takes, while others get finished."""
    folder = plain_folder(tmp_path / "set", 15, 5)
    assert 8 in mixed_rows(15)[:4]
    first, output_dir = str(tmp_path / "set/train/a/008.jpg"), tmp_path / "copy"
    command = [sys.executable, "-c", INTERRUPTED, folder, first, output_dir, tmp_path / "cache"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    until(lambda: Path(first + ".kept").exists())
    fifo = until(lambda: writer_of(first) if Path(first).is_fifo() else None)
    until(lambda: len(list(output_dir.glob("data/*.parquet"))) == 5)
    assert not (output_dir / "data/train-00000-of-00004.parquet").exists()
    children = psutil.Process(job.pid).children()
    assert len(children) >= 2 and len(list((output_dir / "data").glob(".*.tmp"))) == 1
    if number == signal.SIGINT:  # as from a terminal: to the whole group; then the read ends
        os.killpg(job.pid, number)
        os.write(fifo, Path(first + ".kept").read_bytes())
        os.close(fifo)
    else:
        os.kill(job.pid, number)
    assert job.wait(timeout=60) != 0
    until(lambda: all(is_gone(child) for child in children))
    if number == signal.SIGKILL:
        os.close(fifo)
    assert len(list((output_dir / "data").glob(".*.tmp"))) == (number == signal.SIGKILL)

    os.replace(first + ".kept", first)
    finished = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in output_dir.glob("data/*.parquet")}
    result = copy(folder, output_dir)
    assert finished == {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in finished}
    assert result == copy(folder, tmp_path / "whole")
    assert files_of(output_dir) == files_of(tmp_path / "whole")


def test_a_finished_copy_is_left_alone(tmp_path, capsys, monkeypatch):
    folder = plain_folder(tmp_path / "set", 5, 1)
    result = copy(folder, tmp_path / "copy")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "copy").rglob("*")}
    monkeypatch.setattr(plan.PIL, "__version__", "99.0")  # nothing will be written, so it does not matter
    assert copy(folder, tmp_path / "copy") == result
    assert capsys.readouterr().out == f"{tmp_path / 'copy'} holds this copy, finished: nothing to do\n"
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "copy").rglob("*")}
    (tmp_path / "copy/data/test-00000-of-00001.parquet").unlink()
    assert "(versions.pillow " in refusal(folder, tmp_path / "copy")


def test_a_file_that_is_not_the_whole_of_its_rows_is_made_again(tmp_path):
    folder = plain_folder(tmp_path / "set", 5, 1)
    copy(folder, tmp_path / "copy")
    whole = files_of(tmp_path / "copy")
    four_rows, one_row = sorted((tmp_path / "copy/data").glob("train-*"))
    for damage in (lambda: os.truncate(four_rows, 1000), lambda: four_rows.write_bytes(one_row.read_bytes())):
        damage()
        copy(folder, tmp_path / "copy")
        assert files_of(tmp_path / "copy") == whole


def test_other_settings_and_foreign_folders_are_refused(tmp_path):
    folder = plain_folder(tmp_path / "set", 5, 1)
    copy(folder, tmp_path / "copy")
    before = files_of(tmp_path / "copy")
    message = refusal(folder, tmp_path / "copy", shorter_side=24, jpeg_quality=80, source={"revision": "b"})
    assert message == (
        f"--output_dir {tmp_path / 'copy'}: holds another copy (source.revision None then, b now; shorter_side 32 then, "
        "24 now; jpeg_quality 90 then, 80 now); choose another folder, or give the same flags to go on"
    )
    other = image_folder(tmp_path / "other", train={"a": many(4), "c": many(1)}, test={"b": many(1)})
    message = refusal(other, tmp_path / "copy")
    assert "./set then, ./other now" in message and "classes.number 2 then, 3 now" in message
    assert files_of(tmp_path / "copy") == before

    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    assert "holds notes.txt and no prepare.json" in refusal(folder, tmp_path / "full")
    (tmp_path / "parquet/data").mkdir(parents=True)
    (tmp_path / "parquet/data/train.parquet").write_text("mine")
    assert "holds data and no prepare.json" in refusal(folder, tmp_path / "parquet")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/prepare.json").write_text("{")
    assert "its prepare.json cannot be read" in refusal(folder, tmp_path / "broken")
    assert "is a file" in refusal(folder, tmp_path / "full/notes.txt")
    assert refusal(folder, tmp_path / "new", shorter_side=0) == "--shorter_side 0: must be at least 1 pixel"
    assert refusal(folder, tmp_path / "new", jpeg_quality=0) == "--jpeg_quality 0: must be in 1..100"
    assert not (tmp_path / "new").exists()


# ---- bad images ----

BAD = {"001 text.jpg": b"this is no image", "007 cut off.jpg": LARGE["0 twice.jpg"][:900],
       "008 small, cut off.png": SMALL["0 smaller.png"][:-60]}  # fmt: skip


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_bad_image_stops_the_work_and_is_named(tmp_path, num_processes):
    folder = plain_folder(tmp_path / "set", 10, 2, {"001 text.jpg": BAD["001 text.jpg"]})
    message = refusal(folder, tmp_path / "copy", num_processes=num_processes, rows_per_shard=20)
    path = tmp_path / "set/train/a/001 text.jpg"
    assert message == (
        f"train split, row 1, file {path}: the image cannot be copied: UnidentifiedImageError: cannot identify image "
        "file; repair it, or leave such rows out with --on_bad_image skip"
    )
    left = set(files_of(tmp_path / "copy"))
    assert "prepare.json" in left and left <= {"prepare.json", "data/test-00000-of-00001.parquet"}


@pytest.mark.slow
def test_a_bad_image_stops_the_other_processes_too(tmp_path, monkeypatch):
    """The one in the middle of the first shard, where the second shard has the bad image."""
    assert 2 in mixed_rows(8)[:4] and 5 in mixed_rows(8)[4:]
    folder, first = plain_folder(tmp_path / "set", 8, 1), tmp_path / "set/train/a/002.jpg"
    (tmp_path / "set/train/a/005.jpg").write_bytes(b"this is no image")
    splits, data = load_image_splits(folder), first.read_bytes()
    first.unlink()
    os.mkfifo(first)
    join = SpawnProcess.join

    def let_the_first_shard_go_on(worker):
        if first.is_fifo():
            first.write_bytes(data)
            first.unlink()
        join(worker)

    monkeypatch.setattr(SpawnProcess, "join", let_the_first_shard_go_on)
    with pytest.raises(UserError, match="train split, row 5"):
        prepare(splits, tmp_path / "copy", source={"dataset_name": folder}, rows_per_shard=4, num_processes=2)
    assert set(files_of(tmp_path / "copy")) <= {"prepare.json", "data/test-00000-of-00001.parquet"}


@pytest.mark.slow
def test_bad_images_are_left_out_and_listed_once(tmp_path, capsys):
    folder = plain_folder(tmp_path / "set", 10, 2, BAD)
    names = [os.path.basename(row["image"]["path"]) for row in load_image_splits(folder).train]
    refusal(folder, tmp_path / "copy")
    result = copy(folder, tmp_path / "copy", on_bad_image="skip")  # a choice that may change on the way
    assert (result["train"]["rows"], result["train"]["skipped"], result["test"]["skipped"]) == (10, 3, 0)
    kept = [names[row] for row in mixed_rows(13) if names[row] not in BAD]
    assert [row["image"]["path"] for row in rows_of(tmp_path / "copy", "train")] == kept
    listed = [json.loads(line) for line in (tmp_path / "copy/bad_images.jsonl").read_text().splitlines()]
    assert [(bad["split"], bad["row"], bad["file"]) for bad in listed] == [("train", names.index(n), n) for n in BAD]
    assert listed[0]["reason"] == "UnidentifiedImageError: cannot identify image file"
    assert all(len(bad["reason"]) > 10 for bad in listed) and "bad_images.jsonl" in capsys.readouterr().err
    whole = files_of(tmp_path / "copy")
    for name in ("checksums.sha256", "bad_images.jsonl", "data/train-00003-of-00004.parquet"):
        (tmp_path / "copy" / name).unlink()
    assert copy(folder, tmp_path / "copy", on_bad_image="skip", num_processes=2) == result
    assert files_of(tmp_path / "copy") == whole


def test_a_file_that_went_away_is_named_without_its_folder_in_the_copy(tmp_path):
    folder = plain_folder(tmp_path / "set", 3, 1)
    splits = load_image_splits(folder)
    (tmp_path / "set/train/a/001.jpg").unlink()
    prepare(splits, tmp_path / "copy", source={"dataset_name": folder}, on_bad_image="skip", num_processes=1)
    assert json.loads((tmp_path / "copy/bad_images.jsonl").read_text()) == {
        "split": "train", "row": 1, "file": "001.jpg", "reason": "FileNotFoundError: No such file or directory"
    }  # fmt: skip


def test_shards_and_splits_without_a_good_image(tmp_path):
    bad = {f"0 bad {number}.jpg": b"no image" for number in range(4)}
    folder = plain_folder(tmp_path / "set", 2, 1, bad)
    copy(folder, tmp_path / "copy", on_bad_image="skip", rows_per_shard=1)
    assert sorted(row["image"]["path"] for row in rows_of(tmp_path / "copy", "train")) == list(many(2))
    assert load_image_splits(str(tmp_path / "copy"), streaming=True, subset=SubsetRule(per_class=1)).train.files
    folder = image_folder(tmp_path / "none", train={"a": many(2), "b": many(1)}, test={"b": bad})
    message = refusal(folder, tmp_path / "empty", on_bad_image="skip")
    assert message == "test split: none of its 4 images decodes; look at --dataset_name"
    assert not (tmp_path / "empty/checksums.sha256").exists()


# ---- the machine ----


class FullDisk(io.FileIO):
    """A file of which 3,000 bytes fit."""

    def write(self, data):
        if self.tell() + len(data) > 3000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_full_disk_is_one_line_and_leaves_no_temporary_file(tmp_path, monkeypatch):
    folder = plain_folder(tmp_path / "set", 10, 1)

    def open_on_full_disk(path, mode="r"):
        return FullDisk(path, "w") if path.name.startswith(".train-00001") else open(path, mode)

    monkeypatch.setattr(shard, "open", open_on_full_disk, raising=False)
    message = refusal(folder, tmp_path / "copy")
    assert message.startswith(f"--output_dir {tmp_path / 'copy'}: the disk is full (")
    assert " MB free, about 0.0 MB more needed); make room, and the same command goes on after the 1" in message
    assert set(files_of(tmp_path / "copy")) == {"prepare.json", "data/train-00000-of-00003.parquet"}
    monkeypatch.undo()
    assert copy(folder, tmp_path / "copy")["train"]["rows"] == 10


@pytest.mark.slow
def test_a_killed_worker_is_one_line(tmp_path):
    folder = plain_folder(tmp_path / "set", 10, 1)

    def kill_one():
        def workers():
            return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]

        until(workers)[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    message = refusal(folder, tmp_path / "copy", num_processes=2)
    killer.join()
    assert message.startswith("a worker process was killed") and not list((tmp_path / "copy").rglob("*.tmp"))


@pytest.mark.slow
def test_a_worker_that_is_killed_while_another_starts_is_one_line(tmp_path, monkeypatch):
    folder, workers, start = plain_folder(tmp_path / "set", 10, 1), [], SpawnProcess.start

    def start_after_the_death_of_the_first(worker):
        if workers:
            workers[0].kill()
            time.sleep(1)  # for a thread that looks after the workers, if there is one
        start(worker)
        workers.append(worker)

    monkeypatch.setattr(SpawnProcess, "start", start_after_the_death_of_the_first)
    assert refusal(folder, tmp_path / "copy", num_processes=2).startswith("a worker process was killed")
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL, 0]


def test_digests_in_the_checksums_are_those_of_the_files(mixed):
    for line in (mixed[0] / "checksums.sha256").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((mixed[0] / name).read_bytes()).hexdigest() == digest


def test_two_at_once_in_one_folder_are_refused(tmp_path):
    from vit_hf.data.copy.prepare import _alone

    with _alone(tmp_path):
        with pytest.raises(UserError, match="another process is writing this copy"), _alone(tmp_path):
            pass
    with _alone(tmp_path):
        pass


def test_two_that_both_found_an_empty_folder_do_not_both_write(tmp_path, monkeypatch):
    """The second one looks while there is nothing yet, and goes on when the first one writes."""
    from vit_hf.data.copy import prepare as preparing

    folder, messages = plain_folder(tmp_path / "set", 5, 1), []
    looked, may_go_on = threading.Event(), threading.Event()
    look, make, writing = preparing.recorded_content, preparing.make_shards, []

    def look_and_wait(output_dir):
        found = look(output_dir)
        if threading.current_thread() is second and not looked.is_set():
            looked.set()
            assert may_go_on.wait(60)
        return found

    def make_and_let_the_second_try(*args):
        writing.append(threading.current_thread())
        if threading.current_thread() is not second:
            may_go_on.set()
            second.join(60)
        return make(*args)

    monkeypatch.setattr(preparing, "recorded_content", look_and_wait)
    monkeypatch.setattr(preparing, "make_shards", make_and_let_the_second_try)
    second = threading.Thread(target=lambda: messages.append(refusal(folder, tmp_path / "copy")))
    second.start()
    assert looked.wait(60)
    copy(folder, tmp_path / "copy")
    assert writing == [threading.current_thread()]
    assert messages == [f"--output_dir {tmp_path / 'copy'}: another process is writing this copy; let it finish"]
    assert not list((tmp_path / "copy").rglob("*.tmp"))


# ---- the order, and the subset of the original ----


def test_a_class_sorted_set_is_mixed_in_its_copy(tmp_path):
    """In any stretch of a batch's length there are many classes, where the source has one or two."""
    label = datasets.ClassLabel(num_classes=20)
    features = datasets.Features({"image": datasets.Image(), "label": label})
    columns = {"image": [{"bytes": SMALL["0 smaller.png"], "path": None}] * 1000, "label": np.repeat(range(20), 50)}
    rows = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": rows, "test": rows.select(range(0, 1000, 50))}).save_to_disk(tmp_path / "set")
    copy(str(tmp_path / "set"), tmp_path / "copy", rows_per_shard=250)
    labels = np.array([row["label"] for row in rows_of(tmp_path / "copy", "train")])
    classes = [len(set(part)) for part in labels.reshape(-1, 40)]
    random = np.mean([len(set(np.random.RandomState(seed).permutation(columns["label"])[:40])) for seed in range(99)])
    assert sorted(labels) == columns["label"].tolist() and min(classes) > 0.7 * random > 10
    assert np.mean(classes) > 0.95 * random
    assert [row["label"] for row in rows_of(tmp_path / "copy", "test")] == list(range(20))
    assert json.loads((tmp_path / "copy/prepare.json").read_text())["row_order_seed"] == 0


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder of three classes in which images come twice, its copy, and a copy of that copy."""
    folder = tmp_path_factory.mktemp("original")
    classes = {
        name: {f"{n:02d}.png": encoded(picture(40 + n // 2, 36 + k), "PNG") for n in range(count)}
        for k, (name, count) in enumerate({"a": 14, "b": 9, "c": 20}.items())
    }
    source = image_folder(folder / "set", train=classes, test={name: dict([*files.items()][:2]) for name, files in classes.items()})  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        copy(source, folder / "copy")
        copy(str(folder / "copy"), folder / "small", shorter_side=16)
    return folder


RULES = [
    SubsetRule(fraction=0.37, seed=5),
    SubsetRule(per_class=3),
    SubsetRule(classes=["c", "a"]),
    SubsetRule(fraction=0.5, classes=["b", "c"], seed=1),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "_".join(rule.describe()))
def test_original_copy_and_stream_choose_the_same_images(original, rule):
    chosen = load_image_splits(str(original / "set"), subset=rule)
    names = sorted("/".join(row["image"]["path"].split("/")[-2:]) for row in chosen.train)
    assert 0 < len(names) < 43 and chosen.subset["train_samples"] == len(names)
    for folder in ("copy", "small"):
        stored = load_image_splits(str(original / folder), subset=rule)
        streamed = load_image_splits(str(original / folder), subset=rule, streaming=True)
        whole = load_image_splits(str(original / folder))
        for found in (stored, streamed):
            assert found.subset == chosen.subset and found.class_names == chosen.class_names, folder
            assert found.notes == [] and len(found.eval) == len(chosen.eval)
        in_copy = [f"{stored.class_names[row['label']]}/{row['image']['path']}" for row in stored.train]
        images, labels = streamed.train.read(np.arange(len(streamed.train)))
        in_stream = [f"{streamed.class_names[label]}/{image['path']}" for image, label in zip(images, labels)]
        assert sorted(in_copy) == sorted(in_stream) == names, folder
        assert len(whole.train) == 43
        _, labels = streamed.eval.read(np.arange(len(streamed.eval)))
        assert labels.tolist() == chosen.eval["label"][:]


def test_a_held_out_tenth_does_not_change_the_subset_of_the_rest(tmp_path):
    folder, rule = image_folder(tmp_path / "set", train={"a": many(20), "b": many(10, 20)}), SubsetRule(fraction=0.5)
    copy(folder, tmp_path / "copy")
    chosen = load_image_splits(folder, subset=rule)
    for streaming in (False, True):
        found = load_image_splits(str(tmp_path / "copy"), subset=rule, streaming=streaming)
        assert found.subset == chosen.subset and len(found.train) == len(chosen.train) == 14


def test_a_stream_of_a_copy_is_evaluated_on_some_classes(original):
    options = dict(subset=SubsetRule(classes=["c"]), streaming=True, need_train=False)
    found = load_image_splits(str(original / "copy"), **options)
    assert (len(found.eval), found.class_names, found.subset) == (2, ["c"], {})
    assert found.eval.read(np.arange(2))[1].tolist() == [0, 0]


def test_a_streamed_subset_of_a_copy_reads_no_image(original, monkeypatch):
    from vit_hf.data.rows.parquet import ParquetRows

    def fail(*args):
        raise AssertionError("images were read")

    monkeypatch.setattr(ParquetRows, "_read_group", fail)
    assert len(load_image_splits(str(original / "copy"), subset=RULES[0], streaming=True).train) == 16


def test_a_subset_that_cannot_be_is_refused_in_a_stream_of_a_copy_too(original):
    for rule in (SubsetRule(per_class=10), SubsetRule(classes=["d"]), SubsetRule(fraction=0.001)):
        said = []
        for options in ({}, {"streaming": True}):
            with pytest.raises(UserError) as error:
                load_image_splits(str(original / "copy"), subset=rule, **options)
            said.append(str(error.value))
        assert said[0] == said[1]


def test_a_copy_of_a_subset_is_counted_by_what_it_holds(original, tmp_path):
    """The same number a class and the same classes change nothing more; a fraction is one of what is left."""
    for rule in (SubsetRule(per_class=4), SubsetRule(classes=["c", "a"])):
        output_dir = tmp_path / "_".join(rule.describe())
        copy(str(original / "set"), output_dir, loading={"subset": rule})
        chosen = load_image_splits(str(original / "set"), subset=rule)
        assert load_image_splits(str(output_dir), subset=rule).subset == chosen.subset
    half = SubsetRule(fraction=0.5)
    copy(str(original / "set"), tmp_path / "half", loading={"subset": half})
    assert load_image_splits(str(tmp_path / "half"), subset=half).subset["train_samples"] == 11  # of 22


def test_a_copy_of_an_earlier_version_loads_and_says_what_it_lacks(original, tmp_path, capsys):
    old = tmp_path / "old"
    shutil.copytree(original / "copy", old)
    for path in old.glob("data/*.parquet"):
        table = pyarrow.parquet.read_table(path, columns=["image", "label"])
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
        metadata = {**features.arrow_schema.metadata, shard.BAD_ROWS: "[]"}
        pyarrow.parquet.write_table(table.cast(features.arrow_schema).replace_schema_metadata(metadata), path)
    recorded = json.loads((old / "prepare.json").read_text())
    del recorded["row_order_seed"]
    (old / "prepare.json").write_text(json.dumps(recorded))
    copy(str(original / "set"), old)
    assert "note: an earlier version made it" in capsys.readouterr().out
    (old / "checksums.sha256").unlink()
    assert "(row_order_seed None then, 0 now)" in refusal(str(original / "set"), old)
    assert load_image_splits(str(old)).notes == []
    for options in ({}, {"streaming": True}):
        loaded = load_image_splits(str(old), subset=RULES[0], **options)
        notes = [note for note in loaded.notes if note.startswith(f"The copy {old} does not say which images")]
        assert len(notes) == 1 and "differ from those of the original" in notes[0]
    with pytest.raises(UserError, match="a copy by `vit-hf data prepare`"):
        load_image_splits(str(old), subset=RULES[1], streaming=True)
