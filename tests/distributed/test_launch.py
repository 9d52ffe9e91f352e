"""The real scripts under the real launcher: DDP and DeepSpeed ZeRO on two CPU processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.families import FAMILIES
from tests.runs import DEMO_DEFAULTS, ROOT, in_process, launch, lines, python, trajectory, words
from tests.test_streams import shard
from vit_hf.evaluation.predictions import FILE, read_predictions

pytestmark = pytest.mark.slow

# ZeRO's 16-bit rounding is left out where trajectories are compared: what is held is that the algorithms agree
FP32 = ("--mixed_precision", "no")
TWO = ("--num_processes", "2")
RUN = {**DEMO_DEFAULTS, "random_crop": "padding=3", "random_flip": 0.5, "max_train_samples": 100, "save_steps": 3}


def close(one, other, tolerance):
    assert len(one) == len(other) > 0
    for a, b in zip(one, other):
        assert a == pytest.approx(b, rel=tolerance), (one, other)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The same run on one process, to hold the others against."""
    folder = tmp_path_factory.mktemp("single") / "run"
    in_process("pretrain", output_dir=folder, **RUN)
    return folder


def finished(result, folder, num_processes=2, zero_stage=0):
    assert result.returncode == 0, result.stderr[-3000:]
    text = (folder / "run_config.yaml").read_text()
    assert f"num_processes: {num_processes}" in text and f"zero_stage: {zero_stage}" in text
    return json.loads((folder / "all_results.json").read_text())


@pytest.mark.parametrize(("config", "stage"), [("ddp", 0), ("zero2", 2)])
def test_two_processes_take_the_course_of_one(config, stage, single, tmp_path):
    """Loss and gradient norm of every step, the ragged evaluation (101 images), and the exported fp32 weights; the other
    engines' courses are those of test_elastic.py."""
    folder = tmp_path / "run"
    flags = {**RUN, "per_device_train_batch_size": 8 if stage else 16}  # with accumulation
    results = finished(
        launch("pretrain", config, launcher=(*TWO, *FP32), output_dir=folder, **flags), folder, 2, stage
    )
    close(trajectory(folder), trajectory(single), 1e-4)
    expected = json.loads((single / "all_results.json").read_text())
    assert results["eval_samples"] == 101 == expected["eval_samples"]
    assert results["eval_accuracy"] == pytest.approx(expected["eval_accuracy"], abs=1.01 / 101)
    assert results["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)
    one, two = load_file(single / "model.safetensors"), load_file(folder / "model.safetensors")
    assert one.keys() == two.keys()
    for name in one:
        assert two[name].dtype == torch.float32
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=5e-4)  # AdamW: 6 steps of up to 1e-3
    rates = [line["learning_rate"] for line in lines(folder)]
    assert rates == [line["learning_rate"] for line in lines(single)]  # not stepped once a process


def test_zero_in_bf16_exports_the_fp32_masters_and_frozen_weights_as_they_were(tmp_path):
    """As zero2.yaml has it. In one launch: pretraining, then linear probing of what it has exported."""
    trained, probed = tmp_path / "trained", tmp_path / "probed"
    flags = {**RUN, "output_dir": str(trained), "max_steps": 3}
    probe = {**flags, "output_dir": str(probed), "model_name_or_path": str(trained), "freeze": "encoder"}
    for name in ("preset", "config_overrides"):
        probe.pop(name)
    courses = [("pretrain", flags), ("finetune", probe)]
    courses = [{"script": script, "mixed_precision": "bf16", "flags": own} for script, own in courses]
    (tmp_path / "courses.json").write_text(json.dumps(courses))
    walk = [ROOT / "tests/distributed/walk_courses.py", tmp_path / "courses.json"]
    result = launch(walk, "zero2", launcher=TWO)
    for folder in (trained, probed):
        finished(result, folder, 2, 2)
        assert "mixed_precision: bf16" in (folder / "run_config.yaml").read_text()
    before, after = (load_file(folder / "model.safetensors") for folder in (trained, probed))
    rounded = [name for name in before if torch.equal(before[name], before[name].bfloat16().float())]
    assert not any("proj.weight" in name or "classifier.weight" in name for name in rounded)
    assert before.keys() == after.keys()
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    assert moved and all(name.startswith("classifier.") for name in moved)


def test_every_family_trains_under_zero2_on_two_processes(tmp_path):
    """In one launch that walks through them, in bf16; each exports fp32 weights that have moved."""
    flags = {"dataset_name": "digits", "max_steps": 2, "global_batch_size": 32, "logging_steps": 1, "warmup_steps": 1}
    flags |= {"max_train_samples": 100, "max_eval_samples": 21, "weight_decay": 0}
    walk = [ROOT / "tests/distributed/walk_families.py", tmp_path]
    result = launch(walk, "zero2", launcher=(*TWO, "--mixed_precision", "bf16"), **flags)
    assert result.returncode == 0, result.stderr[-3000:]
    for family in FAMILIES:
        finished(result, tmp_path / family, 2, 2)
        assert [step for step, _, _ in trajectory(tmp_path / family)] == [1, 2]
        tensors = load_file(tmp_path / family / "model.safetensors")
        floats = {name: tensor for name, tensor in tensors.items() if "num_batches" not in name}
        assert {tensor.dtype for tensor in floats.values()} == {torch.float32}
        biases = [tensor for name, tensor in tensors.items() if name.startswith("classifier") and tensor.ndim == 1]
        assert biases[0].any()  # it started at zero


@pytest.mark.parametrize(("config", "stage"), [("cpu_2proc", 0), ("zero3", 3)])
def test_batch_norm_statistics_are_those_of_the_main_process_everywhere(config, stage, tmp_path):
    """The two processes see other images. The evaluation at the end used the statistics that are exported: the folder,
    evaluated by one process, gives the same loss."""
    preset, changes = FAMILIES["resnet"]
    flags = {**RUN, "preset": preset, "config_overrides": ",".join(f"{k}={v}" for k, v in changes.items())}
    finished(
        launch("pretrain", config, launcher=(*TWO, *FP32), output_dir=tmp_path / "run", **flags),
        tmp_path / "run",
        2,
        stage,
    )
    tensors = load_file(tmp_path / "run/model.safetensors")
    steps = [tensor.item() for name, tensor in tensors.items() if name.endswith("num_batches_tracked")]
    means = [tensor for name, tensor in tensors.items() if name.endswith("running_mean")]
    assert set(steps) == {6} and len(steps) == len(means) > 5 and all(mean.any() for mean in means)
    alone = python(
        "-m", "vit_hf.cli", "evaluate", tmp_path / "run", "--dataset_name", "digits", "--max_eval_samples", 101
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    one, both = (json.loads((tmp_path / "run" / f"{name}_results.json").read_text()) for name in ("eval", "all"))
    assert one["eval_loss"] == pytest.approx(both["eval_loss"], rel=1e-5)


def test_sgd_finetuning_with_ema_under_ddp(tmp_path, single):
    """The paper's fine-tuning optimizer; the export is the average, as the evaluation was."""
    flags = {**RUN, "model_name_or_path": single, "optim": "sgd", "ema_decay": 0.5, "max_steps": 3}
    for name in ("preset", "config_overrides"):
        flags.pop(name)
    results = finished(launch("finetune", "cpu_2proc", output_dir=tmp_path / "run", **flags), tmp_path / "run")
    saved = load_file(tmp_path / "run/checkpoint-3/model.safetensors")
    weights = {}
    for path in (tmp_path / "run/checkpoint-3").glob("training_state-*"):
        weights |= load_file(path)
    exported = load_file(tmp_path / "run/model.safetensors")
    assert torch.equal(exported["classifier.weight"], saved["classifier.weight"])
    assert not torch.equal(weights["weight.classifier.weight"], saved["classifier.weight"])
    evaluated = python(
        "-m", "vit_hf.cli", "evaluate", tmp_path / "run", "--dataset_name", "digits", "--max_eval_samples", 101
    )
    assert evaluated.returncode == 0, evaluated.stderr
    again = json.loads((tmp_path / "run/eval_results.json").read_text())
    assert again["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-5)


def test_evaluate_counts_each_sample_once_on_two_processes(single, tmp_path):
    """A ragged split (450 images in batches of 64 on two processes) gives what one process gives."""
    command = [
        "-m",
        "vit_hf.cli",
        "evaluate",
        str(single),
        "--dataset_name",
        "digits",
        "--per_device_eval_batch_size",
        "64",
        "--save_predictions",
    ]
    alone = python(*command, "--output_dir", tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    two = launch(["-m", *command[1:], "--output_dir", tmp_path / "two"], "cpu_2proc")
    assert two.returncode == 0, two.stderr
    one, both = (json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("one", "two"))
    assert one["eval_samples"] == both["eval_samples"] == 450
    assert one["eval_accuracy"] == both["eval_accuracy"] and one["eval_accuracy_top5"] == both["eval_accuracy_top5"]
    assert one["eval_loss"] == pytest.approx(both["eval_loss"], rel=1e-6)
    assert "450" in alone.stdout and "eval_accuracy" in alone.stdout
    kept = [read_predictions(tmp_path / name / FILE) for name in ("one", "two")]
    for name in ("index", "labels", "top5"):
        assert np.array_equal(*(getattr(predictions, name) for predictions in kept)), name
    for name in ("probabilities", "loss", "brier"):
        np.testing.assert_allclose(*(getattr(predictions, name) for predictions in kept), rtol=1e-4, atol=1e-6)
    assert kept[0].index.tolist() == list(range(450)) and kept[0].source == kept[1].source


@pytest.fixture
def shards(tmp_path):
    (tmp_path / "set/data").mkdir(parents=True)
    for number in range(4):
        shard(tmp_path / f"set/data/train-0000{number}-of-00004.parquet", 30 * number, 30)
    for number in range(2):
        shard(tmp_path / f"set/data/test-0000{number}-of-00002.parquet", 500 + 7 * number, 7)
    return tmp_path / "set"


def test_two_processes_stream_the_samples_of_one_and_go_on_from_its_checkpoint(tmp_path, shards):
    """From the start and from step 3 of 6, whatever the workers; each sample is evaluated once."""
    flags = dict(dataset_name=shards, streaming="true", max_eval_samples=None, shuffle_buffer_size=20, save_steps=3)
    flags = {name: value for name, value in {**RUN, **flags, "max_train_samples": None}.items() if value is not None}
    one, two, rest = tmp_path / "one", tmp_path / "two", tmp_path / "rest"
    in_process("pretrain", output_dir=one, dataloader_num_workers=0, **flags)
    result = launch("pretrain", "cpu_2proc", output_dir=two, dataloader_num_workers=1, **flags)
    assert result.returncode == 0, result.stderr
    flags["resume_from_checkpoint"] = one / "checkpoint-3"
    result = launch("pretrain", "cpu_2proc", output_dir=rest, dataloader_num_workers=2, **flags)
    assert result.returncode == 0, result.stderr
    close(trajectory(two), trajectory(one), 1e-4)
    close(trajectory(rest), trajectory(one)[3:], 1e-4)
    (resumed,) = [line for line in (rest / "events.jsonl").read_text().splitlines() if '"resume"' in line]
    why = ["engine single then, ddp now", "num_processes 1 then, 2 now", "micro_batch_size 32 then, 16 now"]
    assert json.loads(resumed)["why"][:3] == why
    for folder in (one, two, rest):
        assert lines(folder, "eval_accuracy")[-1]["eval_samples"] == 14


def test_a_wrong_data_flag_ends_both_processes_in_a_line(tmp_path):
    result = launch("pretrain", "cpu_2proc", output_dir=tmp_path, subset_classes="1,cat", **RUN)
    assert result.returncode == 1
    assert re.search(r"^(\[rank 1\] )?error: --subset_classes: 'cat' is not a class", result.stderr, re.M)
    # no traceback of ours, on any process; the launcher's own may pass through a folder that is called vit_hf too
    assert f'File "{ROOT}/vit_hf/' not in result.stderr and f'File "{ROOT}/run_' not in result.stderr


@pytest.mark.parametrize(("workers", "number"), [(0, signal.SIGTERM), (2, signal.SIGTERM), (2, signal.SIGINT)])
def test_a_signal_saves_a_checkpoint_and_the_run_goes_on(tmp_path, workers, number):
    """To the whole process group, as launchers and clusters send it, decoding workers included."""
    folder = tmp_path / "run"
    flags = {**RUN, "max_steps": 40, "save_steps": 1000, "eval_steps": 1000, "per_device_train_batch_size": 1}
    start = f"import runpy, sys; sys.argv = {['run_pretrain.py', *words({**flags, 'output_dir': folder})]}\n"
    if workers:  # as for a set that is too large to be kept decoded
        start += "import vit_hf.data.cache as cache; cache.DECODED_BYTES = 0\n"
        start += f"sys.argv += ['--dataloader_num_workers', '{workers}']\n"
    process = subprocess.Popen(
        [sys.executable, "-c", start + "runpy.run_path('run_pretrain.py', run_name='__main__')"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number and "Traceback" not in errors
    assert f"stopped by {number.name} after checkpoint-" in errors
    step = int(re.search(r"after checkpoint-(\d+)", errors)[1])
    assert 0 < step < 40 and (folder / f"checkpoint-{step}/manifest.json").exists()
    in_process("pretrain", output_dir=folder, **flags)
    assert [line["step"] for line in lines(folder)] == list(range(1, 41))
