import json

import pytest

from tests.runs import DEMO_DEFAULTS, in_process, python
from vit_hf.cli import dispatch, match_classes
from vit_hf.errors import ArgumentError, UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "first"
    in_process("pretrain", output_dir=folder, **DEMO_DEFAULTS)
    return folder


def test_evaluate_repeats_the_runs_own_evaluation(trained, capsys):
    dispatch(
        [
            "evaluate",
            str(trained),
            "--dataset_name",
            "digits",
            "--max_eval_samples",
            "101",
            "--per_device_eval_batch_size",
            "7",
        ]
    )
    results = json.loads((trained / "eval_results.json").read_text())
    own = json.loads((trained / "all_results.json").read_text())
    assert results["eval_accuracy"] == own["eval_accuracy"] and results["eval_samples"] == own["eval_samples"] == 101
    assert results["eval_loss"] == pytest.approx(own["eval_loss"], rel=1e-5)
    assert f"{results['eval_accuracy']:.4f}" in capsys.readouterr().out


def test_classes_are_matched_by_name():
    assert match_classes(["ship", "cat"], ["cat", "dog", "ship"]) == [2, 0]
    assert match_classes(["a", "b"], ["LABEL_0", "LABEL_1"]) is None
    assert match_classes(["crane", "cat", "crane"], ["crane", "cat", "crane"]) == [0, 1, 2]  # a name may repeat
    assert match_classes(["crane", "cat", "other crane"], ["crane", "cat", "crane"]) is None
    with pytest.raises(UserError, match="the model has 3 classes .* the dataset 2 others"):
        match_classes(["a", "b"], ["cat", "dog", "ship"])


def test_a_model_of_some_classes_is_evaluated_on_their_images(tmp_path, capsys):
    folder = tmp_path / "run"
    in_process("pretrain", **{**DEMO_DEFAULTS, "subset_classes": "3,5", "max_eval_samples": 1000}, output_dir=folder)
    dispatch(["evaluate", str(folder), "--dataset_name", "digits"])
    results, own = (json.loads((folder / f"{name}_results.json").read_text()) for name in ("eval", "all"))
    assert results["eval_samples"] == own["eval_samples"] < 100 and results["eval_accuracy"] == own["eval_accuracy"]
    assert "knows 2 of the classes" in capsys.readouterr().out


def test_a_model_without_a_head_is_not_evaluated(trained, tmp_path):
    import transformers

    transformers.ViTModel.from_pretrained(trained).save_pretrained(tmp_path / "headless")
    with pytest.raises(UserError, match="missing classifier.bias, classifier.weight"):
        dispatch(["evaluate", str(tmp_path / "headless"), "--dataset_name", "digits"])


def test_evaluate_on_foreign_classes_is_one_line(trained):
    result = python("-m", "vit_hf.cli", "evaluate", trained, "--dataset_name", "glyphs")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")][0].startswith(
        "error: the model has 10 classes"
    )


def test_report_puts_runs_side_by_side(trained, tmp_path, capsys):
    dispatch(["report", str(trained), str(trained), "--output_dir", str(tmp_path)])
    table = capsys.readouterr().out
    assert table.count(f"| {trained}") == 2 and "0.02 M" in table  # one name twice: the whole paths tell them apart
    assert (tmp_path / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="holds no finished run"):
        dispatch(["report", str(tmp_path)])


def test_unknown_command():
    with pytest.raises(ArgumentError, match="unknown command 'evalute', did you mean 'evaluate'"):
        dispatch(["evalute"])
    with pytest.raises(ArgumentError, match="--dataset_name is missing"):
        dispatch(["evaluate", "folder"])


def test_tensorboard_gets_the_numbers(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run("pretrain", max_steps=3, report_to="tensorboard")
    events = min(
        folder.rglob("events.out.tfevents*"), key=lambda path: len(path.parts)
    )  # the deeper one holds the flags
    log = EventAccumulator(str(events.parent)).Reload()
    assert [event.step for event in log.Scalars("loss")] == [1, 2, 3]


def test_dry_run_writes_nothing(run, tmp_path, capsys):
    run("pretrain", dry_run="true", per_device_train_batch_size=8)
    said = capsys.readouterr().out
    assert "1 processes x 8 images x 4 accumulation steps" in said and not (tmp_path / "run").exists()
