"""Sets with several labels an image, end to end: trained by `accelerate launch`, evaluated, used, described."""

import json

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from transformers import pipeline

from tests.pairs import NAMES, pictures, write_pairs
from tests.runs import DEMO_DEFAULTS, launch, lines

pytestmark = pytest.mark.slow


def test_two_processes_train_on_pairs_of_digits_and_the_folder_is_a_model_of_several_labels(tmp_path, capsys):
    from vit_hf.commands.evaluate import main as evaluate

    folder, run = write_pairs(tmp_path / "pairs", {"train": 256, "test": 45}), tmp_path / "run"
    flags = DEMO_DEFAULTS | dict(dataset_name=folder, max_steps=30, learning_rate=3e-3, mixup_alpha=0.2, logging_steps=5,
                                 label_smoothing_factor=0.01, random_crop="padding=2", max_eval_samples="none")  # fmt: skip
    flags["config_overrides"] += ",head_bias_init=-2"
    result = launch("pretrain", "cpu_2proc", output_dir=run, **flags)
    assert result.returncode == 0, result.stderr[-3000:]
    own = json.loads((run / "all_results.json").read_text())
    course = [line["loss"] for line in lines(run)]
    assert course[-1] < course[0] and own["eval_samples"] == 45 and "eval_accuracy" not in own
    assert f"done: mean average precision {own['eval_map']:.4f} on 45 images" in result.stdout
    assert json.loads((run / "config.json").read_text())["problem_type"] == "multi_label_classification"

    # one process finds what two have found
    evaluate(
        [str(run), "--dataset_name", str(folder), "--output_dir", str(tmp_path / "out"), "--save_predictions", "true"]
    )
    found = json.loads((tmp_path / "out/eval_results.json").read_text())
    for name in ("eval_loss", "eval_map", "eval_f1_micro", "eval_f1_macro"):
        assert found[name] == pytest.approx(own[name], rel=1e-5), name
    assert found["average_precision"].keys() == set(NAMES) and "average_precision" in capsys.readouterr().out

    # a user's pipeline has the same scores: scikit-learn finds the same mean average precision in them
    test = pictures(45, 1)
    answers = pipeline("image-classification", str(run))(test["image"], top_k=10)
    scores = np.array([[{a["label"]: a["score"] for a in answer}[name] for name in NAMES] for answer in answers])
    truth = np.array([[k in row for k in range(10)] for row in test["labels"]])
    expected = np.mean([average_precision_score(truth[:, k], scores[:, k]) for k in range(10) if truth[:, k].any()])
    assert found["eval_map"] == pytest.approx(expected, abs=1e-5)
    assert not np.allclose(scores.sum(1), 1)  # each class by itself

    card = (run / "README.md").read_text()
    assert f"{own['eval_map']:.4f}" in card and "mean_average_precision" in card and "| accuracy |" not in card
