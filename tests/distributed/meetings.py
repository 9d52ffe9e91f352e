"""Processes that wait for each other, forked from one that has loaded everything: prints, as JSON, how each ended.

python tests/distributed/meetings.py SCENARIO
"""

import json
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

from vit_hf.errors import ArgumentError, exit_with
from vit_hf.training import waiting
from vit_hf.training.accelerator import build_accelerator

waiting.BEAT_SECONDS, waiting.DEAD_SECONDS, waiting.LINE_SECONDS = 0.1, 1.5, 0.3
SCENARIOS = {  # the machine of each rank
    "slow": [0, 0],
    "wrong": [0, 0],
    "killed": [0, 0],
    "orphan": [0, 0],
    "other_killed": [0, 1],
    "disks": [0, 0, 1, 1],
}


class OnDisk:
    """What can be opened on the machine that has made it, and where it was not hidden."""

    def __init__(self, machine, rank):
        self.machine, self.rank = machine, rank

    def __setstate__(self, state):
        if state["machine"] != int(os.environ["GROUP_RANK"]):
            raise FileNotFoundError("on another machine")
        self.__dict__.update(state)


def run(scenario, folder):
    accelerator = build_accelerator(ddp_timeout=60)
    rank, machine = accelerator.process_index, int(os.environ["GROUP_RANK"])
    assert accelerator.num_processes == len(SCENARIOS[scenario])

    def work():
        (folder / f"worked_{rank}").touch()
        if scenario == "wrong":
            raise ArgumentError("--flag: is wrong")
        if scenario == "orphan" and os.fork() == 0:  # keeps the server's sockets open
            (folder / "orphan").write_text(str(os.getpid()))
            signal.pause()
        if scenario in ("killed", "orphan") or (scenario == "other_killed" and rank == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        while scenario == "slow" and not (folder / "said").exists():
            signal.sigtimedwait([], 0.05)
        return OnDisk(machine, rank)

    if scenario == "slow" and rank == 1:
        waiting.print = lambda line, **_: (print(line), (folder / "said").touch())
    first = waiting.machine_first if scenario == "other_killed" else waiting.main_process_first
    found = first(accelerator, work, "counting sheep")
    print(f"found what process {found.rank} has made")


def fork(scenario, rank, port, folder):
    """The id of a process of the scenario, whose output goes to files."""
    process = os.fork()
    if process == 0:
        machines = SCENARIOS[scenario]
        machine = machines[rank]
        here = [other for other in range(len(machines)) if machines[other] == machine]
        place = {"RANK": rank, "WORLD_SIZE": len(machines), "LOCAL_RANK": here.index(rank), "GROUP_RANK": machine}
        place |= {"LOCAL_WORLD_SIZE": len(here), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        sys.stdout = open(folder / f"out_{rank}", "w", buffering=1)
        sys.stderr = open(folder / f"err_{rank}", "w", buffering=1)
        try:
            exit_with(lambda: run(scenario, folder))
        except SystemExit as end:
            os._exit(end.code)
        finally:
            os._exit(99)
    return process


def ends_of(scenario):
    """The exit status of each process, what it printed, and whether it did the work."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder, ranks = Path(name), range(len(SCENARIOS[scenario]))
        processes = [fork(scenario, rank, port, folder) for rank in ranks]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        if scenario == "orphan":
            os.kill(int((folder / "orphan").read_text()), signal.SIGKILL)
        return [
            {
                "status": statuses[rank],
                "out": (folder / f"out_{rank}").read_text(),
                "err": (folder / f"err_{rank}").read_text(),
                "worked": (folder / f"worked_{rank}").exists(),
            }
            for rank in ranks
        ]


if __name__ == "__main__":
    print(json.dumps({scenario: ends_of(scenario) for scenario in SCENARIOS}))
