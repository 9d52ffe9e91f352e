"""Loading a set: columns, splits and labels are found or named, and every mistake is one line that says what to do."""

import http.server
import io
import json
import threading

import datasets
import huggingface_hub
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image as PillowImage

from vit_hf.data.sets import load as sources
from vit_hf.data.sets.load import load_image_splits
from vit_hf.data.sets.names import HUB_SETS
from vit_hf.data.sets.subset import SubsetRule
from vit_hf.errors import UserError

CIFAR_NAMES = ["airplane", "bird", "cat"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")


def _png(value: int) -> bytes:
    """A 4x4 grey picture that no other value gives."""
    buffer = io.BytesIO()
    pixels = np.full((4, 4), value % 256, dtype=np.uint8)
    pixels[0, 0] = value // 256
    PillowImage.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _split(labels, label_feature, *, image="img", label="label", first=0, **more) -> datasets.Dataset:
    features = datasets.Features({image: datasets.Image(), label: label_feature})
    rows = {image: [{"bytes": _png(first + n), "path": None} for n in range(len(labels))], label: list(labels)}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    for name, feature in more.items():
        dataset = dataset.add_column(name, list(labels), feature=feature)
    return dataset


def _parquet(folder, **splits: datasets.Dataset) -> str:
    """Write splits as the Hub lays them out: data/<split>-00000-of-00001.parquet."""
    (folder / "data").mkdir(parents=True)
    for name, dataset in splits.items():
        dataset.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return str(folder)


def _imagefolder(folder, **splits: dict[str, int]) -> str:
    number = 0
    for split, counts in splits.items():
        for name, count in counts.items():
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for _ in range(count):
                (folder / split / name / f"{number}.png").write_bytes(_png(number))
                number += 1
    return str(folder)


def _cifar(folder, counts=(12, 8, 20), test_labels=(2, 0, 1, 1, 2), **more) -> str:
    label = datasets.ClassLabel(names=CIFAR_NAMES)
    train = np.random.RandomState(0).permutation(np.repeat(np.arange(3), counts))
    return _parquet(folder, train=_split(train, label), test=_split(test_labels, label, first=900), **more)


def _message(*args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        load_image_splits(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    return message


def _pictures(dataset) -> list[bytes]:
    return [row["image"]["bytes"] for row in dataset]


# ---- columns and splits ----


def test_a_parquet_folder_with_the_schema_of_cifar10(tmp_path):
    loaded = load_image_splits(_cifar(tmp_path / "cifar"))
    assert loaded.train.column_names == loaded.eval.column_names == ["image", "label"]
    assert loaded.train.features["image"] == datasets.Image(decode=False)
    assert loaded.train.features["label"].names == loaded.class_names == CIFAR_NAMES
    assert (len(loaded.train), loaded.eval["label"][:]) == (40, [2, 0, 1, 1, 2])
    assert _pictures(loaded.eval) == [_png(900 + n) for n in range(5)]
    assert (loaded.train_split, loaded.eval_split, loaded.subset, loaded.notes) == ("train", "test", {}, [])


def test_an_image_folder(tmp_path):
    folder = _imagefolder(tmp_path / "pets", train={"dog": 3, "cat": 2}, val={"cat": 1, "dog": 1})
    loaded = load_image_splits(folder)
    assert loaded.class_names == ["cat", "dog"] and loaded.eval_split == "validation"
    assert np.bincount(loaded.train["label"]).tolist() == [2, 3]
    row = loaded.train[0]
    assert row["image"]["bytes"] is None and "/train/" in row["image"]["path"]
    assert loaded.class_names[row["label"]] in row["image"]["path"]


def test_a_folder_written_by_save_to_disk_with_and_without_splits(tmp_path):
    label = datasets.ClassLabel(names=CIFAR_NAMES)
    train, test = _split([0, 1, 2] * 10, label), _split([2, 1, 0], label, first=99)
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "both")
    loaded = load_image_splits(str(tmp_path / "both"))
    assert (len(loaded.train), loaded.eval["label"][:], loaded.eval_split) == (30, [2, 1, 0], "test")
    train.save_to_disk(tmp_path / "one")
    loaded = load_image_splits(str(tmp_path / "one"), split_seed=4)
    assert (len(loaded.train), len(loaded.eval)) == (27, 3)


def test_digits_load_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    loaded = load_image_splits("digits", cache_dir=str(tmp_path / "cache"))
    assert (len(loaded.train), len(loaded.eval), loaded.class_names[7]) == (1347, 450, "7")
    assert (tmp_path / "cache").is_dir() and not (tmp_path / "hf_cache" / "digits").exists()
    assert _message("digits", dataset_config_name="big").startswith("--dataset_name digits: is generated")


@pytest.mark.parametrize("absent", [-1, None])
def test_a_test_split_without_labels_gives_way_to_validation(tmp_path, absent):
    label = datasets.ClassLabel(names=CIFAR_NAMES)
    validation = _split([0, 1], label, first=500)
    folder = _cifar(tmp_path / "set", test_labels=[absent] * 3, validation=validation)
    loaded = load_image_splits(folder)
    assert loaded.eval_split == "validation" and _pictures(loaded.eval) == _pictures(
        validation.cast_column("img", datasets.Image(decode=False)).rename_column("img", "image")
    )
    assert loaded.notes == ["The test split has no labels, so it is not the evaluation split."]
    message = _message(folder, eval_split="test")
    assert message == "--eval_split test: has no labels; splits: train (40 rows), validation (2 rows), test (3 rows)"


def test_without_an_evaluation_split_a_stratified_tenth_is_held_out_and_said(tmp_path):
    label = datasets.ClassLabel(names=CIFAR_NAMES)
    folder = _parquet(tmp_path / "set", train=_split([0] * 50 + [1] * 30 + [2] * 20, label))
    loaded = load_image_splits(folder, split_seed=3)
    assert (len(loaded.train), len(loaded.eval)) == (90, 10)
    assert np.bincount(loaded.eval["label"]).tolist() == [5, 3, 2]
    assert not set(_pictures(loaded.train)) & set(_pictures(loaded.eval))
    assert (
        loaded.eval_split == "train (10% held out, split seed 3)" and "held out with --split_seed 3" in loaded.notes[0]
    )
    assert loaded.train_split == "train (90% kept, split seed 3)"
    again = load_image_splits(folder, split_seed=3, need_train=False)
    assert again.train is None and _pictures(again.eval) == _pictures(loaded.eval)
    assert _pictures(load_image_splits(folder, split_seed=4).eval) != _pictures(loaded.eval)


def test_splits_and_columns_can_be_named(tmp_path):
    label = datasets.ClassLabel(names=CIFAR_NAMES)
    coarse = datasets.ClassLabel(names=["machine", "animal", "other"])
    both = {"label": "fine_label", "coarse_label": coarse}
    folder = _parquet(tmp_path / "set", big=_split([0, 1, 2], label, **both), small=_split([2, 2], label, **both))
    chosen = {"train_split": "big", "eval_split": "small", "label_column_name": "coarse_label"}
    loaded = load_image_splits(folder, **chosen)
    assert loaded.class_names == ["machine", "animal", "other"] and len(loaded.eval) == 2
    assert _message(folder, train_split="big", eval_split="small") == (
        "--label_column_name: choose one of fine_label, coarse_label; "
        "columns of the big split: img, fine_label, coarse_label"
    )
    assert (
        _message(folder) == "no split is called train: name one by --train_split; splits: big (3 rows), small (2 rows)"
    )
    assert _message(folder, **{**chosen, "train_split": "huge"}) == (
        "--train_split huge: no such split; splits: big (3 rows), small (2 rows)"
    )
    assert _message(folder, **{**chosen, "eval_split": "dev"}).startswith("--eval_split dev: no such split; splits")
    assert _message(folder, **chosen, image_column_name="photo") == (
        "--image_column_name photo: no such column; columns of the big split: img, fine_label, coarse_label"
    )
    assert _message(folder, **{**chosen, "label_column_name": "kind"}).startswith(
        "--label_column_name kind: no such column; columns of the big split"
    )
    assert "--image_column_name fine_label: holds no images" in _message(
        folder, **chosen, image_column_name="fine_label"
    )
    same = load_image_splits(folder, **{**chosen, "eval_split": "big"})
    assert len(same.eval) == len(same.train) == 3 and "as the flags ask" in same.notes[0]


def test_a_column_called_label_is_preferred_and_image_bytes_are_enough(tmp_path):
    label = datasets.ClassLabel(names=CIFAR_NAMES)
    folder = _cifar(tmp_path / "set")
    train = _split([0, 1, 2], label, coarse_label=datasets.ClassLabel(names=["a", "b", "c"]))
    _parquet(tmp_path / "two", train=train, test=train)
    assert load_image_splits(str(tmp_path / "two")).class_names == CIFAR_NAMES
    raw = datasets.Dataset.from_dict({"image": [_png(1), _png(2)], "label": [5, 3]})
    (tmp_path / "raw").mkdir()
    raw.to_parquet(tmp_path / "raw" / "train.parquet")
    raw.to_parquet(tmp_path / "raw" / "test.parquet")
    loaded = load_image_splits(str(tmp_path / "raw"))
    assert _pictures(loaded.train) == [_png(1), _png(2)] and loaded.class_names == ["3", "5"]
    assert "no label column found: name it by --label_column_name" in _message(
        _parquet(
            tmp_path / "none", train=_split([0], label, label="kind").cast_column("kind", datasets.Value("int64"))
        )
    )
    assert len(load_image_splits(folder, image_column_name="img", label_column_name="label").train) == 40


# ---- labels ----


@pytest.mark.parametrize(
    "values, names, numbers",
    [(["pear", "fig", "pear"], ["fig", "kiwi", "pear"], [2, 0, 2]), ([10, 9, 10], ["9", "10", "30"], [1, 0, 1])],
)
def test_plain_labels_are_numbered_alike_in_both_splits(tmp_path, values, names, numbers):
    kind = datasets.Value("string" if isinstance(values[0], str) else "int64")
    other = "kiwi" if isinstance(values[0], str) else 30
    train, test = _split([*values, other], kind), _split([other, values[0]], kind, first=50)
    folder = _parquet(tmp_path / "set", train=train, test=test)
    for need_train in (True, False):
        loaded = load_image_splits(folder, need_train=need_train)
        assert loaded.class_names == names == loaded.eval.features["label"].names
        assert loaded.eval["label"][:] == [names.index(str(other)), numbers[0]]
    assert load_image_splits(folder).train["label"][:] == [*numbers, names.index(str(other))]


def test_splits_that_list_the_same_classes_in_another_order_are_brought_together(tmp_path):
    train = _split([0, 1, 2], datasets.ClassLabel(names=CIFAR_NAMES))
    test = _split([0, 2], datasets.ClassLabel(names=["cat", "bird", "airplane"]), first=10)
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "set")
    loaded = load_image_splits(str(tmp_path / "set"))
    assert loaded.class_names == CIFAR_NAMES and loaded.eval["label"][:] == [2, 0]
    foreign = _split([0, 2], datasets.ClassLabel(names=["cat", "bird", "frog"]))
    datasets.DatasetDict({"train": train, "test": foreign}).save_to_disk(tmp_path / "foreign")
    message = _message(str(tmp_path / "foreign"))
    assert message.startswith("test split: its classes are not those of the training split")
    assert "airplane, frog" in message


def test_labels_outside_their_range_name_row_value_and_range(tmp_path):
    label = datasets.ClassLabel(names=CIFAR_NAMES)
    folder = _parquet(tmp_path / "below", train=_split([0, 1, -1, 2, -1], label), test=_split([0], label))
    assert _message(folder).startswith("train split, row 2: label -1 is outside 0..2 (2 such rows)")
    folder = _parquet(tmp_path / "null", train=_split([0, 1, 2, None], label), test=_split([0], label))
    assert _message(folder).startswith("train split, row 3: label is empty")
    above = _split([0, 7, 1], datasets.ClassLabel(num_classes=8))
    schema = _split([0], label).data.schema  # claims three classes for a file that holds a seven
    (tmp_path / "above" / "data").mkdir(parents=True)
    table = above.data.table.replace_schema_metadata(schema.metadata)
    pyarrow.parquet.write_table(table, tmp_path / "above" / "data" / "train-00000-of-00001.parquet")
    assert _message(str(tmp_path / "above")).startswith("train split, row 1: label 7 is outside 0..2 (1 such rows)")


def test_labels_beyond_what_the_card_declares_are_one_line_too(tmp_path):
    """Here `datasets` itself refuses the rows, in an error wrapped in another."""
    folder = _parquet(tmp_path / "set", train=_split([0, 7, 1], datasets.Value("int32")))
    (tmp_path / "set" / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: img\n    dtype: image\n  - name: label\n    dtype:\n"
        "      class_label:\n        names:\n          '0': airplane\n          '1': bird\n---\n"
    )
    assert _message(folder) == (
        f"--dataset_name {folder}: a label is 7, allowed are 0..1: correct the labels or class names"
    )


# ---- subset and draws ----


def test_a_subset_of_classes_renumbers_in_the_source_order_and_filters_evaluation(tmp_path):
    loaded = load_image_splits(_cifar(tmp_path / "cifar"), subset=SubsetRule(classes=["cat", "0"]))
    assert loaded.class_names == ["airplane", "cat"] == loaded.eval.features["label"].names
    assert np.bincount(loaded.train["label"]).tolist() == [12, 20]
    assert loaded.eval["label"][:] == [1, 0, 1]
    assert _pictures(loaded.eval) == [_png(900), _png(901), _png(904)]
    assert loaded.subset["rule"] == {"classes": ["cat", "0"], "seed": 0} and loaded.subset["train_samples"] == 32
    plain = load_image_splits(str(tmp_path / "cifar"), subset=SubsetRule(classes=["cat", "0"]), need_train=False)
    assert plain.subset == {} and _pictures(plain.eval) == _pictures(loaded.eval)


def test_a_shuffled_source_gives_the_same_training_images(tmp_path):
    label = datasets.ClassLabel(names=CIFAR_NAMES)
    train, test = _split([0, 1, 2, 2] * 25, label), _split([0, 1, 2], label, first=900)
    order = np.random.RandomState(1).permutation(100)
    first = _parquet(tmp_path / "first", train=train, test=test)
    second = _parquet(tmp_path / "second", train=train.select(order), test=test)
    rule = SubsetRule(fraction=0.35, seed=2)
    chosen, shuffled = (load_image_splits(folder, subset=rule) for folder in (first, second))
    assert len(chosen.train) == 35 and len(chosen.eval) == 3
    assert sorted(_pictures(chosen.train)) == sorted(_pictures(shuffled.train))
    assert all(abs(n - 0.35 * count) < 1 for n, count in zip(np.bincount(chosen.train["label"]), (25, 25, 50)))
    again = load_image_splits(first, subset=rule)
    assert again.subset == chosen.subset and len(chosen.subset["subset_hash"]) == 64
    other = load_image_splits(first, subset=SubsetRule(fraction=0.35, seed=3))
    assert other.subset["subset_hash"] != chosen.subset["subset_hash"]
    assert chosen.subset["subset_hash"] != shuffled.subset["subset_hash"], "the hash is over rows of this source"


def test_a_subset_of_an_image_folder_does_not_depend_on_where_it_lies(tmp_path):
    here = _imagefolder(tmp_path / "here", train={"cat": 20, "dog": 20}, test={"cat": 1, "dog": 1})
    there = _imagefolder(tmp_path / "elsewhere" / "pets", train={"cat": 20, "dog": 20}, test={"cat": 1, "dog": 1})
    chosen = [load_image_splits(folder, subset=SubsetRule(per_class=5)).train for folder in (here, there)]
    names = [[row["image"]["path"].rsplit("/", 3)[1:] for row in split] for split in chosen]
    assert names[0] == names[1] and len(names[0]) == 10


def test_trial_draws_come_after_the_subset_and_may_miss_classes(tmp_path):
    folder, rule = _cifar(tmp_path / "cifar"), SubsetRule(per_class=8)
    whole = load_image_splits(folder, subset=rule)
    drawn = load_image_splits(folder, subset=rule, max_train_samples=1, max_eval_samples=2, split_seed=1)
    assert (len(drawn.train), len(drawn.eval), drawn.class_names) == (1, 2, CIFAR_NAMES)
    assert set(_pictures(drawn.train)) < set(_pictures(whole.train)) and drawn.subset == whole.subset
    assert len(load_image_splits(folder, max_train_samples=10**6, max_eval_samples=10**6).train) == 40


def test_a_subset_that_cannot_be_is_refused(tmp_path):
    folder = _cifar(tmp_path / "cifar", counts=(100, 100, 2))
    message = _message(folder, subset=SubsetRule(fraction=0.1))
    assert message.startswith(
        "the subset {'fraction': 0.1, 'seed': 0} leaves no training images of evaluation class cat"
    )
    message = _message(folder, subset=SubsetRule(per_class=3))
    assert message.startswith("--subset_per_class 3: class 'cat' has 2 training images")
    message = _message(folder, subset=SubsetRule(classes=["brid"]))
    assert message.startswith("--subset_classes: 'brid' is not a class (nearest: bird")
    message = _message(folder, subset=SubsetRule(fraction=0.001))
    assert "keeps zero training samples" in message
    only = load_image_splits(folder, subset=SubsetRule(fraction=0.1, classes=["bird", "airplane"]))
    assert len(only.train) == 20


def test_a_training_file_without_rows_is_zero_training_samples(tmp_path):
    label = datasets.ClassLabel(names=CIFAR_NAMES)
    folder = _parquet(tmp_path / "set", train=_split([], label), test=_split([0, 1], label))
    assert _message(folder) == (
        f"--dataset_name {folder}: zero samples in the train split: it needs at least one image"
    )


def test_a_split_without_rows_is_refused_where_it_is_needed(monkeypatch):
    label = datasets.ClassLabel(names=CIFAR_NAMES)
    splits = {"train": _split([], label), "test": _split([0, 1], label)}
    monkeypatch.setattr(sources.datasets, "load_dataset", lambda *args, **kwargs: datasets.DatasetDict(splits))
    assert _message("cifar10") == ("--train_split train: zero training samples; splits: train (0 rows), test (2 rows)")
    assert len(load_image_splits("cifar10", need_train=False).eval) == 2
    splits.update(train=splits["test"], test=splits["train"])
    assert _message("cifar10") == (
        "--eval_split test: no images of the classes in use; splits: train (2 rows), test (0 rows)"
    )


def test_a_set_too_small_to_hold_out_from_and_one_with_untrained_classes(tmp_path):
    _split([0, 1], datasets.ClassLabel(names=CIFAR_NAMES)).save_to_disk(tmp_path / "tiny")
    assert "2 training rows are too few to hold some out" in _message(str(tmp_path / "tiny"))
    folder = _imagefolder(tmp_path / "pets", train={"cat": 2, "dog": 2}, test={"cat": 1, "frog": 1})
    assert load_image_splits(folder).notes == ["The evaluation split has classes without a training image: frog."]


def test_an_image_folder_with_unsorted_pictures_says_what_is_missing(tmp_path):
    folder = _imagefolder(tmp_path / "pets", train={"cat": 2, "dog": 2}, test={".": 3})
    assert _message(folder) == (
        "no label column found: name it by --label_column_name, or put every image in a folder of its class; "
        "columns of the train split: image"
    )


# ---- names that cannot be loaded ----


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def hub(monkeypatch):
    """A Hub that gates ImageNet and knows no other set."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            gated = "ILSVRC/imagenet-1k" in self.path
            self.send_response(401 if gated else 404)
            self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else json.dumps({"error": "no"}).encode())

        do_GET = do_HEAD

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    yield
    server.shutdown()
    thread.join()


def test_gated_imagenet_says_where_to_ask_and_how_to_log_in(hub):
    assert _message("imagenet-1k") == (
        "--dataset_name imagenet-1k: gated; ask for access at "
        "https://huggingface.co/datasets/ILSVRC/imagenet-1k and log in with `hf auth login`"
    )


@pytest.mark.parametrize("name", ["glyph", "someone/no-such-set", "a b"])
def test_an_unknown_name_lists_the_named_sets(hub, name):
    message = _message(name)
    assert message.startswith(f"--dataset_name {name}: not a named set, not a folder, and the Hub has no")
    assert "named sets: digits, glyphs, fractal, cifar10, imagenet-1k" in message
    assert ("nearest: glyphs" in message) == ("glyph" in name)


@pytest.mark.parametrize("name", ["/no/such/folder", "./glyph"])
def test_a_path_is_not_sought_on_the_hub(name):
    assert _message(name) == f"--dataset_name {name}: no such folder"


def test_no_connection_is_one_line(offline):
    message = _message("cifar10")
    assert message.startswith(
        "--dataset_name cifar10: uoft-cs/cifar10 is not in the cache, and the Hub cannot be reached (Couldn't reach"
    )
    assert message.endswith("digits, glyphs, fractal need no network")
    message = _message("glyf")
    assert message.startswith("--dataset_name glyf: not a named set, not a folder, and the Hub cannot be reached")
    assert "nearest: glyphs" in message


def test_broken_and_empty_folders_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no image, parquet or tar files found" in _message(str(tmp_path / "empty"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"not parquet at all")
    assert "broken: cannot be read: " in _message(str(tmp_path / "broken"))


def test_a_configuration_that_is_missing_is_named_by_its_flag(tmp_path):
    folder = _cifar(tmp_path / "set")
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files: data/test*\n- config_name: large\n"
        "  data_files: data/train*\n---\n"
    )
    message = _message(folder)
    assert "['small', 'large']" in message and message.endswith("choose one with --dataset_config_name")
    assert "'huge' not found" in _message(folder, dataset_config_name="huge")
    assert len(load_image_splits(folder, dataset_config_name="large").train) == 36


def test_every_named_set_is_known_to_the_loader(monkeypatch):
    asked = []

    def load(path, *args, **kwargs):
        asked.append(path)
        raise ConnectionError("stop here")

    monkeypatch.setattr(sources.datasets, "load_dataset", load)
    for name in HUB_SETS:
        _message(name)
    assert asked == ["uoft-cs/cifar10", "ILSVRC/imagenet-1k"]
