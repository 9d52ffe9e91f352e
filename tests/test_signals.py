"""Signals, and processes that are lost: real processes, over gloo. tests/distributed/test_machines.py has the launchers."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.runs import ROOT, python


@pytest.fixture(scope="module")
def ends():
    """{scenario: how each process ended}"""
    done = python(ROOT / "tests/distributed/endings.py", timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def stopped_at(end):
    (line,) = end["err"].splitlines()
    return int(line.split("checkpoint-")[1].split(";")[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "number"), [("term", 15), ("usr1", 10), ("ahead", 15), ("behind", 15), ("two signals", None)]
)
def test_a_signal_to_one_process_stops_all_after_the_same_step(scenario, number, ends):
    """Also where they do not meet in a step, and one is fast, the other slow; the first of two signals is obeyed by all."""
    main, other = ends[scenario]
    assert main["status"] == other["status"] and main["status"] in ([128 + number] if number else [143, 138])
    assert stopped_at(main) == stopped_at(other) >= 30
    assert stopped_at(main) < 4000


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["over", "last"])
def test_a_signal_at_the_end_is_the_ordinary_end(scenario, ends):
    """At the last step, and to a process when another one's loop is over: nobody waits for an answer."""
    assert ends[scenario] == [{"status": 0, "err": ""}] * 2


SILENT = "{} gave no sign of life for {} s: killed, stopped, or on a machine that is gone; the same command goes on from the newest checkpoint"  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "seconds"),
    [("killed", 1), ("stopped long", 4), ("hangs", 4)],
    ids=["killed", "stopped long", "hangs"],
)
def test_the_line_names_the_process_that_is_gone(scenario, seconds, ends):
    """One that was killed, at once; one that was stopped for longer than the time-out; and one that was killed while
    the other hangs in a call that raises nothing, as NCCL's do."""
    main, other = ends[scenario]
    assert main == {"status": 1, "err": f"error: {SILENT.format('process 1', seconds)}\n"}
    assert other["status"] == (1 if scenario == "stopped long" else -9)


@pytest.mark.slow
def test_the_store_is_gone_with_the_main_process(ends):
    main, other = ends["main killed"]
    assert main["status"] == -9 and other["status"] == 1
    assert other["err"].startswith("[rank 1] error: the store of the process group is gone, with process 0 or")


@pytest.mark.slow
def test_a_process_that_ends_alone_says_why_on_the_others(ends):
    main, other = ends["words"]
    assert other == {"status": 1, "err": "[rank 1] error: --flag: is wrong\n"}
    assert main == {"status": 1, "err": "error: process 1 ended: --flag: is wrong\n"}


@pytest.mark.slow
def test_a_process_that_is_stopped_for_a_while_ends_nothing(ends):
    assert ends["stopped"] == [{"status": 0, "err": ""}] * 2


@pytest.mark.slow
def test_a_launcher_that_ends_a_hanging_process_gets_a_line(ends):
    main, _ = ends["hangs, terminated"]
    line = "error: process 1 did not answer for 3 s when the run was to stop for SIGTERM\n"
    assert main == {"status": 1, "err": line}


ALONE = """
import os, signal, sys, accelerate
from vit_hf.errors import exit_with
from vit_hf.training.signals import SignalGuard, StoppedBySignal
def run():
    guard = SignalGuard(accelerate.Accelerator(cpu=True), 10)
    for step in range(1, 11):
        if step == int(sys.argv[1]):
            for number in sys.argv[2:]:
                os.kill(os.getpid(), int(number))
        if guard.stop_asked(step):
            raise StoppedBySignal(guard.number, step)
    guard.release()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
exit_with(run)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_one_process_stops_after_the_step_at_hand(number):
    done = python("-c", ALONE, 3, int(number))
    assert done.returncode == 128 + number
    assert f"error: stopped by {number.name} after checkpoint-3; the same command goes on" in done.stderr


def test_at_the_last_step_a_signal_changes_nothing():
    assert python("-c", ALONE, 10, 15).returncode == 0


def test_a_second_ctrl_c_stops_at_once():
    done = python("-c", ALONE, 3, 2, 2)
    assert done.returncode == 130 and "stopped by" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_workers_leave_the_signals_of_the_group_to_their_parent(number):
    """A worker that dies of one would take along the batches that the last step still needs."""
    code = (
        "import os, signal\nfrom vit_hf.data.workers import set_up_worker\n"
        f"set_up_worker(0)\nos.kill(os.getpid(), {int(number)})\nprint('lives')"
    )
    worker = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert worker.stdout == "lives\n", worker.stderr
