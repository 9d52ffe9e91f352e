"""`vit-hf report` on folders that hold nothing but a metrics.jsonl."""

import csv
import json

import pytest

from tests.test_curves import course
from vit_hf.cli import dispatch
from vit_hf.commands.report import accuracy_interval, duration, row
from vit_hf.errors import ArgumentError, UserError


@pytest.fixture
def write(tmp_path):
    """write("name", lines or text) -> a folder with that metrics.jsonl and nothing else."""

    def make(name, content):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        text = content if isinstance(content, str) else "".join(json.dumps(line) + "\n" for line in content)
        (folder / "metrics.jsonl").write_text(text)
        return str(folder)

    return make


def cells(said):
    """{run: {column: cell}} of the table that was printed."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("|")]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


def test_one_folder_with_nothing_but_its_lines(write, tmp_path, capsys):
    dispatch(["report", write("alone", course())])
    said = capsys.readouterr().out
    assert cells(said) == {
        "alone": {
            "run": "alone", "model": "-", "parameters": "-", "steps": "4", "images seen": "32",
            "accuracy": "0.4000 (9 images)", "95 % interval": "0.1888 to 0.7333", "loss": "0.75", "images/s": "300", "wall time": "6.0 min",
            "training FLOPs": "20", "peak memory": "-",
        }
    }  # fmt: skip
    folder = tmp_path / "report"
    assert f"report: {folder / 'report.html'}" in said and "note" not in said
    pictures = {"learning_curves.png", "optimisation.png", "throughput.png", "accuracy.png"}
    files = {path.name for path in folder.iterdir()}
    assert files == pictures | {"report.html", "report.md", "runs.csv", "runs.tex", "curves.csv"}
    assert (folder / "report.html").read_text().count('src="data:image/png;base64,') == 4
    assert sum(f"]({name})" in (folder / "report.md").read_text() for name in pictures) == 4
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["metrics.jsonl"]


def test_two_runs_one_of_before_the_lines_said_what_they_cost(write, tmp_path, capsys):
    costs = ("images_seen", "wall_time_seconds", "training_flops")
    old = [{key: value for key, value in line.items() if key not in costs} for line in course()]
    dispatch(["report", write("old", old), write("new", course(steps=5)), "--output_dir", str(tmp_path / "here")])
    said = capsys.readouterr().out
    assert "note: old: no line holds images_seen, training_flops, wall_time_seconds; it is left out" in said
    assert "note: new" not in said and cells(said)["old"]["images seen"] == "-"
    assert cells(said)["new"]["accuracy"] == "0.4000 (9 images, step 4)"  # the run has gone on since
    rows = list(csv.DictReader((tmp_path / "here/curves.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == ["old"] * 6 + ["new"] * 7
    assert list(csv.DictReader((tmp_path / "here/runs.csv").read_text().splitlines()))[1]["steps"] == "5"


def test_the_last_accuracy_is_told_not_the_best():
    lines = course()
    lines[-1]["eval_accuracy"] = 0.05
    assert "0.0500 (9 images)" in row("run", lines, {})


def test_an_interval_stays_within_0_and_1():
    """Wilson's, by hand: of 450 images with none wrong, (1 + z^2 / 2n -+ z sqrt(z^2 / 4n^2)) / (1 + z^2 / n)."""
    z, n = 1.959964, 450
    lowest = 1 / (1 + z**2 / n)
    assert accuracy_interval([{"step": 1, "eval_accuracy": 1.0, "eval_samples": n}]) == f"{lowest:.4f} to 1.0000"
    assert accuracy_interval([{"step": 1, "eval_accuracy": 0.0, "eval_samples": n}]) == f"0.0000 to {1 - lowest:.4f}"
    assert accuracy_interval([{"step": 1, "eval_accuracy": 0.5}]) == accuracy_interval([]) == "-"


def test_one_name_twice_is_told_apart_by_the_paths(write, tmp_path, capsys):
    paths = [write("a/run", course()), write("b/run", course())]
    dispatch(["report", *paths, "--output_dir", str(tmp_path / "out")])
    assert list(cells(capsys.readouterr().out)) == paths


def test_a_run_that_just_started_and_one_that_is_being_written(write, tmp_path, capsys):
    being_written = "".join(json.dumps(line) + "\n" for line in course(steps=1)) + '{"step": 2, "lo'
    dispatch(["report", write("started", ""), write("going", being_written)])
    said = capsys.readouterr().out
    assert list(cells(said)) == ["going"]
    assert "note: started: metrics.jsonl has no line yet" in said and "damaged" not in said
    assert "note: going: no line holds eval_accuracy" in said
    assert not (tmp_path / "report/accuracy.png").exists()


def test_a_line_damaged_in_the_middle_is_counted_and_left_out(write, capsys):
    whole = [json.dumps(line) for line in course()]
    dispatch(["report", write("run", "\n".join([*whole[:2], whole[2][:20], *whole[3:], ""]))])
    said = capsys.readouterr().out
    assert "note: run: 1 of 6 lines in metrics.jsonl are damaged and left out" in said
    assert cells(said)["run"]["steps"] == str(course()[-1]["step"])


def test_bad_input_is_one_line(write, tmp_path):
    good, empty = write("good", course()), write("empty", "")
    (tmp_path / "file").write_text("")
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary/metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    for words, error, message in (
        ([], ArgumentError, "required: RUN"),
        ([tmp_path], UserError, "holds no metrics.jsonl"),
        ([tmp_path / "nowhere"], UserError, "nowhere does not exist"),
        ([tmp_path / "file"], UserError, "is a file"),
        ([tmp_path / "binary"], UserError, "is not text"),
        ([empty], UserError, "nothing to report: metrics.jsonl has no line yet"),
        ([good, f"{good}/../good"], ArgumentError, "named 2 times"),
        ([good, "--output_dir", tmp_path / "file"], UserError, "--output_dir: .*file is a file"),
        ([good, "--output_dir", tmp_path / "file/deeper"], UserError, "--output_dir: .*file is a file"),
        ([good, "--output_dir", good], UserError, "--output_dir: .* is a run's own folder"),
    ):
        with pytest.raises(error, match=message):
            dispatch(["report", *map(str, words)])
    assert not (tmp_path / "report").exists()


def test_other_files_that_are_damaged_are_passed_over(write, tmp_path, capsys):
    run = write("run", course())
    (tmp_path / "run/all_results.json").write_text('{"num_par')
    (tmp_path / "run/run_config.yaml").write_text("preset: [")
    dispatch(["report", run])
    assert cells(capsys.readouterr().out)["run"]["parameters"] == "-"


def test_durations_are_read_at_a_glance():
    assert [duration(seconds) for seconds in (47.2, 738, 12276)] == ["47 s", "12.3 min", "3.41 h"]
