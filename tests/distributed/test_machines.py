"""Several machines, as two launchers on this one; processes that are killed, and signals as clusters send them."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.runs import DEMO_DEFAULTS, ROOT, in_process, lines, scripts_of, trajectory, words

pytestmark = pytest.mark.slow
RUN = {**DEMO_DEFAULTS, "max_steps": 300, "save_steps": 20, "eval_steps": 300, "save_total_limit": 2, "seed": 3}
CPU = ("--mixed_precision", "no")


class Launched:
    """A launcher under way, in a process group of its own; what it and its scripts print goes to a file."""

    def __init__(self, config, log, *launcher, before="", **flags):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}.yaml",
                   *map(str, launcher), "run_pretrain.py", *words(flags)]  # fmt: skip
        self.log, environment = log, {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                ["bash", "-c", f'{before} exec "$@"', "bash", *command], cwd=ROOT, env=environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def ended(self):
        """The exit status, and what was printed."""
        status = self.process.wait(timeout=150)
        return status, self.log.read_text()

    def kill_group(self, number):
        os.killpg(self.process.pid, number)


@pytest.fixture
def two_machines(tmp_path):
    """Starts the same run on both: two launchers of one process each."""
    started = []

    def start(name, **flags):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = ("--num_processes", 2, "--main_process_ip", "127.0.0.1", "--main_process_port", port, *CPU)
        for rank in (0, 1):
            log = tmp_path / f"{name}_{rank}.log"
            started.append(Launched("multinode_ddp", log, *common, "--machine_rank", rank, **flags))
        return started[-2:]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.kill_group(signal.SIGKILL)


def under_way(folder, launched, steps):
    """Waits until a run has logged so many steps."""
    deadline = time.monotonic() + 240  # the first DeepSpeed launch of a machine compiles
    while not (folder / "metrics.jsonl").exists() or len(lines(folder)) < steps:
        assert time.monotonic() < deadline and launched.process.poll() is None, launched.log.read_text()[-3000:]
        time.sleep(0.05)


def steps_of(folder):
    return [line["step"] for line in lines(folder)]


def test_two_machines_stop_for_a_signal_lose_one_and_one_process_goes_on(two_machines, tmp_path):
    """SIGTERM to the script of the second machine alone: both write a checkpoint. Started again, they go on exactly.
    The second machine dies: the first ends in a line that names the process. One process finishes the run."""
    folder, flags = tmp_path / "run", {**RUN, "output_dir": tmp_path / "run"}
    main, other = two_machines("first", **flags)
    under_way(folder, main, 25)
    os.kill(scripts_of(folder)[1], signal.SIGTERM)
    (_, said), (_, other_said) = main.ended(), other.ended()
    stopped = re.search(r"^error: stopped by SIGTERM after checkpoint-(\d+);", said, re.M)
    assert stopped, said[-3000:]
    step = int(stopped[1])
    assert f"[rank 1] error: stopped by SIGTERM after checkpoint-{step};" in other_said
    assert 25 <= step < 300 and (folder / f"checkpoint-{step}/manifest.json").exists()

    main, other = two_machines("second", **flags)
    under_way(folder, main, step + 30)
    other.kill_group(signal.SIGKILL)  # the launcher
    os.kill(scripts_of(folder)[1], signal.SIGKILL)  # which starts its script in a group of its own
    status, said = main.ended()
    assert f"resuming from {folder}/checkpoint-{step}, exactly" in said
    assert status == 1 and re.search(
        r"^error: process 1 gave no sign of life for 5 s: killed, stopped, or", said, re.M
    ), said
    assert f'File "{ROOT}/vit_hf/' not in said

    in_process("pretrain", **flags)
    assert steps_of(folder) == list(range(1, 301))
    in_process("pretrain", **{**flags, "output_dir": tmp_path / "single"})
    for one, whole in zip(trajectory(folder), trajectory(tmp_path / "single"), strict=True):
        assert one[1] == pytest.approx(whole[1], rel=2e-2)


def test_a_process_that_is_killed_under_zero_is_named(tmp_path):
    """The launcher ends the others with SIGTERM at once; the line comes out all the same."""
    folder = tmp_path / "run"
    run = Launched(
        "zero2", tmp_path / "log", "--num_processes", 2, *CPU, output_dir=folder, **{**RUN, "save_steps": 300}
    )
    under_way(folder, run, 10)
    os.kill(scripts_of(folder)[1], signal.SIGKILL)
    status, said = run.ended()
    assert status == 1 and re.search(r"^error: process 1 gave no sign of life for 5 s: killed", said, re.M), said[
        -3000:
    ]
    assert f'File "{ROOT}/vit_hf/' not in said and f'File "{ROOT}/run_' not in said


def test_a_cluster_that_signals_everything_gets_a_checkpoint(tmp_path):
    """SIGUSR1 to launcher and scripts, as Slurm's --signal sends it; docs/distributed.md shields the launcher so, and its
    pattern for signals by hand fits the scripts alone."""
    folder = tmp_path / "run"
    run = Launched("cpu_2proc", tmp_path / "log", before="trap '' USR1;", output_dir=folder, **RUN)
    under_way(folder, run, 25)
    (pattern,) = re.findall(r"^pkill -USR1 -f '(.*)--output_dir", (ROOT / "docs/distributed.md").read_text(), re.M)
    pattern += f"--output_dir {folder} "
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=True).stdout.split()
    assert {*map(str, scripts_of(folder).values())} <= {*found} and str(run.process.pid) not in found
    subprocess.run(["pkill", "-USR1", "-f", pattern], check=True)
    run.kill_group(signal.SIGUSR1)
    status, said = run.ended()
    stopped = re.search(r"^error: stopped by SIGUSR1 after checkpoint-(\d+);", said, re.M)
    assert status == 1 and stopped, said[-3000:]
    assert f"[rank 1] error: stopped by SIGUSR1 after checkpoint-{stopped[1]};" in said
    assert (folder / f"checkpoint-{stopped[1]}/manifest.json").exists()
