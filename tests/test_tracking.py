"""What a run leaves behind while it goes, and what a resumed run makes of it."""

import io
import json
import resource
import signal
import sys

import accelerate
import pytest
import torch
from accelerate.state import PartialState
from accelerate.tracking import GeneralTracker

from vit_hf.training import tracking
from vit_hf.training.trackers import open_trackers
from vit_hf.training.tracking import Tracker, append_event, peak_flops, peak_memory_bytes, read_jsonl


class Recorder(GeneralTracker):
    """A tracker of accelerate that keeps what it is sent, until its server goes down."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self, fails_at=()):
        super().__init__()
        self.fails_at, self.sent, self.images, self.config, self.finished = fails_at, [], [], {}, False

    def _reach(self, what):
        if what in self.fails_at:
            raise ConnectionError(f"no route to\nthe server for {what}")

    @property
    def tracker(self):
        return self

    def start(self):
        self._reach("start")

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None):
        self._reach(f"step {step}")
        self.sent.append((step, values))

    def log_images(self, values, step=None):
        self._reach(f"images {step}")
        self.images.append((step, {name: image.shape for name, image in values.items()}))

    def finish(self):
        self._reach("end")
        self.finished = True


@pytest.fixture
def trackers():
    """Makes trackers for a folder; what they sent to accelerate's trackers is in `sent`."""
    made = []

    def make(folder, steps_done=0):
        recorder = Recorder()
        accelerator = accelerate.Accelerator(cpu=True, log_with=[recorder])
        open_trackers(accelerator, folder, "run", {})
        tracker = Tracker(accelerator, folder, steps_done, total_steps=10)
        tracker.sent = recorder.sent
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


def test_what_comes_after_a_line_cut_off_is_read(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "first"}\n{"event": "sec{"event": "third"}\n{"event": "fourth"}\n')
    assert [event["event"] for event in read_jsonl(path)] == ["first", "fourth"]


def test_no_file_has_no_lines(tmp_path):
    assert read_jsonl(tmp_path / "nowhere.jsonl") == []


def test_other_processes_write_nothing(tmp_path, trackers, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    PartialState()
    monkeypatch.setitem(PartialState._shared_state, "process_index", 1)
    tracker = trackers(tmp_path)
    tracker.write({"step": 1, "loss": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 9}\n' and tracker.sent == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


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


LOGGED = {"loss": 1.23456, "learning_rate": 1e-3, "grad_norm": 2.0, "images_per_second": 1234.5}


def test_a_file_gets_a_line_for_each_of_the_log_and_no_bar(tmp_path, trackers, clock, capfd):
    tracker = trackers(tmp_path, steps_done=2)
    for _ in range(2):
        clock(15)
        tracker.step()
    tracker.write({"step": 4, **LOGGED})
    tracker.write({"step": 4, "eval_loss": 0.5, "eval_accuracy": 0.875})
    clock(60)
    tracker.write({"step": 10, **LOGGED, "loss": float("nan")})
    tracker.write({"step": 10, "note": "nothing that is told"})
    tracker.close()
    assert capfd.readouterr().err.splitlines() == [
        "step 4 of 10: loss 1.235, learning rate 0.001, 1,234 images/s, 1 min 30 s left",
        "step 4 of 10: evaluation loss 0.5, evaluation accuracy 0.8750",
        "step 10 of 10: loss nan, learning rate 0.001, 1,234 images/s",
    ]


def test_a_terminal_gets_the_bar(tmp_path, trackers, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    tracker = trackers(tmp_path)
    tracker.step()
    tracker.write({"step": 1, **LOGGED})
    tracker.close()
    assert "| 1/10 [" in terminal.getvalue() and "loss=1.235" in terminal.getvalue()
    assert "step 1 of 10" not in terminal.getvalue()


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


# --- a disk that is full ---

LONG = "x" * 2**20


@pytest.fixture
def disk():
    """disk(n): files cannot grow beyond so many bytes; disk(None): as before. Too many for what pytest itself writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield limit
    limit(None)
    signal.signal(signal.SIGXFSZ, handler)


def test_lines_that_a_full_disk_does_not_take_are_written_later(tmp_path, trackers, disk, capfd):
    tracker = trackers(tmp_path)
    tracker.write({"step": 1, "loss": 0.5, "note": LONG})
    disk((tmp_path / "metrics.jsonl").stat().st_size + 5)  # the next line would go in by a part
    tracker.write({"step": 2, "loss": 0.25})
    tracker.write({"step": 3, "loss": 0.125})
    assert steps_in(tmp_path) == [1]
    disk(None)
    tracker.write({"step": 4, "loss": 0.0625})
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    assert capfd.readouterr().err.count("metrics.jsonl cannot be written (File too large)") == 1
    assert [step for step, _ in tracker.sent] == [1, 2, 3, 4]


def test_an_event_that_a_full_disk_does_not_take_ends_no_run(tmp_path, disk, capfd):
    append_event(tmp_path, "first", note=LONG)
    disk((tmp_path / "events.jsonl").stat().st_size + 5)
    append_event(tmp_path, "save_failed", step=2)
    disk(None)
    append_event(tmp_path, "third", step=3)
    assert [event["event"] for event in read_jsonl(tmp_path / "events.jsonl")] == ["first", "third"]
    assert "events.jsonl cannot be written" in (said := capfd.readouterr().err) and '"save_failed"' in said
