"""How fast images come: `vit-hf data bench`, and the line of a run that waits for them."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from tests.runs import DEMO_DEFAULTS, in_process
from vit_hf.cli import dispatch
from vit_hf.commands import data_bench
from vit_hf.data import cache, starved
from vit_hf.data.starved import StarvedNote
from vit_hf.errors import ArgumentError
from vit_hf.training.tracking import Tracker


def test_bench_says_the_way_and_both_rates(monkeypatch, capsys):
    monkeypatch.setattr(data_bench, "SECONDS", 0.0)
    words = ["--config", "recipes/demo/pretrain_glyphs.yaml", "--dataset_name", "digits", "--random_flip", "0.5"]
    dispatch(["data", "bench", *words])
    out = capsys.readouterr().out
    assert "images: decoded once" in out
    assert re.search(r"^loader alone: [\d,]+ images/s$", out, re.M)
    assert re.search(r"^with the augmentation on the c\w+: [\d,]+ images/s$", out, re.M)


def test_bench_gives_the_rate_of_each_worker_where_images_are_decoded_again_and_again(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(data_bench, "SECONDS", 0.0)
    for split in ("train", "test"):
        for label in ("cat", "ship"):
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(6):
                levels = np.random.RandomState(number).randint(0, 256, (60, 80, 3), np.uint8)
                Image.fromarray(levels).save(tmp_path / split / label / f"{number}.jpg")
    words = {"dataset_name": tmp_path, "image_size": 32, "random_crop": "scale=0.08", "dataloader_num_workers": 2}
    words |= {"global_batch_size": 4}
    dispatch(["data", "bench", *(word for name, value in words.items() for word in (f"--{name}", str(value)))])
    out = capsys.readouterr().out
    assert "images: read and decoded batch by batch, 2 workers" in out and "batches of 4 images" in out
    whole, each = re.search(r"^loader alone: ([\d,]+) images/s, ([\d,]+) a worker$", out, re.M).groups()
    assert int(whole.replace(",", "")) == pytest.approx(2 * int(each.replace(",", "")), abs=2)


def test_bench_wants_a_set():
    with pytest.raises(ArgumentError, match="--dataset_name is missing"):
        dispatch(["data", "bench"])


def note_of(windows, monkeypatch, num_workers=16, num_processes=1):
    monkeypatch.setattr(starved, "usable_cores", lambda: 32)
    said, events = [], []
    note = StarvedNote(num_workers, num_processes, said.append, lambda event, **fields: events.append((event, fields)))
    for rate, share in windows:
        note.look(rate, share)
    return said, events


def test_a_run_that_waits_says_so_once_with_its_figures(monkeypatch):
    """The first window, in which the workers start, tells nothing."""
    said, events = note_of([(100.0, 0.9), (6100.0, 0.1), (6012.3, 0.43), (5000.0, 0.5)], monkeypatch)
    ((event, fields),) = events
    assert event == "starved" and fields["num_workers"] == 16 and fields["cores"] == 32
    assert fields["images_per_second"] == 6012.3 and fields["data_wait_fraction"] == 0.43
    (line,) = said
    assert line.startswith("note: 16 workers give about 6,012 images/s, for which training waits 43% of its time")
    assert "--dataloader_num_workers, 32 cores here" in line and "vit-hf data prepare" in line
    (line,), _ = note_of([(1.0, 0.0), (48_000.0, 0.3)], monkeypatch, num_processes=8)
    assert line.startswith("note: 16 workers in each of 8 processes give about 48,000 images/s")


def test_a_run_that_does_not_wait_or_decodes_nothing_says_nothing(monkeypatch):
    assert note_of([(100.0, 0.9), (6000.0, 0.2), (6000.0, 0.0)], monkeypatch) == ([], [])
    assert note_of([(100.0, 0.9), (6000.0, 0.8)], monkeypatch, num_workers=None) == ([], [])


@pytest.mark.parametrize("again", [True, False])
def test_the_note_is_wired_into_training(again, monkeypatch, tmp_path, capsys):
    """For images that are decoded again and again; never for a set that is decoded once."""
    if again:
        monkeypatch.setattr(cache, "DECODED_BYTES", 0)
    monkeypatch.setattr(Tracker, "window", lambda *_: {"images_per_second": 1234.0, "data_wait_fraction": 0.5})
    flags = {**DEMO_DEFAULTS, "max_steps": 4, "dataloader_num_workers": 0, "max_eval_samples": 20}
    in_process("pretrain", output_dir=tmp_path, **flags)
    path = tmp_path / "events.jsonl"
    events = [json.loads(line)["event"] for line in path.read_text().splitlines()] if path.exists() else []
    assert events.count("starved") == again
    assert capsys.readouterr().out.count("decoding without workers gives about 1,234 images/s") == again
