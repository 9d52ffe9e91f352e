"""Probes against scikit-learn, the features that they read, and `vit-hf probe`."""

import json

import accelerate
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier

from tests.runs import DEMO_DEFAULTS, ROOT, in_process, python
from vit_hf.cli import dispatch
from vit_hf.commands.probe import ProbeArguments
from vit_hf.errors import ArgumentError, UserError
from vit_hf.evaluation import probes
from vit_hf.evaluation.features import extract_features

K = 5


def clouds(num: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping classes, neither centred nor of one scale, classes of equal size in turn."""
    rng = np.random.default_rng([seed, num])
    labels = np.arange(num) % K
    centres = np.random.default_rng(width).normal(size=(K, width))
    values = (centres[labels] + 2 * rng.normal(size=(num, width))) * np.linspace(0.1, 9, width) + 3
    return values.astype(np.float32), labels


def tensors(*arrays):
    return tuple(torch.from_numpy(array) for array in arrays)


@pytest.mark.parametrize("num, width", [(60, 100), (300, 40), (41, 40), (40, 40)])
def test_few_shot_regression_is_scikit_learns_ridge(num, width, monkeypatch):
    """On standardised features with a column of 100, in N and in D dimensions, also in several parts."""
    monkeypatch.setattr(probes, "BLOCK", 17 * width)
    (values, labels), (more, _) = clouds(num, width), clouds(200, width, seed=1)
    standard, weights = probes.fit_regression(*tensors(values, labels), K)
    assert weights.shape == (width + 1, K) and weights.dtype == torch.float64

    def prepared(part):
        exact = values.astype(np.float64)
        part = (part.astype(np.float64) - exact.mean(0)) / (exact.std(0) + 1e-5)
        return np.pad(part, ((0, 0), (0, 1)), constant_values=100.0)

    ridge = Ridge(alpha=1024.0, fit_intercept=False).fit(prepared(values), 2 * np.eye(K)[labels] - 1)
    np.testing.assert_allclose(weights.numpy(), ridge.coef_.T, rtol=1e-9, atol=1e-12)
    predicted = probes.regression(tensors(values, labels), torch.from_numpy(more), K)
    assert np.array_equal(predicted.numpy(), ridge.predict(prepared(more)).argmax(1))


@pytest.mark.parametrize("k", [1, 5, 20, 60])
def test_neighbours_are_those_of_scikit_learn(k, monkeypatch):
    """The weighted vote, the plain one, and no more neighbours than there are images; in blocks of seven images."""
    monkeypatch.setattr(probes, "BLOCK", 7 * 50)
    (values, labels), (more, _) = clouds(50, 12), clouds(100, 12, seed=1)
    given = (tensors(values, labels), torch.from_numpy(more), K)
    for temperature, weights in ((None, "uniform"), (0.07, lambda distance: np.exp((1 - distance) / 0.07))):
        reference = KNeighborsClassifier(min(k, 50), metric="cosine", weights=weights).fit(values, labels)
        found = probes.nearest(*given, k=k, temperature=temperature)
        assert np.array_equal(found.numpy(), reference.predict(more))


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_logistic_regression_is_scikit_learns(l2):
    values, labels = clouds(300, 12)
    standard = probes.Standard.of(torch.from_numpy(values))
    (inputs,) = standard.parts(torch.from_numpy(values))
    reference = LogisticRegression(C=1 / (l2 * 300), max_iter=5000, tol=1e-9).fit(inputs.numpy(), labels)
    weights = probes.fit_logistic(list(inputs.split(77)), torch.from_numpy(labels), K, l2)
    probabilities = torch.softmax(inputs @ weights[:-1] + weights[-1], 1)
    np.testing.assert_allclose(probabilities.numpy(), reference.predict_proba(inputs.numpy()), atol=1e-4)
    np.testing.assert_allclose(weights[:-1].numpy(), reference.coef_.T, atol=1e-3, rtol=1e-3)


def test_the_strength_is_chosen_on_a_fifth_of_each_class():
    values, labels = clouds(103, 30)
    mixed = np.random.default_rng(0).permutation(103)
    values, labels = values[mixed], labels[mixed]
    held_out = probes._every_fifth(torch.from_numpy(labels)).numpy()
    assert [int(held_out[labels == number].sum()) for number in range(K)] == [4, 4, 4, 4, 4]
    (inputs,) = probes.Standard.of(torch.from_numpy(values)).parts(torch.from_numpy(values))
    scores = [
        LogisticRegression(C=1 / (l2 * (~held_out).sum()), max_iter=5000, tol=1e-9)
        .fit(inputs.numpy()[~held_out], labels[~held_out])
        .score(inputs.numpy()[held_out], labels[held_out])
        for l2 in probes.L2_GRID
    ]
    chosen = probes.choose_l2([inputs[:50], inputs[50:]], torch.from_numpy(labels), K)
    assert chosen == probes.L2_GRID[int(np.argmax(scores))] and len(set(scores)) > 1
    assert probes.choose_l2([inputs[:10]], torch.from_numpy(labels[:10]), K) == 1e-3


def test_intervals_over_draws():
    from scipy import stats

    values = [0.90, 0.95, 0.99]
    expected = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert probes.interval_over_draws(values) == (pytest.approx(expected[0]), 1.0) and expected[1] > 1
    assert probes.interval_over_draws([0.9]) is None


def batches_of(pixels, batch_size):
    """Ragged, and not in the order of the set; the last place only fills up."""
    order = np.random.default_rng(0).permutation(len(pixels))
    for first in range(0, len(order), batch_size):
        index = torch.from_numpy(np.append(order[first : first + batch_size], 0))
        valid = torch.ones(len(index), dtype=torch.bool)
        valid[-1] = False
        yield {"pixel_values": pixels[index], "labels": index % 2, "index": index, "valid": valid}


SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
MODELS = {
    "cls": ("vit-demo-patch8-32", SMALL),
    "tanh": ("vit-demo-patch8-32", SMALL | {"head_hidden_size": 24, "pooling": "mean"}),
    "map": ("vit-demo-patch8-32", SMALL | {"pooling": "map"}),
    "resnet": ("resnet18", {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16]}),
    "bit": ("bit-resnet50", {"embedding_size": 8, "hidden_sizes": [16, 16, 16, 32], "num_groups": 4}),
}


@pytest.mark.parametrize("name", MODELS)
def test_features_are_what_the_last_layer_reads(name):
    """The model's own head, put on them, gives its logits; in the order of the set, each image once."""
    from vit_hf.models.presets import PRESETS, from_preset

    preset, changes = MODELS[name]
    if preset not in PRESETS:
        preset = next(known for known in PRESETS if known.startswith(name))
    torch.manual_seed(0)
    model = from_preset(preset, ["a", "b"], changes).eval()
    torch.nn.init.normal_(model.classifier[-1].weight if name in ("resnet", "bit") else model.classifier.weight)
    size = getattr(model.config, "image_size", None) or 32
    pixels = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (7, 3, size, size)).astype(np.uint8))
    accelerator = accelerate.Accelerator(cpu=True)
    found = extract_features(model, batches_of(pixels, 3), lambda x: x / 255, accelerator)
    assert found.values.dtype == torch.float32 and found.index.tolist() == list(range(7))
    assert found.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    with torch.no_grad():
        logits = model.classifier(found.values[..., None, None] if name in ("resnet", "bit") else found.values)
        expected = model(pixel_values=pixels / 255).logits
    np.testing.assert_allclose(logits.numpy(), expected.numpy(), rtol=1e-4, atol=1e-5)
    assert found.at(torch.tensor([1, 5, 99])).index.tolist() == [1, 5]


def test_a_model_without_a_classifier_is_refused():
    with pytest.raises(UserError, match="Linear has no layer `classifier`"):
        extract_features(torch.nn.Linear(2, 2), [], None, accelerate.Accelerator(cpu=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe") / "run"
    in_process("pretrain", output_dir=folder, **DEMO_DEFAULTS)
    return folder


def probe(folder, *words):
    dispatch(["probe", str(folder), "--dataset_name", "digits", "--max_eval_samples", "101", *words])
    return json.loads((folder / "probe_results.json").read_text())


@pytest.mark.slow
def test_the_command_on_real_digits(trained, capsys):
    """The same again the second time; more images are better; scikit-learn finds the same on the same features."""
    found = probe(trained, "--shots", "2,25,all", "--probe_draws", "2")
    shown = capsys.readouterr().out
    again = probe(trained, "--shots", "2,25,all", "--probe_draws", "2", "--methods", "regression,knn")
    assert again["results"] == [line for line in found["results"] if line["method"] != "logistic"]
    by_name = {(line["method"], line["shots"]): line for line in found["results"]}
    assert len(by_name) == len(found["results"]) == 9
    for method in ("regression", "knn", "logistic"):
        few, many, every = (by_name[method, shots] for shots in (2, 25, "all"))
        assert (few["train_samples"], many["train_samples"], every["train_samples"]) == (20, 250, 1347)
        assert few["accuracy"] < every["accuracy"] and len(few["accuracies"]) == 2 and every["interval"] is None
        assert few["accuracy"] == np.mean(few["accuracies"]) and few["interval"][0] <= few["accuracy"]
        assert f"{every['accuracy']:.4f}" in shown
    assert found["eval_samples"] == 101 and found["feature_size"] == 32 and found["eval_split"] == "test"
    assert all(len(line["l2"]) == len(line["accuracies"]) for key, line in by_name.items() if key[0] == "logistic")


def test_a_draw_is_the_same_for_all_models_and_a_part_of_larger_ones():
    from vit_hf.data.sets.draws import Draws
    from vit_hf.data.sets.load import load_image_splits

    splits = load_image_splits("digits")
    drawn = Draws(splits, "--shots")
    labels = splits.rows("train").labels
    few, more, other = drawn.rows(3, 0), drawn.rows(10, 0), drawn.rows(3, 1)
    assert np.bincount(labels[few]).tolist() == [3] * 10 and np.bincount(labels[more]).tolist() == [10] * 10
    assert set(few) < set(more) and set(few) != set(other) and np.array_equal(few, Draws(splits, "x").rows(3, 0))
    again = drawn.images(few)
    assert np.array_equal(again.labels, labels[few]) and np.array_equal(again.source_rows, few)
    assert again.read(np.array([4]))[0] == splits.rows("train").read(few[[4]])[0]


@pytest.mark.parametrize(
    "words, error, message",
    [
        (["--shots", "5,x"], ArgumentError, "--shots: '5,x' is no list of numbers"),
        (["--shots", "0"], ArgumentError, "--shots: '0' is no list"),
        (["--methods", "knn,svm"], ArgumentError, "--methods: 'svm' is not one of regression, knn, logistic"),
        (
            ["--shots", "5000"],
            UserError,
            r"--shots: asks for 5000 images of each class, and class \S+ has 1\d\d training",
        ),
    ],
)
def test_wrong_words_are_one_line(trained, words, error, message):
    with pytest.raises(error, match=message):
        probe(trained, *words)
    with pytest.raises(ArgumentError, match="--dataset_name is missing"):
        dispatch(["probe", str(trained)])


@pytest.mark.slow
def test_two_processes_find_the_same(trained, tmp_path):
    alone = probe(trained, "--shots", "5,all", "--methods", "regression,knn")
    result = python(
        "-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_configs/cpu_2proc.yaml",
        ROOT / "vit_hf/cli.py", "probe", trained, "--dataset_name", "digits", "--max_eval_samples", "101",
        "--shots", "5,all", "--methods", "regression,knn", "--output_dir", tmp_path, "--per_device_eval_batch_size", "64",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "probe_results.json").read_text()) == alone


def test_the_defaults_are_those_of_the_papers():
    defaults = ProbeArguments()
    assert defaults.shots == (5, 10, 25, None) and defaults.probe_draws == 3 and defaults.knn_k == 20
    assert (probes.L2, probes.BIAS) == (1024, 100)
