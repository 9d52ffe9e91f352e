"""`vit-hf predict`: what it finds, what it answers, what it writes and copies."""

import csv
import io
import json
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import transformers
from PIL import Image

from tests.test_benchmarks import model_names, picture
from vit_hf.cli import dispatch
from vit_hf.commands.predicted import copy_to_classes, folder_names, image_files, walk
from vit_hf.data.preprocessing import Preprocessing
from vit_hf.data.sets.load import SetSettings, load_set
from vit_hf.errors import ArgumentError, UserError
from vit_hf.models.configuration_vit import ViTConfig
from vit_hf.models.modeling_vit import ViTForImageClassification

NAMES = ["cat", "a/b: c", "..", "ship", "dog", "frog"]


def make(folder, **fields):
    """A small model with random weights and awkward names of classes."""
    config = ViTConfig(
        image_size=8, patch_size=8, hidden_size=48, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        num_labels=len(NAMES), initializer_range=0.5, **fields,
    )  # fmt: skip
    config.id2label, config.label2id = dict(enumerate(NAMES)), {name: number for number, name in enumerate(NAMES)}
    transformers.set_seed(0)
    ViTForImageClassification(config).save_pretrained(folder)
    Preprocessing((8, 8)).image_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make(tmp_path_factory.mktemp("predict") / "model")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve pictures in folders, and a file that is none; names and modes differ."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(12):
        place = folder / ("b" if number % 3 else "a") / ("deep" if number % 2 else "")
        place.mkdir(parents=True, exist_ok=True)
        image = Image.open(io.BytesIO(picture(number))).resize((9 + number, 20 - number))
        image.convert("L" if number == 4 else "RGB").save(place / f"{number // 2}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def asked(model, files) -> list[list[dict]]:
    pipe = transformers.pipeline("image-classification", model=model, top_k=6)
    return [pipe(file) for file in files]


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_a_folder_is_walked_by_name_and_answered_as_the_pipeline_does(model, photos, tmp_path, suffix):
    out = tmp_path / f"new/answers{suffix}"
    flags = [
        "--output_file",
        str(out),
        "--top_k",
        "3",
        "--per_device_eval_batch_size",
        "5",
        "--dataloader_num_workers",
        "0",
    ]
    dispatch(["predict", model, str(photos), *flags])
    if suffix == ".csv":
        rows = list(csv.DictReader(out.open()))
        found = [[row[f"class_{number}"] for number in (1, 2, 3)] for row in rows]
        probabilities = [[float(row[f"probability_{number}"]) for number in (1, 2, 3)] for row in rows]
    else:
        text = out.read_text() if suffix != ".parquet" else ""
        rows = {
            ".json": lambda: json.loads(text),
            ".jsonl": lambda: [json.loads(line) for line in text.splitlines()],
            ".parquet": lambda: pq.read_table(out).to_pylist(),
        }[suffix]()
        found, probabilities = [row["classes"] for row in rows], [row["probabilities"] for row in rows]
    files = sorted(photos.rglob("*.png"), key=lambda path: path.parts)
    assert [row["image"] for row in rows] == [str(path) for path in files]
    expected = asked(model, [str(path) for path in files])
    assert found == [[one["label"] for one in answer[:3]] for answer in expected]
    np.testing.assert_allclose(probabilities, [[one["score"] for one in answer[:3]] for answer in expected], atol=2e-6)
    assert [path.name for path in out.parent.iterdir()] == [out.name]  # nothing half written beside it


def test_the_table_is_alone_on_stdout_and_bad_images_are_named_and_counted(model, photos, tmp_path, capfd):
    (tmp_path / "bad.png").write_bytes(b"no image")
    words = [str(photos / "a" / "0.png"), str(tmp_path / "bad.png"), "--dataloader_num_workers", "0"]
    with pytest.raises(UserError, match=r"row 1 does not decode: file .*bad\.png"):
        dispatch(["predict", model, *words])
    capfd.readouterr()
    dispatch(["predict", model, *words, "--on_bad_image", "skip", "--top_k", "1"])
    told = capfd.readouterr()
    (best, *_), *_ = asked(model, words[:1])
    header, line = told.out.splitlines()
    assert header.split() == ["image", *"class and probability, best first".split()]
    assert line.split() == [words[0], *best["label"].split(), f"{best['score']:.4f}"]
    assert "bad.png" in told.err and "left out: 1 images that do not decode" in told.err and "it/s" not in told.err


def test_a_set_has_row_and_label(model, tmp_path, capsys):
    """The row of a draw is that of the split, where the image is found again."""
    out = tmp_path / "answers.jsonl"
    dispatch(["predict", model, "digits", "--max_eval_samples", "7", "--output_file", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    whole = load_set(SetSettings("digits", need_train=False)).rows("eval")
    _, labels = whole.read(np.array([row["row"] for row in rows]))
    assert [row["label"] for row in rows] == [str(label) for label in labels.tolist()] and len(rows) == 7
    assert [row["row"] for row in rows] != list(range(7)) and rows == sorted(rows, key=lambda row: row["row"])
    capsys.readouterr()
    dispatch(["predict", model, "digits", "--max_eval_samples", "7", "--top_k", "2"])
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["row", "label", "class"] and len(lines) == 7
    assert [line.split()[:2] for line in lines] == [[str(row["row"]), row["label"]] for row in rows]
    assert all(len(row["classes"]) == 5 and "image" not in row for row in rows)
    with pytest.raises(ArgumentError, match="--copy_to .*not for a set"):
        dispatch(["predict", model, "digits", "--copy_to", str(tmp_path / "copies")])


def test_a_model_of_several_classes_tells_those_that_it_is_sure_of(photos, tmp_path):
    model = make(tmp_path / "several", problem_type="multi_label_classification")
    out, copies = tmp_path / "answers.json", tmp_path / "copies"
    flags = ["--output_file", str(out), "--top_k", "6", "--copy_to", str(copies), "--tta", "flip"]
    dispatch(["predict", model, str(photos / "b"), *flags, "--dataloader_num_workers", "0"])
    rows = json.loads(out.read_text())
    for row in rows:
        sure = {name for name, value in zip(row["classes"], row["probabilities"]) if value >= 0.5}
        assert set(row["sure_classes"]) == sure
    assert {len(row["sure_classes"]) for row in rows} != {1} and sum(rows[0]["probabilities"]) != pytest.approx(1)
    assert len([path for path in copies.rglob("*") if path.is_file()]) == sum(max(1, len(row["sure_classes"])) for row in rows)  # fmt: skip


def test_names_of_folders_are_safe_and_distinct():
    names = ["a/b: c", "..", "cat", "CAT", "x" * 300, "a_b_ c", "_none", " dog. ", "", "été"]
    found = folder_names(names)
    assert found[:4] == ["a_b_ c", "_", "cat", "CAT_3"] and found[7] == "dog" and found[9] == "été"
    assert len({name.casefold() for name in found}) == len(names) and "_none" not in found
    assert all(len(name.encode()) <= 255 and not set("/\\:") & set(name) and name not in (".", "..") for name in found)
    assert len(set(folder_names(model_names()))) == 1000


def test_copies_never_overwrite(tmp_path):
    rows = []
    for place in ("one", "two", "three"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "x.png").write_text(place)
        rows.append({"image": str(tmp_path / place / "x.png"), "numbers": [1]})
    (tmp_path / "sorted/a_b").mkdir(parents=True)
    (tmp_path / "sorted/a_b/x.png").write_text("somebody's")
    assert copy_to_classes(rows, ["cat", "a/b"], tmp_path / "sorted") == 3
    found = {path.name: path.read_text() for path in (tmp_path / "sorted/a_b").iterdir()}
    assert found == {"x.png": "somebody's", "x_2.png": "one", "x_3.png": "two", "x_4.png": "three"}


def test_what_words_name(photos, tmp_path):
    found, others = walk(photos)
    assert len(found) == 12 and others == 1 and found == sorted(found, key=lambda path: path.split("/"))
    assert image_files(["digits"]) is None and image_files(["owner/name"]) is None
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.parquet").write_bytes(b"")
    assert image_files([str(tmp_path / "set")]) is None  # a set that lies in a folder
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image files in it"):
        image_files([str(tmp_path / "empty")])
    for words in (["nothing.png"], ["digits", str(photos)]):
        with pytest.raises(ArgumentError, match="no such file or folder"):
            image_files(words)


@pytest.mark.parametrize(
    ("name", "said"), [("answers.txt", "its suffix is none of .csv"), ("there.csv", "exists already")]
)
def test_a_file_that_cannot_be_written_is_told_before_anything_is_loaded(tmp_path, name, said):
    (tmp_path / "there.csv").write_text("mine")
    with pytest.raises(ArgumentError, match=said):
        dispatch(["predict", "nowhere", "digits", "--output_file", str(tmp_path / name)])
    assert (tmp_path / "there.csv").read_text() == "mine"


def test_the_evaluator_takes_a_ready_pipeline_and_this_packages_metrics():
    """The library's own ends in an AttributeError there under transformers 5."""
    from vit_hf.evaluation.adapter import ImageClassification

    pipe = SimpleNamespace(
        task="image-classification", model=SimpleNamespace(config=SimpleNamespace(label2id={"a": 0}))
    )
    evaluator = ImageClassification()
    assert evaluator.prepare_pipeline(pipe) is pipe
    found = evaluator.predictions_processor([[{"label": "a", "score": 1.0}]], None)
    assert found == {"predictions": [0]}
    metric = evaluator.prepare_metric("accuracy")
    assert metric.compute(predictions=[0, 1], references=[0, 0]) == {"accuracy": 0.5}
    with pytest.raises(ValueError, match="a pipeline for text-generation is given"):
        evaluator.prepare_pipeline(SimpleNamespace(task="text-generation"))
