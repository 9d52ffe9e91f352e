"""Kills at seeded random moments, half of them inside a save: every restart goes on, and the last one ends with the weights
of the run that nobody killed, to the bit. Against the scripts' command line alone."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import DEMO_DEFAULTS, ROOT, trajectory, words
from vit_hf.training.tracking import read_jsonl

pytestmark = pytest.mark.slow

DEEPSPEED = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / "ds_configs/zero2.json"),
}
# engine: processes, kills, steps of the run, environment of `accelerate launch`
ENGINES = {"single": (1, 10, 100, {}), "ddp": (2, 5, 60, {}), "zero2": (2, 5, 60, DEEPSPEED)}
SAVE_STEPS = 4
RUN = {
    **DEMO_DEFAULTS, "random_crop": "padding=3", "random_flip": 0.5, "ema_decay": 0.9, "max_train_samples": 100, "save_steps": SAVE_STEPS,
    "eval_steps": 1000, "max_eval_samples": 11, "lr_scheduler_type": "cosine", "ddp_timeout": 60,
}  # fmt: skip
DEADLINE = 120


class Nursery:
    """Starts the processes of a run; see nursery.py."""

    def __init__(self):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
                       "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "tests/faults/nursery.py"], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while (line := self.process.stdout.readline()).strip() != "ready":  # what is imported may print too
            assert line, "the nursery died"

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, folder, log, number, environment, flags):
        """The process ids of a start, as the launcher would make them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        argv = [str(ROOT / "run_pretrain.py"), *words({"output_dir": folder, **flags})]
        started = []
        for rank in range(number):
            environment = {**environment, "ACCELERATE_MIXED_PRECISION": "no"}
            if number > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number),
                                "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
            started.append(self.ask(argv=argv, env=environment, log=str(log)))
        return started

    def wait(self, process, seconds=DEADLINE):
        return self.ask(wait=process, seconds=seconds)


@pytest.fixture(scope="module")
def nursery():
    made = Nursery()
    yield made
    made.process.kill()


def steps_in(folder):
    """Steps that metrics.jsonl tells of; a line may be cut off."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def watch(processes, log, happens):
    """Looks until `happens()`; the run may not end before."""
    deadline = time.monotonic() + DEADLINE
    while not (found := happens()):
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        for process in processes:
            if not os.path.exists(f"/proc/{process}") or ended(process):
                raise AssertionError(f"ended before it was killed: {log.read_text()[-3000:]}")
    return found


def ended(process):
    """Whether a process is dead and waits for its parent to ask."""
    with open(f"/proc/{process}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] == "Z"


def newest(folder):
    found = [
        int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*[0-9]") if (path / "manifest.json").exists()
    ]
    return max(found, default=0)


def unfinished(folder):
    """Names of saves under way, or left by a kill."""
    return {path.name for path in folder.glob("checkpoint-*.tmp")}


def kill_once(processes, folder, log, rng, inside):
    """Kills one process at a moment that `rng` chooses.

    Args:
        inside: in a save; else at any moment after some steps.

    Returns:
        Whether a save was under way.
    """
    watch(processes, log, lambda: not unfinished(folder))  # a start removes what a kill left
    if inside:  # as soon as a save is seen, or within the time that a small one takes
        delay, skipped = rng.choice([0, 0, 0.001, 0.002, 0.005, 0.01]), rng.randrange(2)
        for _ in range(skipped):  # the first save of this start goes through
            watch(processes, log, lambda before=newest(folder): newest(folder) > before)
        watch(processes, log, lambda: unfinished(folder))
    else:
        delay, steps, fewest = rng.uniform(0, 0.05), rng.randrange(1, 10), [steps_in(folder)]

        def walked():  # a resume first cuts lines
            fewest[0] = min(fewest[0], now := steps_in(folder))
            return now >= fewest[0] + steps

        watch(processes, log, walked)
    end = time.perf_counter() + delay
    while time.perf_counter() < end:
        pass
    os.kill(rng.choice(processes), signal.SIGKILL)
    return bool(unfinished(folder))


def complete(nursery, folder, log, number, environment, flags, stopped_for=0.0):
    """Runs to the end; with `stopped_for` the last process is stopped for so long in the middle."""
    processes = nursery.start(folder, log, number, environment, flags)
    if stopped_for:
        before = steps_in(folder)
        watch(processes, log, lambda: before < steps_in(folder))
        os.kill(processes[-1], signal.SIGSTOP)
        time.sleep(stopped_for)  # the fault itself
        os.kill(processes[-1], signal.SIGCONT)
    statuses = [nursery.wait(process) for process in processes]
    assert statuses == [0] * number, log.read_text()[-3000:]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_killed_again_and_again_ends_with_the_weights_of_the_one_that_was_not(engine, nursery, tmp_path):
    number, kills, steps, environment = ENGINES[engine]
    rng, flags = random.Random(f"{engine} 1"), {**RUN, "max_steps": steps}
    whole, folder, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    complete(nursery, whole, tmp_path / "whole.log", number, environment, flags)

    inside = [turn % 2 == 0 for turn in range(kills)]
    rng.shuffle(inside)
    hit = starts = 0
    for turn, in_save in enumerate(inside):
        log.unlink(missing_ok=True)
        before = newest(folder)
        processes = nursery.start(folder, log, number, environment, flags)
        hit += kill_once(processes, folder, log, rng, in_save)
        statuses = [nursery.wait(process) for process in processes]  # the others end by themselves
        assert statuses.count(-signal.SIGKILL) == 1 and 0 not in statuses and None not in statuses, (turn, statuses)
        assert newest(folder) >= before, "a checkpoint was lost"
        resumed = [event for event in read_jsonl(folder / "events.jsonl") if event["event"] == "resume"]
        assert not before or (resumed[-1]["step"], resumed[-1]["exact"]) == (before, True), log.read_text()
        assert len(resumed) == starts + (before > 0)
        starts = len(resumed)
    assert hit >= sum(inside) // 2, "too few kills fell into a save to say anything about them"
    assert 0 < newest(folder) < steps

    complete(nursery, folder, log, number, environment, flags, stopped_for=2.0 if number > 1 else 0.0)
    assert trajectory(folder) == trajectory(whole)
    names = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
    assert len(names) >= 4 and names == sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    for name in names:
        one, other = load_file(whole / name), load_file(folder / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    assert not list(folder.glob("*.tmp")) and not list(folder.glob("*.aside*"))
