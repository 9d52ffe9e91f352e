"""The metric modules, and evaluation that counts every sample once."""

import io
import socket
from types import SimpleNamespace

import accelerate
import datasets
import evaluate
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from torch import nn

from vit_hf.data.augment.pipeline import normalise
from vit_hf.data.batches import ImageBatches
from vit_hf.data.device import DeviceBatches
from vit_hf.data.faults import Faults
from vit_hf.data.order import EvalOrder
from vit_hf.data.preprocessing import Preprocessing
from vit_hf.data.rows.table import TableRows
from vit_hf.errors import UserError
from vit_hf.evaluation.evaluate import METRICS, evaluate_model, predict

MEAN, STD = torch.tensor([0.5] * 3), torch.tensor([0.5] * 3)


@pytest.fixture
def offline(monkeypatch):
    """HF_HUB_OFFLINE, and no connection to anywhere even if something tries."""

    def refuse(*_):
        raise AssertionError("a connection was opened")

    for module in ("huggingface_hub.constants", "datasets.config", "evaluate.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)


def scores(num: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.RandomState(num + classes)
    logits, labels = rng.randn(num, classes), rng.randint(0, classes, num)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True)), labels


@pytest.mark.parametrize("classes", [3, 5, 10])
def test_metrics_load_from_their_path_and_agree_with_scikit_learn(offline, classes):
    log_probabilities, labels = scores(200, classes)
    best = np.argsort(-log_probabilities, axis=1)[:, :5]
    known = np.arange(classes)
    expected = {
        "accuracy": accuracy_score(labels, best[:, 0]),
        "top5_accuracy": 1.0
        if classes <= 5
        else top_k_accuracy_score(labels, np.exp(log_probabilities), k=5, labels=known),
        "cross_entropy": log_loss(labels, np.exp(log_probabilities), labels=known),
    }
    given = {
        "accuracy": best[:, 0],
        "top5_accuracy": best,
        "cross_entropy": log_probabilities[np.arange(200), labels].astype(np.float32),
    }
    for name, value in expected.items():
        metric = evaluate.load(str(METRICS / name), keep_in_memory=True)
        assert metric.compute(predictions=given[name], references=labels) == {name: pytest.approx(value, abs=1e-6)}


class Scorer(nn.Module):
    """A fixed random linear classifier of pixels."""

    def __init__(self, classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * 16, classes, generator=torch.Generator().manual_seed(0)))

    def forward(self, pixel_values):
        return SimpleNamespace(logits=pixel_values.flatten(1) @ self.weight)


def image_set(num: int, classes: int, bad: tuple[int, ...] = ()) -> tuple[datasets.Dataset, np.ndarray]:
    pixels = np.random.RandomState(0).randint(0, 256, (num, 4, 4, 3)).astype(np.uint8)
    content = []
    for row in range(num):
        buffer = io.BytesIO()
        Image.fromarray(pixels[row]).save(buffer, "PNG")
        content.append({"bytes": b"bad" if row in bad else buffer.getvalue(), "path": None})
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(num_classes=classes)}
    )
    labels = np.random.RandomState(1).randint(0, classes, num)
    return datasets.Dataset.from_dict({"image": content, "label": labels.tolist()}, features=features), pixels


def batches_of(rows, batch_size, **options):
    batches = ImageBatches(TableRows(rows), Preprocessing((4, 4)), **options)
    places = EvalOrder(num_samples=len(rows), num_processes=1, rank=0, batch_size=batch_size)
    return DeviceBatches(batches, places, torch.device("cpu"), 0, Faults())


def measured(rows, batch_size, classes, **options) -> dict[str, float]:
    accelerator = accelerate.Accelerator(cpu=True)
    batches = batches_of(rows, batch_size, **options)
    return evaluate_model(Scorer(classes), batches, lambda pixels: normalise(pixels, MEAN, STD), accelerator)


def reference(pixels, labels, classes) -> dict[str, float]:
    values = (pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1) / 255 - 0.5) / 0.5
    logits = values @ Scorer(classes).weight.detach().numpy()
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    return {
        "eval_loss": pytest.approx(log_loss(labels, probabilities, labels=np.arange(classes)), rel=1e-4),
        "eval_accuracy": accuracy_score(labels, probabilities.argmax(1)),
        "eval_accuracy_top5": top_k_accuracy_score(labels, probabilities, k=5, labels=np.arange(classes)),
        "eval_samples": len(labels),
    }


@pytest.mark.parametrize("batch_size", [1, 4, 7, 23, 100])
def test_a_ragged_set_is_counted_once_whatever_the_batch(offline, batch_size):
    rows, pixels = image_set(23, 10)
    assert measured(rows, batch_size, 10) == reference(pixels, np.array(rows["label"]), 10)


def test_fewer_than_five_classes():
    """Top-5 is then every sample."""
    rows, _ = image_set(9, 3)
    found = measured(rows, 4, 3)
    assert found["eval_accuracy_top5"] == 1.0 and found["eval_samples"] == 9 and found["eval_accuracy"] < 1


def test_skipped_rows_are_not_counted():
    rows, pixels = image_set(23, 10, bad=(2, 22))
    good = [row for row in range(23) if row not in (2, 22)]
    found = measured(rows, 5, 10, on_bad_image="skip")
    assert found == reference(pixels[good], np.array(rows["label"])[good], 10)


def test_nothing_to_evaluate_is_an_error():
    rows, _ = image_set(2, 3, bad=(0, 1))
    with pytest.raises(UserError, match="no image of the evaluation split decodes"):
        measured(rows, 2, 3, on_bad_image="skip")


def test_predictions_come_in_the_order_of_the_dataset():
    """Also when the batches come in another order, as from several processes."""
    rows, _ = image_set(11, 10)
    accelerator, model = accelerate.Accelerator(cpu=True), Scorer(10)
    found = [
        predict(model, batches, lambda pixels: normalise(pixels, MEAN, STD), accelerator)
        for batches in (batches_of(rows, 11), reversed(list(batches_of(rows, 3))))
    ]
    assert found[0].labels.tolist() == found[1].labels.tolist() == rows["label"][:]
    assert np.array_equal(found[0].top5, found[1].top5) and found[1].index.tolist() == list(range(11))
    np.testing.assert_allclose(found[0].loss, found[1].loss, rtol=1e-5, atol=1e-5)


def test_a_model_of_an_earlier_version_is_scored_on_what_it_held_out(tmp_path):
    """Its seed decided; now --split_seed does."""
    from vit_hf.data.sets.names import trained_split_seed

    for text, expected in (("seed: 3\n", 3), ("seed: 3\nsplit_seed: 5\n", 5), ("- not ours\n", 0)):
        (tmp_path / "run_config.yaml").write_text(text)
        assert trained_split_seed(str(tmp_path)) == expected
    assert trained_split_seed(str(tmp_path / "nothing")) == 0


def test_a_checkpoint_says_which_images_its_run_held_out(tmp_path):
    from tests.runs import DEMO_DEFAULTS, in_process
    from vit_hf.data.sets.names import trained_split_seed

    in_process("pretrain", **{**DEMO_DEFAULTS, "max_steps": 1, "warmup_steps": 0}, split_seed=7, output_dir=tmp_path)
    assert trained_split_seed(str(tmp_path)) == trained_split_seed(str(tmp_path / "checkpoint-1")) == 7
