"""`--loss sigmoid`: what is minimised, where it is recorded, and how several labels an image are judged."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.metrics import average_precision_score, f1_score, log_loss
from transformers import AutoModelForImageClassification

from tests.runs import in_process, lines
from vit_hf.errors import UserError
from vit_hf.evaluation.evaluate import average_precisions, measure, metric, predict
from vit_hf.models import ViTConfig, ViTForImageClassification
from vit_hf.training.objective import Objective, choose_objective, loss_of

TINY = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
)
TINY_RUN = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64,head_bias_init=-10"


@pytest.mark.parametrize("seed", [0, 1])
def test_the_sigmoid_loss_is_a_question_for_each_class(seed):
    """Against scikit-learn's log loss of each class by itself."""
    rng = np.random.default_rng(seed)
    logits, truth = rng.normal(size=(9, 5)) * 3, rng.integers(0, 2, size=(9, 5))
    shares = 1 / (1 + np.exp(-logits))
    expected = sum(log_loss(truth[:, k], shares[:, k], labels=[0, 1]) for k in range(5))
    found = Objective("sigmoid")(torch.tensor(logits), torch.tensor(truth, dtype=torch.float64))
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_softmax_is_torchs_to_the_bit():
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.softmax(logits.flip(0), dim=1)
    assert torch.equal(Objective()(logits, targets), torch.nn.functional.cross_entropy(logits, targets))


def test_a_head_that_begins_at_minus_ten_begins_at_the_loss_of_no_answer():
    model = ViTForImageClassification(ViTConfig(**TINY, num_labels=7, head_bias_init=-10.0))
    torch.nn.init.zeros_(model.classifier.weight)
    logits = model(torch.zeros(3, 3, 8, 8)).logits
    targets = torch.eye(7)[[1, 4, 4]]
    by_hand = 10 + 7 * math.log1p(
        math.exp(-10)
    )  # one class of seven is there: 10 for it, next to nothing for the others
    assert Objective("sigmoid")(logits, targets).item() == pytest.approx(by_hand, rel=1e-6)
    assert Objective("softmax")(logits, targets).item() == pytest.approx(
        math.log(7), rel=1e-6
    )  # which cancels the bias


def test_the_loss_is_that_of_the_flag_or_of_the_labels_and_is_recorded():
    for asked, multi_label, expected in (
        ("auto", False, "softmax"), ("auto", True, "sigmoid"), ("sigmoid", False, "sigmoid"), ("sigmoid", True, "sigmoid"),
    ):  # fmt: skip
        config = ViTConfig(**TINY)
        assert choose_objective(asked, multi_label, config).loss == loss_of(config) == expected
        assert config.problem_type == ("multi_label_classification" if expected == "sigmoid" else None)
    assert (
        choose_objective("softmax", False, config).loss == loss_of(config) == "softmax"
    )  # other than the weights' own
    with pytest.raises(UserError, match="--loss softmax: needs one label an image"):
        choose_objective("softmax", True, config)


def answered(scores, truth, classes=6, loss="sigmoid", sizes=(5, 4)):
    """Predictions of a model that gives `scores` as logits, batch by batch."""
    model = lambda pixel_values: SimpleNamespace(logits=pixel_values[:, 0, 0, :classes])  # noqa: E731
    starts = np.cumsum([0, *sizes])
    batches = []
    for start, stop in zip(starts[:-1], starts[1:], strict=True):
        rows = torch.arange(start, stop)
        pixels = torch.tensor(scores[start:stop])[:, None, None, :]
        batches.append({"pixel_values": pixels, "labels": torch.tensor(truth[start:stop]).float(), "index": rows,
                        "valid": torch.ones(len(rows), dtype=torch.bool)})  # fmt: skip
    return predict(model, batches, lambda pixels: pixels, Accelerator(), [str(k) for k in range(classes)], loss=loss)


def test_several_labels_are_judged_as_scikit_learn_judges_them():
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 2, size=(9, 6))
    truth[4], truth[:, 2] = 0, 0  # an image without a label, a class without an image
    logits = rng.normal(size=(9, 6)).round(1).astype(np.float32)  # rounded: some score the same
    predictions = answered(logits, truth)
    shares = 1 / (1 + np.exp(-logits.astype(np.float64)))
    present = [0, 1, 3, 4, 5]
    each = [average_precision_score(truth[:, k], shares[:, k]) for k in present]
    expected = {
        "eval_loss": sum(log_loss(truth[:, k], shares[:, k], labels=[0, 1]) for k in range(6)),
        "eval_map": np.mean(each),
        "eval_f1_micro": f1_score(truth, shares > 0.5, average="micro"),
        "eval_f1_macro": f1_score(truth, shares > 0.5, average="macro", labels=present, zero_division=0),
        "eval_samples": 9,
    }
    found = measure(predictions, multi_label=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    by_class = average_precisions(predictions)["average_precision"]
    assert by_class[2] is None and np.allclose([by_class[k] for k in present], each, atol=1e-6)


def test_micro_f1_counts_all_decisions_together():
    rng = np.random.default_rng(5)
    truth, answer = rng.integers(0, 2, size=(2, 20, 4)).astype(bool)
    found = metric("multi_label_f1", answer, truth)
    assert found["f1_micro"] == pytest.approx(f1_score(truth, answer, average="micro"))
    assert found["f1_macro"] == pytest.approx(f1_score(truth, answer, average="macro"))


def test_a_set_of_fewer_classes_than_the_model_knows():
    truth, logits = np.eye(3)[[0, 1, 2, 0, 1, 2, 0, 1, 2]], np.zeros((9, 6), dtype=np.float32)
    found = answered(logits, truth)
    assert found.labels.shape == found.scores.shape == (9, 6) and not found.labels[:, 3:].any()
    assert np.allclose(found.loss, 6 * math.log(2))


def test_an_image_without_a_label_is_nothing_for_softmax():
    truth = np.eye(6)[[0, 1, 2, 3, 4, 5, 0, 1, 2]]
    truth[7] = 0
    with pytest.raises(UserError, match="row 7 of the evaluation split has no label"):
        answered(np.zeros((9, 6), dtype=np.float32), truth, loss="softmax")


def test_a_run_of_single_labels_by_sigmoid_learns_and_is_evaluated_by_the_same_loss(tmp_path, capsys):
    """Sigmoid from a head at -10, on the digits."""
    from vit_hf.commands.evaluate import main as evaluate

    in_process("pretrain", output_dir=tmp_path, preset="vit-demo-patch8-32", config_overrides=TINY_RUN, dataset_name="digits",
               loss="sigmoid", max_steps=120, global_batch_size=32, learning_rate=1e-2, warmup_steps=10, logging_steps=10,
               max_eval_samples=64)  # fmt: skip
    course = [line["loss"] for line in lines(tmp_path)]
    # who tells no class from another is at 3.25: 10 x the entropy of one in ten
    assert course[0] > 8 and course[-1] < 2.8
    assert (
        AutoModelForImageClassification.from_pretrained(tmp_path).config.problem_type == "multi_label_classification"
    )
    evaluate(
        [str(tmp_path), "--dataset_name", "digits", "--max_eval_samples", "64", "--output_dir", str(tmp_path / "out")]
    )
    own = lines(tmp_path, "eval_loss")[-1]
    again = json.loads((tmp_path / "out/eval_results.json").read_text())
    assert again["eval_accuracy"] == own["eval_accuracy"] > 0.3
    assert again["eval_loss"] == pytest.approx(own["eval_loss"], rel=1e-6)
