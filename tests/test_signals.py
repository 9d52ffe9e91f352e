"""Signals, and processes that are lost: real processes, over gloo. tests/distributed/test_machines.py has the launchers."""

import json
import signal

import pytest

from tests.runs import ROOT, python

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ends():
    """{scenario: how each process ended}"""
    done = python(ROOT / "tests/distributed/endings.py", timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def stopped_at(end):
    (line,) = end["err"].splitlines()
    return int(line.split("checkpoint-")[1].split(";")[0])


@pytest.mark.parametrize(
    ("scenario", "number"), [("term", 15), ("usr1", 10), ("ahead", 15), ("behind", 15), ("two signals", None)]
)
def test_a_signal_to_one_process_stops_all_after_the_same_step(scenario, number, ends):
    """Also where they do not meet in a step, and one is fast, the other slow; the first of two signals is obeyed by all."""
    main, other = ends[scenario]
    assert main["status"] == other["status"] and main["status"] in ([128 + number] if number else [143, 138])
    assert stopped_at(main) == stopped_at(other) >= 30
    assert stopped_at(main) < 4000


@pytest.mark.parametrize("scenario", ["over", "last"])
def test_a_signal_at_the_end_is_the_ordinary_end(scenario, ends):
    """At the last step, and to a process when another one's loop is over: nobody waits for an answer."""
    assert ends[scenario] == [{"status": 0, "err": ""}] * 2


SILENT = "{} gave no sign of life for {} s: killed, stopped, or on a machine that is gone; the same command goes on from the newest checkpoint"  # fmt: skip


@pytest.mark.parametrize(
    ("scenario", "seconds"),
    [("killed", 1), ("killed in a save", 1), ("stopped long", 4), ("hangs", 4)],
    ids=["killed", "killed in a save", "stopped long", "hangs"],
)
def test_the_line_names_the_process_that_is_gone(scenario, seconds, ends):
    """One that was killed, at once, also where the main process waits for its part of a checkpoint (the time-out is a
    minute); one that was stopped for longer than the time-out; and one that was killed while
    the other hangs in a call that raises nothing, as NCCL's do."""
    main, other = ends[scenario]
    assert main == {"status": 1, "err": f"error: {SILENT.format('process 1', seconds)}\n"}
    assert other["status"] == (1 if scenario == "stopped long" else -9)


def test_the_store_is_gone_with_the_main_process(ends):
    main, other = ends["main killed"]
    assert main["status"] == -9 and other["status"] == 1
    assert other["err"].startswith("[rank 1] error: the store of the process group is gone, with process 0 or")


def test_a_process_that_ends_alone_says_why_on_the_others(ends):
    main, other = ends["words"]
    assert other == {"status": 1, "err": "[rank 1] error: --flag: is wrong\n"}
    assert main == {"status": 1, "err": "error: process 1 ended: --flag: is wrong\n"}


def test_a_process_that_is_stopped_for_a_while_ends_nothing(ends):
    assert ends["stopped"] == [{"status": 0, "err": ""}] * 2


def test_a_launcher_that_ends_a_hanging_process_gets_a_line(ends):
    main, _ = ends["hangs, terminated"]
    line = "error: process 1 did not answer for 5 s when the run was to stop for SIGTERM\n"
    assert main == {"status": 1, "err": line}


@pytest.mark.parametrize(
    ("scenario", "name"), [("alone, term", "SIGTERM"), ("alone, usr1", "SIGUSR1"), ("alone, int", "SIGINT")]
)
def test_one_process_stops_after_the_step_at_hand(scenario, name, ends):
    (end,) = ends[scenario]
    assert end["status"] == 128 + signal.Signals[name]
    assert f"error: stopped by {name} after checkpoint-3; the same command goes on" in end["err"]


def test_one_process_at_its_last_step_goes_on(ends):
    assert ends["alone, last"] == [{"status": 0, "err": ""}]


def test_a_second_ctrl_c_stops_at_once(ends):
    (end,) = ends["alone, int twice"]
    assert end["status"] == 130 and "stopped by" not in end["err"]


def test_workers_leave_the_signals_of_the_group_to_their_parent():
    """A worker that dies of one would take along the batches that the last step still needs."""
    code = (
        "import os, signal\nfrom vit_hf.data.workers import set_up_worker\nset_up_worker(0)\n"
        "for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):\n    os.kill(os.getpid(), number)\nprint('lives')"
    )
    worker = python("-c", code)
    assert worker.stdout == "lives\n", worker.stderr
