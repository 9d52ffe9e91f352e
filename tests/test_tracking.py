"""What a run leaves behind while it goes, and what a resumed run makes of it."""

import json
from types import SimpleNamespace

import pytest
import torch

from vit_hf.training import tracking
from vit_hf.training.tracking import Tracker, append_event, peak_flops, peak_memory_bytes, read_jsonl


@pytest.fixture
def trackers():
    """Makes trackers for a folder; what they sent to accelerate's trackers is in `sent`."""
    made = []

    def make(folder, steps_done=0, main=True):
        sent = []
        accelerator = SimpleNamespace(is_main_process=main, log=lambda values, step: sent.append((step, values)))
        tracker = Tracker(accelerator, folder, steps_done, total_steps=10)
        tracker.sent = sent
        made.append(tracker)
        return tracker

    yield make
    for tracker in made:
        tracker.close()


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is moved: clock(2.5)."""
    now = [100.0]
    monkeypatch.setattr(tracking.time, "perf_counter", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    return move


def steps_in(folder) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_line_is_on_disk_as_soon_as_it_is_written(tmp_path, trackers):
    tracker = trackers(tmp_path)
    tracker.write({"step": 1, "loss": 0.5, "note": "text"})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5, "note": "text"}]
    tracker.write({"step": 2, "loss": 0.25})
    assert steps_in(tmp_path) == [1, 2]
    assert tracker.sent == [(1, {"loss": 0.5}), (2, {"loss": 0.25})]  # numbers only, under their step


def test_resume_cuts_what_comes_after_the_checkpoint(tmp_path, trackers):
    first = trackers(tmp_path)
    lines = [
        {"step": 2, "loss": 1.0},
        {"step": 4, "loss": 0.9},
        {"step": 4, "eval_loss": 0.8},
        {"step": 6, "loss": 0.7},
    ]
    for line in lines:
        first.write(line)
    first.close()
    resumed = trackers(tmp_path, steps_done=4)
    assert read_jsonl(tmp_path / "metrics.jsonl") == lines[:3]
    resumed.write({"step": 6, "loss": 0.7})
    assert steps_in(tmp_path) == [2, 4, 4, 6]  # never doubled
    assert not list(tmp_path.glob("*.tmp"))


def test_a_new_run_starts_with_an_empty_file(tmp_path, trackers):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n')
    trackers(tmp_path, steps_done=0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("rest", ['{"step": 4, "lo', '{"step": 4, "loss": 0.', '{"step"'])
def test_a_last_line_cut_off_by_a_kill_is_dropped(tmp_path, trackers, rest):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 1.0}\n' + rest)
    assert read_jsonl(path) == [{"step": 2, "loss": 1.0}]
    trackers(tmp_path, steps_done=4).write({"step": 5, "loss": 0.5})
    assert steps_in(tmp_path) == [2, 5]  # the half line does not spoil the next one


def test_no_file_has_no_lines(tmp_path):
    assert read_jsonl(tmp_path / "nowhere.jsonl") == []


def test_other_processes_write_nothing(tmp_path, trackers):
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    tracker = trackers(tmp_path, main=False)
    tracker.write({"step": 1, "loss": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 9}\n' and tracker.sent == []


def test_throughput_counts_training_time_alone(tmp_path, trackers, clock):
    """10 s since the last line, 4 of them evaluation, 1.5 waiting: 600 images in 6 s."""
    tracker = trackers(tmp_path)
    clock(3)
    with tracker.pause():
        clock(4)
    tracker.add_wait(1.0)
    tracker.add_wait(0.5)
    clock(3)
    assert tracker.window(600) == pytest.approx({"images_per_second": 100.0, "data_wait_fraction": 0.25})
    clock(2)  # and the next window starts anew
    assert tracker.window(600) == pytest.approx({"images_per_second": 300.0, "data_wait_fraction": 0.0})


def test_events_are_added_line_by_line(tmp_path):
    append_event(tmp_path, "signal", signal="SIGTERM", step=7)
    append_event(tmp_path, "resume", step=7, exact=True)
    events = read_jsonl(tmp_path / "events.jsonl")
    assert [(event["event"], event["step"]) for event in events] == [("signal", 7), ("resume", 7)]
    assert events[0]["signal"] == "SIGTERM" and events[1]["exact"] is True and "time" in events[0]


def test_peak_memory_covers_what_was_taken():
    held = torch.ones(2**25)  # 128 MiB
    assert peak_memory_bytes(torch.device("cpu")) > held.nbytes
    assert peak_memory_bytes(torch.device("cpu")) < 2**40  # bytes, not kilobytes of kilobytes


def test_peak_is_known_by_the_devices_name_and_for_16_bits_alone():
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12 and peak_flops("NVIDIA H200", "fp16") == 989e12
    assert peak_flops("NVIDIA L4", "bf16") == 121e12 != peak_flops("NVIDIA L40S", "bf16")
    assert peak_flops("NVIDIA A100-SXM4-80GB", "no") is None and peak_flops("GeForce GTX 970", "bf16") is None
