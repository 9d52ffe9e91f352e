"""`vit-hf evaluate`, `compare`, `predict` and `bench` on a model whose images have several labels."""

import dataclasses
import json

import numpy as np
import pandas
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score

from tests.pairs import NAMES, write_pairs
from vit_hf.cli import dispatch
from vit_hf.evaluation.predictions import FILE, read_predictions, write_predictions
from vit_hf.models.presets import from_preset

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A set, and two models of random weights; the second numbers the classes the other way round."""
    import torch

    root = tmp_path_factory.mktemp("several")
    write_pairs(root / "set", {"train": 8, "test": 40})
    for seed, (name, names) in enumerate({"one": NAMES, "two": NAMES[::-1]}.items()):
        torch.manual_seed(seed)
        model = from_preset("vit-demo-patch8-32", names, SMALL)
        model.config.problem_type = "multi_label_classification"
        model.save_pretrained(root / name)
    return root


@pytest.mark.slow
def test_the_full_page_has_average_precisions_and_intervals(given, tmp_path):
    words = ["--eval_datasets", str(given / "set"), "--full", "--save_predictions", "--output_dir", str(tmp_path)]
    dispatch(["evaluate", str(given / "one"), *words])
    results = json.loads((tmp_path / "eval_results.json").read_text())
    kept = read_predictions(tmp_path / FILE)
    present = [k for k in range(10) if kept.labels[:, k].any()]
    expected = np.mean([average_precision_score(kept.labels[:, k], kept.scores[:, k]) for k in present])
    assert results["eval_map"] == pytest.approx(expected, abs=1e-6) and results["eval_samples"] == 40
    micro = f1_score(kept.labels, kept.scores > 0.5, average="micro", zero_division=0)
    assert results["eval_f1_micro"] == pytest.approx(micro)
    for name in ("eval_map", "eval_loss", "eval_brier", "eval_f1_macro"):
        low, high = results[f"{name}_interval"]
        assert low <= results[name] <= high
    page = (tmp_path / "report.html").read_text()
    assert "average precision" in page and "Confusions" not in page and "eval_map" in page


def test_two_models_that_number_the_classes_differently(given, tmp_path, capsys):
    models = [str(given / "one"), str(given / "two")]
    dispatch(["compare", *models, "--dataset_name", str(given / "set"), "--output_dir", str(tmp_path)])
    found, said = json.loads((tmp_path / "comparison.json").read_text()), capsys.readouterr().out
    low, high = found["map_difference_interval"]
    assert low < found["map_difference"] < high and f"map       A {found['map'][0]:.4f}" in said
    for side, model in enumerate(models):
        dispatch(["evaluate", model, "--dataset_name", str(given / "set"), "--output_dir", str(tmp_path / str(side))])
        alone = json.loads((tmp_path / str(side) / "eval_results.json").read_text())
        assert alone["eval_map"] == pytest.approx(found["map"][side])
    with Image.open(tmp_path / "comparison.png") as sheet:
        assert sheet.width > 500


def test_the_same_answers_under_other_numbers_do_not_differ(given, tmp_path):
    words = ["--dataset_name", str(given / "set"), "--save_predictions", "--output_dir", str(tmp_path)]
    dispatch(["evaluate", str(given / "one"), *words])
    kept = read_predictions(tmp_path / FILE)
    turned = dataclasses.replace(
        kept, labels=kept.labels[:, ::-1], scores=kept.scores[:, ::-1], top5=9 - kept.top5, class_names=kept.class_names[::-1]
    )  # fmt: skip
    write_predictions(tmp_path / "turned.parquet", turned)
    dispatch(["compare", str(tmp_path / FILE), str(tmp_path / "turned.parquet"), "--output_dir", str(tmp_path)])
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert found["map_difference"] == 0 and found["different_answers"] == 0


def test_each_class_that_it_is_sure_of_is_told(given, tmp_path):
    dispatch(["predict", str(given / "one"), str(given / "set"), "--output_file", str(tmp_path / "answers.parquet")])
    table = pandas.read_parquet(tmp_path / "answers.parquet")
    assert len(table) == 40 and (table.probabilities.map(len) == 5).all()
    for sure, share in zip(table.sure_classes, table.probabilities, strict=True):
        assert min(5, len(sure)) == (share >= 0.5).sum()
