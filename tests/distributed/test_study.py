"""`vit-hf study` with real `accelerate launch` processes on a model of some thousand parameters."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from tests.runs import DEMO_DEFAULTS, ROOT, lines, python, trajectory
from vit_hf.arguments import RunArguments, plain
from vit_hf.errors import ArgumentError, UserError
from vit_hf.study import execute
from vit_hf.study.execute import Launcher
from vit_hf.study.plan import read_study

TINY = {name: value for name, value in DEMO_DEFAULTS.items() if name != "preset"} | {
    "eval_steps": 100,
    "save_steps": 3,
}
CPU = ROOT / "accelerate_configs/cpu.yaml"


def write_study(tmp_path, cells, **more):
    """A study of cells {name: (recipe's preset or None, flags, more of the cell)} beside its recipe."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**TINY, "output_dir": "unused"}))
    content = {"output_dir": str(tmp_path / "runs"), "seeds": [0], **more, "cells": {}}
    for name, (preset, flags, rest) in cells.items():
        flags = flags | ({"preset": preset} if preset else {})
        content["cells"][name] = {"recipe": str(tmp_path / "recipe.yaml"), "flags": flags, **rest}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def study(path, *words, **options):
    return python("-m", "vit_hf.cli", "study", path, "--config_file", CPU, *words, **options)


VIT = "vit-demo-patch8-32"
QUESTION = {
    "question": "Does it help to start from something?",
    "claim": "It does.",
    "source": "none",
    "rows": [{"cell": "scratch", "label": "random | weights"}, {"cell": "tuned", "label": "tuned", "quoted": "0.98"}],
    "tests": [{"greater": "tuned", "than": "scratch"}, {"greater": "gone", "than": "scratch"}],
}


@pytest.mark.slow
def test_a_study_from_its_file_to_its_report(tmp_path):
    """Dependencies, a failure that stops nothing else, data that cannot be had; and once more, where nothing is left."""
    path = write_study(
        tmp_path,
        {
            "tuned": (None, {"config_overrides": "pooling=cls"}, {"start_from": "scratch"}),
            "scratch": (VIT, {}, {}),
            "broken": (VIT, {"image_size": 33}, {}),  # which only the model can tell
            "after-broken": (None, {}, {"start_from": "broken"}),
            "gone": (VIT, {"dataset_name": str(tmp_path / "no-folder")}, {}),
        },
        title="Tiny & small",
        questions=[QUESTION],
    )
    done = study(path, "--jobs", 2)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "3 of 5 runs have no result; gone seed 0: " in done.stderr.splitlines()[-1]
    assert "5 of 5 runs to do, 2 at a time" in done.stdout
    told = {line.split("] ")[1].split(":")[0]: line for line in done.stdout.splitlines() if line.startswith("[")}
    assert len(told) == 5
    assert "finished" in told["scratch seed 0"] and "finished" in told["tuned seed 0"]
    assert "starts from broken seed 0, which is not trained" in told["after-broken seed 0"]
    assert "no such folder" in told["gone seed 0"]
    assert "failed: --preset vit-demo-patch8-32: image_size 33" in told["broken seed 0"]

    accuracy = {
        name: json.loads((tmp_path / f"runs/{name}/seed-0/all_results.json").read_text())["eval_accuracy"]
        for name in ("scratch", "tuned")
    }
    page = (tmp_path / "runs/report/report.md").read_text()
    assert page.startswith("# Tiny & small\n") and "2 of 5 runs are finished" in page
    assert f"| {accuracy['tuned']:.4f} " in page and "| 0.98 " in page and r"random \| weights" in page
    assert "no result of gone" in page and "not tested" in page
    for name in ("broken", "after-broken", "gone"):
        assert f"| {name} seed 0" in page.split("## Not run")[1]
    html = (tmp_path / "runs/report/report.html").read_text()
    assert "data:image/png;base64," in html and 'src="http' not in html and "Tiny &amp; small" in html
    assert (tmp_path / "runs/report/question_1.tex").exists() and (tmp_path / "runs/report/question_1.png").exists()
    cells = (tmp_path / "runs/report/cells.csv").read_text().splitlines()
    assert [line.split(",")[:3] for line in cells[1:]] == [
        ["scratch", "0", str(accuracy["scratch"])],
        ["tuned", "0", str(accuracy["tuned"])],
    ]

    written = {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/*/seed-0/model.safetensors")}
    again = study(path, "--only", "tuned")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "0 of 2 runs to do" in again.stdout and len(written) == 2
    assert all(file.stat().st_mtime_ns == when for file, when in written.items())
    assert f"| {accuracy['tuned']:.4f} " in (tmp_path / "runs/report/report.md").read_text()


def processes_about(folder):
    """Ids of the processes that have the folder on their command line."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and int(entry) != os.getpid():
            try:
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    command = file.read()
                with open(f"/proc/{entry}/stat") as file:
                    zombie = file.read().rsplit(")", 1)[1].split()[0] == "Z"
            except (FileNotFoundError, ProcessLookupError):
                continue
            if str(folder).encode() in command and not zombie:
                found.append(int(entry))
    return found


def until(condition, process=None):
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline and (process is None or process.poll() is None), "it never came"
        time.sleep(0.02)


def started(path):
    return subprocess.Popen(
        [sys.executable, "-m", "vit_hf.cli", "study", str(path), "--config_file", str(CPU)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


LONG = {"max_steps": 400, "save_steps": 40, "logging_steps": 10}


@pytest.mark.slow
def test_a_kill_loses_at_most_one_checkpoint_interval(tmp_path):
    """Everything is killed, as when a machine goes down; then the run is the one that was never stopped."""
    path = write_study(tmp_path, {"only": (VIT, LONG, {})})
    folder = tmp_path / "runs/only/seed-0"
    process = started(path)
    until(lambda: (folder / "checkpoint-80/manifest.json").exists(), process)
    for number in [process.pid, *processes_about(folder)]:
        os.kill(number, signal.SIGKILL)
    process.wait()
    reached = lines(folder)[-1]["step"]
    assert reached < LONG["max_steps"], "it was over before the kill"
    done = study(path)
    assert done.returncode == 0, done.stdout + done.stderr
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    (resume,) = [event for event in events if event["event"] == "resume"]
    assert resume["exact"] and resume["step"] > reached - LONG["save_steps"]
    assert study(path, "--output_dir", tmp_path / "whole").returncode == 0
    assert trajectory(folder) == trajectory(tmp_path / "whole/only/seed-0")


@pytest.mark.slow
def test_sigterm_ends_all_runs_with_a_checkpoint(tmp_path):
    path = write_study(tmp_path, {"only": (VIT, LONG | {"save_steps": 400}, {})})
    folder = tmp_path / "runs/only/seed-0"
    process = started(path)
    until(lambda: (folder / "metrics.jsonl").exists() and lines(folder), process)
    process.terminate()
    assert "the same command goes on from there" in process.communicate(timeout=100)[0] and process.returncode == 143
    assert not processes_about(folder)
    (checkpoint,) = folder.glob("checkpoint-*")
    assert (checkpoint / "manifest.json").exists()


@pytest.mark.slow
def test_a_run_that_outlived_its_study_is_waited_for(tmp_path):
    """The study alone is killed; the next one does not train beside the run that goes on."""
    path = write_study(tmp_path, {"only": (VIT, LONG, {})})
    folder = tmp_path / "runs/only/seed-0"
    process = started(path)
    until(lambda: (folder / "metrics.jsonl").exists() and lines(folder), process)
    process.kill()
    process.wait()
    assert processes_about(folder)
    done = study(path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "only seed 0 is being trained by an earlier start" in done.stdout
    assert (folder.parent / "seed-0.log").read_text().count("model: vit-demo") == 1  # started once
    assert (folder / "all_results.json").exists()


def test_devices_are_dealt_out(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    path = write_study(tmp_path, {"only": (VIT, {}, {})})
    (cell,) = read_study(path).cells
    launcher = Launcher(ROOT / "accelerate_configs/ddp.yaml", jobs=2, devices=("0", "1", "4", "5"))
    command, environment = launcher.command(cell, 1)
    assert environment == {"CUDA_VISIBLE_DEVICES": "4,5"}
    assert command[command.index("--num_processes") + 1] == "2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,GPU-a,GPU-b,6,7")
    assert launcher.command(cell, 1)[1] == {"CUDA_VISIBLE_DEVICES": "6,7"}
    assert command[command.index("--config") - 1].endswith("run_pretrain.py")
    ports = {command[command.index("--main_process_port") + 1] for command, _ in [launcher.command(cell, 0)]}
    assert ports and all(port.isdecimal() for port in ports)
    command, environment = Launcher(CPU, jobs=2).command(cell, 0)
    assert environment == {} and "--num_processes" not in command
    threads = command[command.index("--num_cpu_threads_per_process") + 1]
    assert int(threads) == max(1, os.cpu_count() // 2)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--jobs", 0], "--jobs: 0 is out of range"),
        (["--jobs", 2, "--devices", "0,1,2"], "3 devices do not divide evenly over --jobs 2"),
        (["--config_file", "recipes/demo/pretrain_glyphs.yaml"], "pretrain_glyphs.yaml is no file of accelerate"),
        (["--config_file", "none.yaml"], "--config_file: none.yaml is no file of accelerate"),
        (["--devices", "0,1"], "cpu.yaml runs on the CPU"),
        (["--config_file", "accelerate_configs/single_gpu.yaml", "--devices", "0,1"], "takes one device a run"),
        (["--config_file", "accelerate_configs/single_gpu.yaml", "--jobs", 2], "would share a GPU"),
        (["--only", "scratc"], "--only: 'scratc' matches none of scratch, tuned"),
    ],
)
def test_wrong_flags(tmp_path, words, said):
    from vit_hf.commands.study import main

    path = write_study(tmp_path, {"scratch": (VIT, {}, {}), "tuned": (None, {}, {"start_from": "scratch"})})
    with pytest.raises(ArgumentError) as caught:
        main([str(path), "--config_file", str(CPU), *map(str, words)])
    assert said in str(caught.value)


@pytest.mark.parametrize("words", [[], ["--dry_run"]])
def test_places_that_are_not_there(tmp_path, words, monkeypatch):
    from vit_hf.commands.study import main

    path = write_study(tmp_path, {"scratch": (VIT, {}, {})})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file; name a folder"):
        main([str(path), "--config_file", str(CPU), "--output_dir", str(tmp_path / "file/below"), *words])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = str(ROOT / "accelerate_configs/single_gpu.yaml")
    with pytest.raises(UserError, match="--devices: '2' is none of this machine's GPUs: 0, 1"):
        main([str(path), "--config_file", config, "--devices", "0,2", "--jobs", "2", *words])


def test_only_brings_what_a_cell_starts_from(tmp_path):
    from vit_hf.commands.study import chosen

    path = write_study(
        tmp_path, {"a": (VIT, {}, {}), "b": (None, {}, {"start_from": "a"}), "c": (None, {}, {"start_from": "b"}), "d": (VIT, {}, {})}
    )  # fmt: skip
    cells = read_study(path).cells
    assert [cell.name for cell in chosen(cells, "c")] == ["a", "b", "c"]
    assert [cell.name for cell in chosen(cells, "b, d")] == ["a", "b", "d"]
    assert chosen(cells, None) == cells


# --- the shipped studies, shrunken, on sets with the schemas of CIFAR-10 and ImageNet-1k ---


def picture_set(folder, image_column, eval_split, num_classes, size):
    """Parquet as the Hub lays it out: some random pictures of each class."""
    import datasets
    import numpy as np
    from PIL import Image

    draws = np.random.default_rng(0)
    names = [f"class {number}" for number in range(num_classes)]
    features = datasets.Features({image_column: datasets.Image(), "label": datasets.ClassLabel(names=names)})
    for split, each in (("train", 3), (eval_split, 2)):
        labels = [label for label in range(num_classes) for _ in range(each)]
        pixels = draws.integers(0, 256, (len(labels), *size, 3), dtype=np.uint8)
        rows = {image_column: [Image.fromarray(image) for image in pixels], "label": labels}
        (folder / "data").mkdir(parents=True, exist_ok=True)
        dataset = datasets.Dataset.from_dict(rows, features=features)
        dataset.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


SHRUNKEN = dict(
    max_steps=2, warmup_steps=1, global_batch_size=4, per_device_train_batch_size=2, eval_steps=2, save_steps=2
)


def shrink(name, tmp_path, sets, overrides):
    """The study with every cell's run made small, and the sets replaced."""
    content = yaml.safe_load((ROOT / "studies" / name).read_text())
    for cell in content["cells"].values():
        recipe = yaml.safe_load((ROOT / cell["recipe"]).read_text())
        flags = {**cell.get("flags", {}), **SHRUNKEN, "dataset_name": sets[recipe["dataset_name"]]}
        flags.pop("num_train_epochs", None)
        if "preset" in recipe and "vit" in recipe["preset"]:
            flags["config_overrides"] = ",".join(filter(None, [recipe.get("config_overrides"), overrides]))
        cell["flags"] = flags
    content["seeds"] = [0]
    content["output_dir"] = str(tmp_path / "runs")
    path = tmp_path / name
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


SMALL_VIT = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32"


@pytest.mark.slow
def test_shrunken_cell_of_cifar10(tmp_path):
    sets = {"cifar10": picture_set(tmp_path / "cifar", "img", "test", 10, (32, 32))}
    done = study(shrink("cifar10.yaml", tmp_path, sets, SMALL_VIT), "--only", "vit-small-500")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "runs/vit-small-500/seed-0/all_results.json").read_text())
    assert results["eval_samples"] == 20 and results["train_samples"] == 30
    page = (tmp_path / "runs/report/report.md").read_text()
    assert "1 of 7 runs are finished" in page and "vit-small-500 > 0.91" in page and "not asked for" in page


@pytest.mark.slow
def test_shrunken_cells_of_imagenet_two_thirds_to_cifar10(tmp_path):
    """Pretraining on two thirds of each class, then fine-tuning at another resolution."""
    sets = {
        "imagenet-1k": picture_set(tmp_path / "imagenet", "image", "validation", 4, (60, 80)),
        "cifar10": picture_set(tmp_path / "cifar", "img", "test", 10, (32, 32)),
    }
    path = shrink("imagenet_two_thirds_to_cifar10.yaml", tmp_path, sets, SMALL_VIT)
    done = study(path, "--only", "cifar10-vit-base-better-384")
    assert done.returncode == 0, done.stdout + done.stderr
    before = json.loads((tmp_path / "runs/imagenet-vit-base-better/seed-0/all_results.json").read_text())
    after = json.loads((tmp_path / "runs/cifar10-vit-base-better-384/seed-0/all_results.json").read_text())
    assert (before["train_samples"], before["eval_samples"]) == (8, 8)  # two thirds of three of each of four classes
    assert (after["train_samples"], after["eval_samples"]) == (30, 20)
    config = json.loads((tmp_path / "runs/cifar10-vit-base-better-384/seed-0/config.json").read_text())
    assert (config["image_size"], config["pooling"], config["head_hidden_size"]) == (384, "mean", None)


def test_a_folder_with_another_run_is_not_finished(tmp_path, run):
    path = write_study(tmp_path, {"only": (VIT, {}, {})})
    (cell,) = read_study(path).cells
    assert not execute.is_finished(cell)
    run("pretrain", output_dir=cell.output_dir, **TINY, preset=VIT, seed=0)
    assert execute.is_finished(cell)
    (other,) = read_study(write_study(tmp_path, {"only": (VIT, {"learning_rate": 0.1}, {})})).cells
    assert isinstance(other.args, RunArguments) and not execute.is_finished(other)
    (cell.output_dir / "run_config.yaml").write_text("")
    assert not execute.is_finished(cell)


def finish(cell, seconds):
    """Writes what a finished run leaves, as far as a study looks at it."""
    cell.output_dir.mkdir(parents=True, exist_ok=True)
    (cell.output_dir / "run_config.yaml").write_text(yaml.safe_dump(plain(cell.args)))
    (cell.output_dir / "all_results.json").write_text(json.dumps({"wall_time_seconds": seconds}))
    if cell.start_from is not None:
        cell.origin.write_text(execute.fingerprint(cell.start_from))


def test_what_started_from_an_older_training_is_not_finished(tmp_path):
    """The parent is removed and trained anew: the child is neither counted nor gone on with."""
    path = write_study(tmp_path, {"parent": (VIT, {}, {}), "child": (None, {}, {"start_from": "parent"})})
    parent, child = read_study(path).cells
    finish(parent, 1.0)
    finish(child, 1.0)
    assert execute.is_finished(child) and execute._begun_otherwise(child) is None
    finish(parent, 2.0)
    assert execute.is_finished(parent) and not execute.is_finished(child)
    told = []
    failed = execute.run_cells([child], Launcher(CPU), lambda *words: told.append(words[:2]))
    assert list(failed) == [child] and told == [(child, failed[child])]
    assert "began with another training of parent seed 0; remove the folder" in failed[child]


def test_a_study_may_be_moved(tmp_path):
    """The path of what a run started from is written otherwise; it is the same training."""
    path = write_study(tmp_path, {"parent": (VIT, {}, {}), "child": (None, {}, {"start_from": "parent"})})
    for cell in read_study(path).cells:
        finish(cell, 1.0)
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert all(execute.is_finished(cell) for cell in read_study(path, tmp_path / "moved").cells)


def test_the_reason_is_that_of_the_last_start(tmp_path):
    log = tmp_path / "seed-0.log"
    log.write_text("error: yesterday's mistake\n")
    start = log.stat().st_size
    assert "it printed nothing" in execute._last_words(log, start)
    with open(log, "a") as file:
        file.write("Traceback\n  ...\nRuntimeError: today's\n")
    assert execute._last_words(log, start) == f"failed: RuntimeError: today's ({log})"
    with open(log, "a") as file:
        file.write("[rank 1] error: the flag is wrong\nthe launcher has more to say\n")
    assert execute._last_words(log, start) == f"failed: [rank 1] error: the flag is wrong ({log})"
