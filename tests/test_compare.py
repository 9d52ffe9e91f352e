"""`vit-hf compare` and `vit-hf evaluate --full` on digits models, and what they refuse."""

import dataclasses
import json
import shutil

import numpy as np
import pandas
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score

from tests.runs import DEMO_DEFAULTS, in_process
from vit_hf.cli import dispatch
from vit_hf.commands.given import split_revision
from vit_hf.errors import ArgumentError, UserError
from vit_hf.evaluation.predictions import FILE, read_predictions, write_predictions

SET = ["--dataset_name", "digits", "--max_eval_samples", "101"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two small runs that kept their answers; the second is trained longer."""
    root = tmp_path_factory.mktemp("compare")
    for name, steps in (("short", 3), ("long", 30)):
        flags = {**DEMO_DEFAULTS, "max_steps": steps, "save_predictions": "true", "eval_steps": steps}
        in_process("pretrain", output_dir=root / name, **flags)
    return root


def test_training_keeps_its_last_answers(models, tmp_path):
    """They are those of `vit-hf evaluate`, image by image, and give the run's own numbers."""
    dispatch(["evaluate", str(models / "long"), *SET, "--save_predictions", "--output_dir", str(tmp_path)])
    own, again = read_predictions(models / "long" / FILE), read_predictions(tmp_path / FILE)
    assert np.array_equal(own.index, again.index) and np.array_equal(own.top5[:, 0], again.top5[:, 0])
    assert own.source == again.source and own.class_names == again.class_names and len(own.class_names) == 10
    np.testing.assert_allclose(own.loss, again.loss, rtol=1e-4)
    results = json.loads((models / "long/all_results.json").read_text())
    assert results["eval_accuracy"] == own.correct.mean()
    from vit_hf.data.sets.load import SetSettings, load_set

    whole = load_set(SetSettings("digits", need_train=False)).rows("eval")
    for folder in (models / "long", tmp_path):  # the row of the split, not of the draw
        table = pandas.read_parquet(folder / FILE)
        assert np.array_equal(whole.read(table["row"].to_numpy())[1], table.label) and table["row"].max() > 101
    assert results["eval_loss"] == float(own.loss.astype(np.float64).mean())


def test_evaluate_tells_intervals(models, tmp_path, capsys):
    dispatch(["evaluate", str(models / "long"), *SET, "--output_dir", str(tmp_path)])
    results = json.loads((tmp_path / "eval_results.json").read_text())
    said = capsys.readouterr().out
    facts = [line.split()[0] for line in said.splitlines()]
    assert facts.count("eval_split") == 1 and "split" not in {*facts, *results} and "None" not in said.split()
    for name in ("eval_accuracy", "eval_accuracy_top5", "eval_loss"):
        low, high = results[f"{name}_interval"]
        assert 0 <= low < results[name] < high and f"[{low:.4f}, {high:.4f}]" in said
    assert not (tmp_path / FILE).exists() and not (tmp_path / "report.html").exists()


def test_the_full_report(models, tmp_path, capsys):
    """One page that needs no other file, with numbers that scikit-learn gives for the same answers."""
    dispatch(["evaluate", str(models / "short"), *SET, "--full", "--save_predictions", "--output_dir", str(tmp_path)])
    results = json.loads((tmp_path / "eval_results.json").read_text())
    table = pandas.read_parquet(tmp_path / FILE)
    best = table.top5_label.map(lambda row: row[0])
    assert results["eval_macro_f1"] == pytest.approx(f1_score(table.label, best, average="macro"))
    assert results["eval_brier"] == pytest.approx(table.brier.mean()) and "eval_brier_interval" in results
    assert 0 <= results["eval_expected_calibration_error"] <= 1
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and 'src="evaluation' not in page
    for part in ("Calibration", "Confusions", "Classes", "Worst errors", f"{results['eval_loss']:.4f}"):
        assert part in page
    wrong = table[table.label != best]
    worst = wrong.loc[wrong.loss.idxmax()]
    rows = [text.split("</td>")[0] for text in page.split("Worst errors")[1].split("<tr><td>")[1:]]
    from vit_hf.data.sets.load import SetSettings, load_set

    source = load_set(SetSettings("digits", max_eval_samples=101, need_train=False)).rows("eval").source_rows
    assert rows[0] == str(source[worst["index"]]) and len(rows) == min(24, len(wrong))


def test_a_page_of_right_answers_and_of_many_classes(models, tmp_path):
    """No error to show; and more classes than a matrix has room for."""
    from vit_hf.commands.evaluate_report import classes, confusions, worst_errors
    from vit_hf.evaluation.evaluate import measure_fully

    rng = np.random.RandomState(0)
    kept, names = read_predictions(models / "long" / FILE), tuple(f"class {number}" for number in range(40))
    labels = rng.randint(0, 40, len(kept))
    right = dataclasses.replace(kept, labels=labels, top5=labels[:, None], class_names=names)
    assert worst_errors(right, None) == ["No answer is wrong."]
    found = confusions(right, measure_fully(right)[1])
    assert found == ["No image of this set is confused with another class."]
    wrong = dataclasses.replace(right, top5=np.where(rng.rand(101) < 0.5, labels, 7)[:, None])
    numbers, details = measure_fully(wrong)
    (pairs,) = confusions(wrong, details)
    assert {row[1] for row in pairs.rows} == {"class 7"} and int(pairs.rows[0][2]) >= int(pairs.rows[-1][2])
    (table,) = classes(wrong, details)
    assert [row[2] for row in table.rows] == sorted(row[2] for row in table.rows)
    assert numbers["eval_mean_per_class_accuracy"] < 1


def test_two_models_are_compared(models, tmp_path, capsys):
    first, second = str(models / "long"), str(models / "short")
    dispatch(["compare", first, second, *SET, "--output_dir", str(tmp_path / "new")])
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "new/comparison.json").read_text())
    sides = [pandas.read_parquet(models / name / FILE) for name in ("long", "short")]
    best = [side.top5_label.map(lambda row: row[0]) for side in sides]
    assert found["accuracy"] == [accuracy_score(side.label, answer) for side, answer in zip(sides, best)]
    right = [side.label == answer for side, answer in zip(sides, best)]
    assert found["only_first_right"] == (right[0] & ~right[1]).sum() and found["samples"] == 101
    assert found["different_answers"] == (best[0] != best[1]).sum() > 0
    assert f"p = {found['mcnemar_p_value']:.4g}" in said and "only A" in said
    with Image.open(tmp_path / "new/comparison.png") as sheet:
        assert sheet.width > 500 and len(set(sheet.convert("L").tobytes())) > 50

    # the answers that the runs kept are enough; the set has the images
    dispatch(["compare", first, f"{second}/{FILE}", "--output_dir", str(tmp_path / "kept")])
    again = json.loads((tmp_path / "kept/comparison.json").read_text())
    assert again["accuracy"] == found["accuracy"] and again["mcnemar_p_value"] == found["mcnemar_p_value"]
    assert "no contact sheet" in capsys.readouterr().out and not (tmp_path / "kept/comparison.png").exists()
    files = [f"{first}/{FILE}", f"{second}/{FILE}"]
    dispatch(["compare", *files, *SET, "--output_dir", str(tmp_path / "kept")])
    assert (tmp_path / "kept/comparison.png").exists()
    dispatch(["compare", *files, "--output_dir", str(tmp_path / "kept")])  # no set, no picture: an older one goes
    assert not (tmp_path / "kept/comparison.png").exists()
    assert f"p = {found['mcnemar_p_value']:.4g}" in capsys.readouterr().out
    dispatch(["compare", *files])
    assert json.loads((models / "long/comparison/comparison.json").read_text())["samples"] == 101  # beside the first
    with pytest.raises(UserError, match="is of 'digits test .*', this set is 'digits test"):
        dispatch(["compare", *files, "--dataset_name", "digits", "--output_dir", str(tmp_path / "kept")])


def test_classes_under_other_numbers_are_the_same_classes(models, tmp_path):
    """A model that numbers its classes the other way round answers as before."""
    kept = read_predictions(models / "long" / FILE)
    turned = dataclasses.replace(
        kept, labels=9 - kept.labels, top5=9 - kept.top5, class_names=tuple(reversed(kept.class_names))
    )
    write_predictions(tmp_path / "turned.parquet", turned)
    words = [str(models / "long"), str(tmp_path / "turned.parquet"), "--output_dir", str(tmp_path)]
    dispatch(["compare", *words])
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert found["different_answers"] == 0 and found["accuracy_difference"] == 0.0


CHANGED = {
    "other draw": (lambda kept: dataclasses.replace(kept, source="digits train 0"), "on 'digits train 0'; evaluate both"),
    "fewer": (lambda kept: rows(kept, slice(1, None)), "evaluated on 101 images, .* on 100; evaluate both on one set"),
    "others": (lambda kept: dataclasses.replace(kept, index=kept.index + 1), "on 101 others; evaluate both"),
    "labels": (lambda kept: dataclasses.replace(kept, labels=(kept.labels + 1) % 10), r"row 0 is .* \(and 100 more differ"),
    "several": (lambda kept: dataclasses.replace(kept, labels=np.eye(10, dtype=bool)[kept.labels]), "on one label an image, .* on 10 classes, several"),
}  # fmt: skip


def rows(predictions, which):
    arrays = ("index", "labels", "top5", "probabilities", "loss", "brier")
    return dataclasses.replace(predictions, **{name: getattr(predictions, name)[which] for name in arrays})


@pytest.mark.parametrize("case", CHANGED)
def test_what_is_not_of_the_same_images_is_refused_in_one_line(models, tmp_path, case):
    change, message = CHANGED[case]
    write_predictions(tmp_path / "two.parquet", change(read_predictions(models / "long" / FILE)))
    words = [str(models / "long"), str(tmp_path / "two.parquet"), "--output_dir", str(tmp_path / "new")]
    with pytest.raises(UserError, match=message) as caught:
        dispatch(["compare", *words])
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()


def test_wrong_words_to_compare(models, tmp_path):
    shutil.copytree(models / "short", tmp_path / "bare", ignore=shutil.ignore_patterns(FILE, "checkpoint-*"))
    for words, error, message in (
        (
            [tmp_path / "bare", models / "long", "--output_dir", tmp_path],
            UserError,
            "bare holds no predictions.parquet",
        ),
        ([models / "long"], ArgumentError, "required: second"),
        ([models / "long", models / "long", "--output_dir", tmp_path / "bare/config.json"], UserError, "is a file"),
    ):
        with pytest.raises(error, match=message):
            dispatch(["compare", *map(str, words)])


def test_a_revision_stands_behind_an_id(tmp_path):
    (tmp_path / "run@home").mkdir()
    assert split_revision("org/model@v1.0") == ("org/model", "v1.0")
    assert split_revision("org/model") == ("org/model", None)
    assert split_revision(str(tmp_path / "run@home")) == (str(tmp_path / "run@home"), None)


def test_the_card_shows_what_was_measured_later(models, tmp_path):
    """A run's card lists each set that the model was evaluated on; numbers that go elsewhere change no card."""
    shutil.copytree(models / "short", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    before = (tmp_path / "run/README.md").read_text()
    words = ["evaluate", str(tmp_path / "run"), "--dataset_name", "digits"]
    dispatch([*words, "--output_dir", str(tmp_path / "elsewhere")])
    assert (tmp_path / "run/README.md").read_text() == before
    dispatch(words)
    after = (tmp_path / "run/README.md").read_text()
    accuracy = json.loads((tmp_path / "run/eval_results.json").read_text())["eval_accuracy"]
    assert f"{accuracy:.4f}" in after and f"{accuracy:.4f}" not in before and str(tmp_path) not in after
    (tmp_path / "run/README.md").write_text(after + "\nBy hand.\n")
    dispatch(words)
    assert (tmp_path / "run/README.md").read_text() == after + "\nBy hand.\n"
