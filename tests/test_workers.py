"""Worker processes: shared memory that is small or full, and workers that die or fall silent."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from tests.runs import ROOT
from vit_hf.data import device, feed, machine
from vit_hf.data.batches import ImageBatches
from vit_hf.data.device import DeviceBatches
from vit_hf.data.faults import Faults
from vit_hf.data.feed import LoadingSettings, eval_batches, train_batches
from vit_hf.data.order import EvalOrder, StepPlan
from vit_hf.data.preprocessing import Preprocessing
from vit_hf.data.processes import Processes
from vit_hf.errors import UserError

CPU = torch.device("cpu")


class Rows:
    """Images whose grey level is their index; `before` is called in the worker that reads them."""

    def __init__(self, size=224, before=lambda index: None):
        self.retried, self.size, self.before = [], size, before

    def __len__(self):
        return 200

    def read(self, index):
        self.before(index)
        return [np.full((self.size, self.size, 3), row, np.uint8) for row in index], np.asarray(index)


def loader_of(rows, batch_size=32, workers=2, **options):
    order = EvalOrder(num_samples=len(rows), num_processes=1, rank=0, batch_size=batch_size, num_workers=workers)
    return DeviceBatches(
        ImageBatches(rows, Preprocessing((rows.size, rows.size))), order, CPU, workers, Faults(), **options
    )


def are_right(loader):
    """Whether all images come, each with its level."""
    seen = []
    for batch in loader:
        index = batch["index"][batch["valid"]]
        assert (batch["pixel_values"][batch["valid"]] == index[:, None, None, None]).all()
        seen += index.tolist()
    return sorted(seen) == list(range(200))


# --- shared memory ---

# what the other side of a small /dev/shm sees; a hang is a failure by the time limit of `in_small_memory`
START = """
import os
from tests.test_workers import *
torch.set_num_threads(1)
loader = loader_of(Rows())
"""


def in_small_memory(code, before="true", seconds=60):
    """Runs Python where /dev/shm is a file system of 16 MB of its own."""
    mount = "mount -t tmpfs -o size=16m tmpfs /dev/shm"
    tried = subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"this system lets us mount no file system: {tried.stderr.strip()}")
    words = ["unshare", "-m", "sh", "-c", f'{mount} && {before}; exec "$0" -c "$1"', sys.executable, START + code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=ROOT, env=environment, timeout=seconds, capture_output=True, text=True)


@pytest.mark.slow
def test_shared_memory_that_is_too_small_loses_no_batch():
    """Batches of 4.8 MB, up to six at once, in 16 MB; and none of what did not fit is left behind."""
    done = in_small_memory("print(are_right(loader)); loader.close(); print(os.listdir('/dev/shm'))")
    assert done.stdout.splitlines() == ["True", "[]"] and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
def test_no_shared_memory_at_all_is_one_line_with_both_figures():
    code = """
loader.needed_bytes = 28_901_376
try:
    next(iter(loader))
except UserError as error:
    print(error)
"""
    done = in_small_memory(code, before="head -c 20000000 /dev/zero > /dev/shm/full 2> /dev/null")
    (line,) = done.stdout.splitlines()
    assert "shared memory: 28.9 MB" in line and "0.0 MB of shared memory are free in /dev/shm" in line
    assert "--shm-size" in line and "--dataloader_num_workers 0" in line


@pytest.mark.parametrize("shared", [True, False])
def test_batches_are_the_same_through_shared_memory_and_through_a_pipe(shared):
    loader = loader_of(Rows(), shared=shared)
    batch = next(iter(loader))
    assert batch["pixel_values"].is_shared() == shared and not batch["labels"].is_shared()
    assert are_right(loader)
    loader.close()


def test_what_does_not_fit_is_said_with_both_figures_and_goes_through_a_pipe(monkeypatch):
    """Training takes 10 x 3 x 40 x 40 bytes x (2 a worker + 2) = 288 kB and fits; evaluation as much beside it does not."""
    monkeypatch.setattr(device, "_OPEN", type(device._OPEN)())  # of this test alone
    free = [600_000]
    monkeypatch.setattr(feed, "shared_memory_free", lambda: free[0])
    settings = LoadingSettings(dataloader_num_workers=2, per_device_eval_batch_size=10, decoded_cache="never")
    faults, said = Faults(), []
    plan = StepPlan(0, 0, 3, num_processes=2, rank=0, micro_batch_size=10, accumulation=1)

    def loaders():
        rows, preprocessing = Rows(40), Preprocessing((40, 40))
        said.clear()
        train, _ = train_batches(rows, preprocessing, plan, Processes(CPU, say=said.append), settings, faults)
        processes = Processes(CPU, num_processes=2, say=said.append)
        evaluation = eval_batches(rows, preprocessing, processes, settings, faults)
        device._OPEN.clear()
        return train.shared, evaluation.shared

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert loaders() == (True, True)
    assert not [line for line in said if line.startswith("note")]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert loaders() == (True, False)
    (note,) = [line for line in said if line.startswith("note")]
    assert (
        "evaluation images take up to 0.3 MB of shared memory in each of 2 processes" in note
        and "0.6 MB are free in /dev/shm" in note
    )
    free[0] = 10_000
    assert loaders() == (False, False)
    assert len([line for line in said if line.startswith("note")]) == 2
    free[0] = None  # a system without /dev/shm
    assert loaders() == (True, True)


def test_the_need_is_counted_for_what_is_ahead_and_what_is_at_hand():
    assert machine.shared_memory_needed(1000, 16) == 34_000 and machine.shared_memory_needed(1000, 0) == 0
    free = machine.shared_memory_free()
    assert free is None or free >= 0


# --- workers that die or fall silent ---


@pytest.mark.parametrize(
    "number, line",
    [
        (signal.SIGBUS, "bus error: shared memory that is full.*--shm-size"),
        (signal.SIGKILL, "killed, as a system does that is out of memory"),
        (signal.SIGSEGV, "was ended by SIGSEGV; --dataloader_num_workers 0"),
    ],
)
def test_a_worker_that_dies_is_a_line_that_says_of_what_wherever_the_run_is(number, line):
    """The news comes in the midst of a step, not only where a batch is taken."""
    loader = loader_of(Rows(20))
    batches = iter(loader)
    next(batches)
    worker = loader.loader._iterator._workers[0]
    deadline = time.monotonic() + 60
    with pytest.raises(UserError, match=line) as caught:
        os.kill(worker.pid, number)
        while time.monotonic() < deadline:
            pass
    assert "\n" not in str(caught.value) and (number == signal.SIGKILL) == ("out of memory" in str(caught.value))
    loader.close()


def test_a_worker_that_leaves_is_a_line_with_its_status():
    loader = loader_of(Rows(20, before=lambda index: os._exit(3)))
    with pytest.raises(UserError, match="ended with exit status 3"):
        list(loader)
    loader.close()


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_worker_that_falls_silent_ends_the_run_in_a_line(monkeypatch, ahead):
    """As one does whose storage does not answer."""
    monkeypatch.setattr(device, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(device, "ASKING_SECONDS", 0.1)
    loader = loader_of(Rows(20, before=lambda index: threading.Event().wait()), ahead=ahead)
    with pytest.raises(
        UserError, match="no worker process has brought images for .* seconds.*shared memory"
    ) as caught:
        list(loader)
    assert "\n" not in str(caught.value)
    loader.close()
