"""A bar at a terminal, lines in a file."""

import io

import pytest
import tqdm

from vit_hf import progress as module
from vit_hf.progress import progress, time_left


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_a_file_gets_a_line_now_and_then_and_one_at_the_end(clock, capsys):
    with progress(60_000, "Decoding", "image") as work:
        for _ in range(600):
            clock[0] += 0.125
            work.update(100)
        assert work.n == 60_000
    assert capsys.readouterr().err.splitlines() == [
        "Decoding: 24,000 of 60,000 images, 800 images/s, 45 s left",
        "Decoding: 48,000 of 60,000 images, 800 images/s, 15 s left",
        "Decoding: 60,000 of 60,000 images, 800 images/s",
    ]


def test_what_is_done_at_once_or_is_to_be_quiet_says_nothing(clock, capsys):
    with progress(10, "Decoding", "image") as work:
        work.update(10)
    with progress(10, "Decoding", "image", disable=True) as work:
        clock[0] += 99
        work.update(10)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(module.sys, "stderr", terminal)
    with progress(10, "Decoding", "image") as work:
        work.update(4)
        assert isinstance(work, tqdm.tqdm) and work.n == 4
    assert "\rDecoding:  40%" in terminal.getvalue()


def test_time_left_is_read_at_a_glance():
    assert [time_left(seconds) for seconds in (47.2, 725, 12276, -3)] == [
        "47 s left", "12 min 5 s left", "3 h 24 min left", "0 s left"
    ]  # fmt: skip
