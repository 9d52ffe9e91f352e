"""Processes that wait for one that works: as long as it lives, and no longer."""

import json
import re

import pytest

from tests.runs import DEMO_DEFAULTS, ROOT, in_process, launch, python, trajectory

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ends():
    """{scenario: how each process ended}"""
    done = python(ROOT / "tests/distributed/meetings.py", timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_first_process_slower_than_the_time_limit_of_collectives_does_not_end_the_run(tmp_path):
    """Real scripts under the real launcher; the set is loaded once, and the course is that of one process."""
    in_process("pretrain", output_dir=tmp_path / "single", **DEMO_DEFAULTS)
    script = [ROOT / "tests/distributed/slow_start.py", tmp_path]
    result = launch(script, "cpu_2proc", output_dir=tmp_path / "run", ddp_timeout=10, **DEMO_DEFAULTS)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "calls").read_text() == "0\n"
    said = (tmp_path / "said").read_text()
    assert re.fullmatch(r"loading digits: 1\d s so far; the other processes wait", said), said
    for one, other in zip(trajectory(tmp_path / "single"), trajectory(tmp_path / "run"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_those_who_wait_say_for_what(ends):
    main, other = ends["slow"]
    assert main["status"] == other["status"] == 0
    assert other["out"].startswith("counting sheep: ") and "the other processes wait" in other["out"]
    assert main["out"] == "found what process 0 has made\n" and other["out"].endswith(main["out"])
    assert main["worked"] and not other["worked"]


def test_a_users_error_ends_all_alike(ends):
    main, other = ends["wrong"]
    assert main["status"] == other["status"] == 2 and not other["worked"]
    assert main["err"] == "error: --flag: is wrong\n" and other["err"] == f"[rank 1] {main['err']}"


@pytest.mark.parametrize("scenario", ["killed", "orphan"])
def test_a_first_process_that_is_killed_ends_the_others_in_a_line(scenario, ends):
    """Also where a process that it had started holds its sockets open."""
    main, other = ends[scenario]
    assert main["status"] == -9 and other["status"] == 1
    reason = {
        "killed": "process 0 ended during counting sheep; what it has printed says why",
        "orphan": "process 0 gave no sign of life for 2 s during counting sheep; what it has printed says why",
    }
    assert other["err"] == f"[rank 1] error: {reason[scenario]}\n"


def test_another_machines_process_that_is_gone_ends_the_wait_for_it(ends):
    main, other = ends["other_killed"]
    assert other["status"] == -9 and main["status"] == 1
    assert main["err"] == "error: process 1 ended during counting sheep; what it has printed says why\n"


def test_a_machine_that_has_not_the_files_makes_them_once_for_itself(ends):
    every = ends["disks"]
    assert [end["status"] for end in every] == [0] * 4, every
    assert [end["worked"] for end in every] == [True, False, True, False]
    assert [end["out"] for end in every] == [f"found what process {rank} has made\n" for rank in (0, 0, 2, 2)]
