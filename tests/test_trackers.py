"""Trackers that are down, and trackers of a run that is resumed: accelerate's own, and tensorboard's real files."""

import json

import accelerate
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.test_tracking import Recorder
from vit_hf.training.trackers import _run_of, open_trackers
from vit_hf.training.tracking import Tracker, read_jsonl

PICTURE = {"figures/one": np.zeros((4, 6, 3), np.uint8)}


def opened(folder, *log_with, run_name="my run", config=None, first_step=0):
    """A run's tracker over accelerate's, which are in its `accelerator`."""
    accelerator = accelerate.Accelerator(cpu=True, log_with=list(log_with), project_dir=str(folder))
    open_trackers(accelerator, folder, run_name, config or {}, first_step)
    tracker = Tracker(accelerator, folder, first_step, total_steps=10)
    tracker.accelerator = accelerator
    return tracker


def course(tracker, steps):
    """Writes a line for each step, then ends as a run does."""
    for step in steps:
        tracker.write({"step": step, "loss": 1 / step})
    tracker.write_images(PICTURE, step)
    tracker.close()
    tracker.accelerator.end_training()


def down(folder):
    return [
        (event["tracker"], event["when"])
        for event in read_jsonl(folder / "events.jsonl")
        if event["event"] == "tracker_down"
    ]


def test_a_tracker_gets_numbers_pictures_flags_and_its_end(tmp_path):
    recorder = Recorder()
    course(opened(tmp_path, recorder, config={"seed": 1, "preset": None, "betas": (0.9, 0.95)}), [1, 2])
    assert recorder.config == {"seed": 1, "betas": "(0.9, 0.95)"}
    assert recorder.sent == [(1, {"loss": 1.0}), (2, {"loss": 0.5})] and recorder.finished
    assert recorder.images == [(2, {"figures/one": (1, 4, 6, 3)})]


@pytest.mark.parametrize(
    ("fails_at", "when", "sent"),
    [
        (["start", "step 1"], "its start", []),
        (["step 2", "step 3", "end"], "step 2", [1]),
        (["images 3", "end"], "step 3", [1, 2, 3]),
        (["end"], "its end", [1, 2, 3]),
    ],
)
def test_a_tracker_that_is_down_is_one_warning_and_one_event(tmp_path, capfd, fails_at, when, sent):
    broken, whole = Recorder(fails_at), Recorder()
    course(opened(tmp_path, broken, whole), [1, 2, 3])
    assert down(tmp_path) == [("recorder", when)]
    (warning,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning")]
    assert f"the tracker recorder is down at {when} (ConnectionError: no route to the server" in warning
    assert [step for step, _ in broken.sent] == sent and not broken.finished
    assert [step for step, _ in whole.sent] == [1, 2, 3] and whole.finished  # the other one does not suffer
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_folder_that_tensorboard_cannot_write_to_ends_no_run(tmp_path, capfd):
    (tmp_path / "runs").write_text("a file where tensorboard wants its folder")
    course(opened(tmp_path, "tensorboard"), [1, 2])
    assert down(tmp_path) == [("tensorboard", "its start")]
    assert capfd.readouterr().err.count("the tracker tensorboard is down at its start") == 1
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]
    assert read_jsonl(tmp_path / "trackers.json") == [{}]


def test_a_resumed_run_goes_on_in_the_same_tensorboard_run(tmp_path):
    course(opened(tmp_path, "tensorboard", run_name="first"), [1, 2, 3, 4])
    course(opened(tmp_path, "tensorboard", run_name="renamed", first_step=2), [3, 4, 5])
    folder = tmp_path / "runs" / "first"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["first"]
    log = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert [event.step for event in log.Scalars("loss")] == [1, 2, 3, 4, 5]  # not 3 and 4 twice
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"tensorboard": {"folder": "runs/first"}}


def test_a_name_with_a_slash_stays_in_the_folder(tmp_path):
    course(opened(tmp_path, "tensorboard", run_name="/a/../b"), [1])
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["-a-..-b"]


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"tensorboard": 3}', '{"tensorboard": {"folder": null}}'])
def test_a_record_that_cannot_be_read_begins_a_new_tracker_run(tmp_path, content):
    (tmp_path / "trackers.json").write_text(content)
    course(opened(tmp_path, "tensorboard", run_name="anew"), [1])
    assert (tmp_path / "runs" / "anew").is_dir() and not down(tmp_path)


def test_a_record_that_cannot_be_written_ends_no_run(tmp_path, capfd):
    (tmp_path / "trackers.json.tmp").mkdir()
    course(opened(tmp_path, "tensorboard", run_name="anew"), [1])
    assert "trackers.json cannot be written" in capfd.readouterr().err and (tmp_path / "runs" / "anew").is_dir()


def test_wandb_goes_on_by_its_id():
    """What accelerate hands to wandb.init; the packages themselves need not be here."""
    project, options, own = _run_of("wandb", "my run", {}, 0)
    assert project == "vit_hf" and options == {"id": own["id"], "resume": "allow", "name": "my run"}
    assert len(own["id"]) == 8 and own["id"] != _run_of("wandb", "my run", {}, 0)[2]["id"]
    assert _run_of("wandb", "renamed", own, 4) == ("vit_hf", {**options, "name": "renamed"}, own)


def test_trackio_goes_on_by_its_name():
    """A new run takes over nobody's name; trackio then gives it another one, which is kept."""
    _, options, own = _run_of("trackio", "my run", {}, 0)
    assert options == {"name": "my run", "resume": "never"} and own == {"name": "my run"}
    _, options, _ = _run_of("trackio", "renamed", {"name": "given by trackio"}, 4)
    assert options == {"name": "given by trackio", "resume": "allow"}
