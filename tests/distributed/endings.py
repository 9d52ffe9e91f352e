"""Two processes that train, forked from one that has loaded everything, of which one is signalled, stopped or killed:
prints, as JSON, how each ended.

python tests/distributed/endings.py
"""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from vit_hf.errors import UserError, exit_with
from vit_hf.training import lost, signals
from vit_hf.training.accelerator import build_accelerator
from vit_hf.training.shared_folder import Answers, SaveFailed

lost.BEAT_SECONDS, lost.LOOK_SECONDS, lost.LEAVE_SECONDS, lost.QUIET_SECONDS = 0.2, 1.0, 1.0, 2.0
signals.ANSWER_SECONDS, signals.LEAVE_SECONDS, signals.POLL_SECONDS = 5.0, 1.0, 0.05
WORLD, STEPS, AT = 2, 4000, 30
# {name: (rank of the process to which something happens, whether the processes meet in each step)}
SCENARIOS = {
    "term": (1, True),
    "usr1": (1, True),
    "two signals": (0, True),
    "ahead": (0, False),
    "behind": (1, False),
    "over": (0, False),
    "last": (1, True),
    "killed": (1, True),
    "main killed": (0, True),
    "killed in a save": (1, True),
    "words": (1, True),
    "stopped": (1, True),
    "stopped long": (1, True),
    "hangs": (1, False),
    "hangs, terminated": (1, False),
}
ALONE = {  # what comes to a process that is alone, and after which of ten steps
    "alone, term": (3, [signal.SIGTERM]),
    "alone, usr1": (3, [signal.SIGUSR1]),
    "alone, int": (3, [signal.SIGINT]),
    "alone, int twice": (3, [signal.SIGINT, signal.SIGINT]),
    "alone, last": (10, [signal.SIGTERM]),
}
TIMEOUTS = {"stopped long": 4, "hangs": 4}


def happens(scenario, rank, folder):
    """What happens to the process after step AT."""
    me = os.getpid()
    if scenario in ("term", "ahead", "behind", "last"):
        os.kill(me, signal.SIGTERM)
    elif scenario == "usr1":
        os.kill(me, signal.SIGUSR1)
    elif scenario in ("killed", "killed in a save", "main killed", "hangs", "hangs, terminated"):
        os.kill(me, signal.SIGKILL)
    elif scenario in ("stopped", "stopped long"):
        os.kill(me, signal.SIGSTOP)
    elif scenario == "words":
        raise UserError("--flag: is wrong")


def step_alone(scenario, rank, step, folder):
    """A step of a process that meets nobody: the first one is fast, the other slow, as hosts of devices may be."""
    if scenario == "over" and rank == 0 and step == AT:
        while not (folder / "over").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
    if scenario == "over" and rank == 0 and step > AT:
        time.sleep(0.005)  # so that the loop looks while the others would have to answer
    if scenario.startswith("hangs") and rank == 0 and step == AT:
        (folder / "hangs").write_text(str(os.getpid()))
        one, _other = socket.socketpair()
        while True:
            one.recv(1)  # as in a collective of a device, which raises nothing
    if scenario in ("ahead", "behind", "hangs", "hangs, terminated"):
        time.sleep(0.0005 if rank == 0 else 0.002)


def run(scenario, folder):
    timeout = TIMEOUTS.get(scenario, 60)
    accelerator = build_accelerator(ddp_timeout=timeout)
    rank, (struck, meets) = accelerator.process_index, SCENARIOS[scenario]
    last = AT if scenario == "last" else 200 if scenario in ("over", "stopped") else STEPS
    with lost.lost_process(accelerator, timeout):
        model = torch.nn.Linear(4, 4)
        with warnings.catch_warnings(action="ignore"):
            engine = accelerator.prepare(model) if meets else model
        guard = signals.SignalGuard(accelerator, last)
        try:
            for step in range(1, last + 1):
                if meets:
                    accelerator.backward(engine(torch.ones(2, 4)).sum())
                else:
                    step_alone(scenario, rank, step, folder)
                if scenario == "two signals" and step == AT:
                    os.kill(os.getpid(), signal.SIGTERM if rank == 0 else signal.SIGUSR1)
                elif step == AT and rank == struck:
                    happens(scenario, rank, folder)
                if guard.stop_asked(step):
                    accelerator.wait_for_everyone()  # as they do to save
                    raise signals.StoppedBySignal(guard.number, step)
        finally:
            if scenario == "killed in a save" and rank == 0:  # its own part is written, the other's never comes
                with contextlib.suppress(SaveFailed):
                    Answers(accelerator).collect(0, timeout)
            guard.release()
        if scenario == "over" and rank == 1:
            (folder / "over").touch()
        accelerator.wait_for_everyone()


def run_alone(scenario):
    at, numbers = ALONE[scenario]
    accelerator = build_accelerator(ddp_timeout=60)
    with lost.lost_process(accelerator, 60):
        guard = signals.SignalGuard(accelerator, 10)
        for step in range(1, 11):
            for number in numbers if step == at else ():
                os.kill(os.getpid(), number)
            if guard.stop_asked(step):
                raise signals.StoppedBySignal(guard.number, step)
        guard.release()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def fork(scenario, rank, port, folder):
    process = os.fork()
    if process == 0:
        place = {"RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_RANK": rank, "GROUP_RANK": 0, "LOCAL_WORLD_SIZE": WORLD}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if scenario not in ALONE:
            os.environ.update({name: str(value) for name, value in place.items()})
        sys.stdout = open(folder / f"out_{rank}", "w", buffering=1)
        sys.stderr = open(folder / f"err_{rank}", "w", buffering=1)
        try:
            exit_with(lambda: run_alone(scenario) if scenario in ALONE else run(scenario, folder))
        except SystemExit as end:
            os._exit(end.code)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(99)
    return process


def ends_of(scenario):
    """The exit status of each process, and what it printed as an error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder, statuses = Path(name), {}
        world = 1 if scenario in ALONE else WORLD
        ranks = {fork(scenario, rank, port, folder): rank for rank in range(world)}
        while len(statuses) < world:
            process, status = os.waitpid(-1, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                statuses[ranks[process]] = os.waitstatus_to_exitcode(status)
                if scenario == "hangs, terminated" and statuses.keys() == {1}:  # as torchrun does
                    os.kill(int((folder / "hangs").read_text()), signal.SIGTERM)
            elif scenario == "stopped long":
                other = next(pid for pid in ranks if pid != process)
                statuses[ranks[other]] = os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])
                os.kill(process, signal.SIGCONT)
            else:
                time.sleep(3)  # longer than any of the limits above but the time-out
                os.kill(process, signal.SIGCONT)
        return [{"status": statuses[rank], "err": (folder / f"err_{rank}").read_text()} for rank in range(world)]


if __name__ == "__main__":
    chosen = sys.argv[1:] or [*SCENARIOS, *ALONE]  # two at a time: most of them wait
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        print(json.dumps(dict(zip(chosen, pool.map(ends_of, chosen), strict=True))))
