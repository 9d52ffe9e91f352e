"""Sets whose images have any number of labels: read, narrowed, copied, streamed, kept decoded, and brought to the device."""

import datasets
import numpy as np
import pytest
import torch

from tests.pairs import NAMES, pictures, write_pairs
from vit_hf.data.augment.mixing import Mixing
from vit_hf.data.augment.pipeline import Augment
from vit_hf.data.faults import Faults
from vit_hf.data.feed import LoadingSettings, eval_batches, train_batches
from vit_hf.data.order import StepPlan
from vit_hf.data.preprocessing import Preprocessing
from vit_hf.data.processes import Processes
from vit_hf.data.rows.table import TableRows
from vit_hf.data.sets.draws import Draws
from vit_hf.data.sets.load import load_image_splits
from vit_hf.data.sets.subset import SubsetRule
from vit_hf.errors import UserError

SIZES = {"train": 64, "test": 24}


def hot(lists, classes=10):
    return np.array([[number in row for number in range(classes)] for row in lists])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "set", SIZES)


def test_a_folder_of_lists_has_several_labels_an_image(folder, tmp_path):
    splits = load_image_splits(str(folder), cache_dir=str(tmp_path))
    rows = splits.rows("train")
    assert splits.multi_label and splits.class_names == NAMES
    images, labels = rows.read(np.array([9, 7, 2]))
    wanted = pictures(64, 0)["labels"]
    assert len(images) == 3 and np.array_equal(labels, hot([wanted[9], wanted[7], wanted[2]]))
    assert labels.dtype == bool and not labels[1].any()  # a picture without a digit


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("decoded_cache", ["auto", "never"])
def test_batches_are_multi_hot(folder, tmp_path, monkeypatch, streaming, decoded_cache):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    splits = load_image_splits(str(folder), cache_dir=str(tmp_path), streaming=streaming)
    inputs = Preprocessing((32, 32))
    processes = Processes(torch.device("cpu"))
    settings = LoadingSettings(decoded_cache=decoded_cache, dataloader_num_workers=0, per_device_eval_batch_size=7)
    found = np.concatenate([
        batch["labels"].numpy()[batch["valid"].numpy()]
        for batch in eval_batches(splits.rows("eval"), inputs, processes, settings, Faults())
    ])  # fmt: skip
    assert found.dtype == np.float32 and np.array_equal(found, hot(pictures(24, 1)["labels"]))
    wanted = hot(pictures(64, 0)["labels"])
    batches, _ = train_batches(
        splits.rows("train"), inputs, StepPlan(0, 0, 8, 1, 0, 8, 1), processes, settings, Faults()
    )
    seen = [(int(index), label) for batch in batches for index, label in zip(batch["index"], batch["labels"].numpy())]
    assert sorted(index for index, _ in seen) == list(range(64))
    assert all(np.array_equal(label, wanted[index]) for index, label in seen)


def test_another_start_finds_a_stream_decoded(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    for numbers in (list(range(10)), list(range(10))[::-1]):  # the second with the classes under other numbers
        rows = load_image_splits(str(folder), cache_dir=str(tmp_path), streaming=True).rows("eval")
        batches = eval_batches(rows, Preprocessing((32, 32)), Processes(torch.device("cpu")),
                               LoadingSettings(), Faults(), class_index=numbers)  # fmt: skip
        assert batches.batches.decoded is not None
        found = np.concatenate([batch["labels"].numpy() for batch in batches])[:24]
        assert np.array_equal(found[:, numbers], hot(pictures(24, 1)["labels"]))
    rows = load_image_splits(str(folder), cache_dir=str(tmp_path), streaming=True, max_eval_samples=9).rows("eval")
    drawn = eval_batches(rows, Preprocessing((32, 32)), Processes(torch.device("cpu")), LoadingSettings(), Faults())
    found = np.concatenate([batch["labels"].numpy() for batch in drawn])[:9]
    assert not np.array_equal(rows.source_rows, np.arange(9))
    assert np.array_equal(found, hot(pictures(24, 1)["labels"])[rows.source_rows])


def test_a_subset_of_classes_keeps_images_of_one_and_their_other_labels_go(folder, tmp_path):
    splits = load_image_splits(str(folder), cache_dir=str(tmp_path), subset=SubsetRule(classes=["7", "2"]))
    lists = pictures(64, 0)["labels"]
    kept = [row for row in lists if {2, 7} & set(row)]
    assert splits.class_names == ["2", "7"] and len(splits.train) == len(kept)
    assert np.array_equal(splits.rows("train").labels[np.arange(len(kept))], hot(kept)[:, [2, 7]])


def test_a_fraction_is_one_of_all_images_and_the_same_in_any_order(folder, tmp_path):
    rule = SubsetRule(fraction=0.5, seed=3)
    splits = load_image_splits(str(folder), cache_dir=str(tmp_path), subset=rule)
    assert len(splits.train) == 32 == splits.subset["train_samples"]


def test_what_needs_one_label_an_image_is_refused_in_a_line(folder, tmp_path):
    with pytest.raises(UserError, match="--subset_per_class 2: needs one label an image"):
        load_image_splits(str(folder), cache_dir=str(tmp_path), subset=SubsetRule(per_class=2))
    splits = load_image_splits(str(folder), cache_dir=str(tmp_path))
    with pytest.raises(UserError, match="--probe_steps: takes sets with one class an image"):
        Draws(splits, "--probe_steps")
    rows = splits.rows("train")
    with pytest.raises(UserError, match="--class_balanced true: needs one label an image"):
        train_batches(rows, Preprocessing((32, 32)), StepPlan(0, 0, 1, 1, 0, 8, 1),
                      Processes(torch.device("cpu")), LoadingSettings(class_balanced=True), Faults())  # fmt: skip


def test_a_tenth_is_held_out_where_no_split_is_there(tmp_path):
    folder = write_pairs(tmp_path / "set", {"train": 40})
    splits = load_image_splits(str(folder), cache_dir=str(tmp_path / "cache"))
    assert (len(splits.train), len(splits.eval)) == (36, 4)
    assert "4 rows (10%) of train are held out" in splits.notes[0]


BAD = [
    ([[0], [1, 4]], "train split, row 1: label 4 in its list, allowed are 0..2"),
    ([[0, 2, 0], [1]], "train split, row 0: label 0 is twice in its list"),
    ([[0], [1, None]], "train split, row 1: label None in its list, allowed are 0..2"),
    ([[0], None], "train split, row 1: labels is empty; every row needs a label"),
]


@pytest.mark.parametrize(
    "lists, line, typed",
    [(*one, True) for one in BAD] + [(*one, False) for one in BAD[1:]],  # plain integers have no names to be out of
)
def test_a_bad_list_is_named(tmp_path, lists, line, typed):
    label = datasets.Value("int64")
    rows = pictures(2, 0) | {"labels": lists}
    features = datasets.Features({"image": datasets.Image(), "labels": datasets.List(label), "row": label})
    whole = datasets.Dataset.from_dict(rows, features=features)
    if typed:  # `datasets` would refuse to write some of these: the type is laid over the table
        kinds = datasets.Features(features | {"labels": datasets.List(datasets.ClassLabel(names=["a", "b", "c"]))})
        whole = datasets.Dataset(whole.data, info=datasets.DatasetInfo(features=kinds))
    datasets.DatasetDict(train=whole).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(UserError, match=line.replace("0..2", r"0\.\.\d")):
        load_image_splits(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"), eval_split="train")


def test_lists_of_integers_and_of_text_are_numbered(tmp_path):
    for kind, lists, names in (
        (datasets.Value("int32"), [[3], [], [0, 1]], ["0", "1", "2", "3"]),
        (datasets.Value("string"), [["dog"], [], ["dog", "ant"]], ["ant", "dog"]),
    ):
        features = datasets.Features(
            {"image": datasets.Image(), "labels": datasets.List(kind), "row": datasets.Value("int64")}
        )
        whole = datasets.Dataset.from_dict(pictures(3, 0) | {"labels": lists}, features=features)
        folder = str(tmp_path / names[-1])
        datasets.DatasetDict(train=whole, test=whole).save_to_disk(folder)
        splits = load_image_splits(folder, cache_dir=str(tmp_path / "cache"))
        assert splits.class_names == names and splits.multi_label
        numbers = [[names.index(str(one)) for one in row] for row in lists]
        assert np.array_equal(splits.rows("eval").labels[np.arange(3)], hot(numbers, len(names)))


def test_a_copy_keeps_the_lists_and_streams_with_them(folder, tmp_path):
    from vit_hf.commands.data import prepare

    copy = tmp_path / "copy"
    prepare(["--dataset_name", str(folder), "--output_dir", str(copy), "--shorter_side", "32", "--num_proc", "1"])
    rule = SubsetRule(classes=["1", "5"])
    seen = []
    for name, streaming in ((folder, False), (copy, False), (copy, True)):
        splits = load_image_splits(str(name), cache_dir=str(tmp_path / "cache"), streaming=streaming, subset=rule)
        rows = splits.rows("train")
        _, labels = rows.read(np.arange(len(rows)))
        seen.append((splits.subset["subset_hash"], sorted(labels.tolist())))
    assert splits.class_names == ["1", "5"] and seen[0] == seen[1] == seen[2]


def augmented(labels, **options):
    size = len(labels)
    augment = Augment(seed=0, num_classes=4, mean=[0.5] * 3, std=[0.5] * 3, device=torch.device("cpu"), **options)
    batch = {"pixel_values": torch.zeros(size, 3, 8, 8, dtype=torch.uint8), "labels": labels}
    batch |= {name: torch.arange(size) for name in ("visit", "index")}
    return augment(batch, 0, 0, 0)[1]


def test_smoothing_and_mixing_of_several_labels_are_those_of_one():
    """A multi-hot row with one label is trained on as that label is; with more, each share is by the same rule."""
    one = torch.tensor([0, 3, 1, 2])
    for options in (
        {"label_smoothing": 0.2},
        {"mixing": Mixing(mixup_alpha=1.0)},
        {"mixing": Mixing(cutmix_alpha=1.0)},
    ):
        single = augmented(one, **options)
        assert torch.equal(augmented(torch.nn.functional.one_hot(one, 4).float(), **options), single)
    several = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0]])
    smooth = augmented(several, label_smoothing=0.2)
    torch.testing.assert_close(smooth, torch.tensor([[0.85, 0.85, 0.05, 0.05], [0.05] * 4]))
    mixed = augmented(several, mixing=Mixing(mixup_alpha=1.0))
    share = mixed[0, 0]
    torch.testing.assert_close(mixed, torch.stack([share * several[0], (1 - share) * several[0]]))


def test_a_set_of_single_labels_is_read_as_before(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"]),
                                  "tags": datasets.List(datasets.ClassLabel(names=["x"]))})  # fmt: skip
    rows = {"image": pictures(2, 0)["image"], "label": [1, 0], "tags": [[0], []]}
    whole = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=whole, test=whole).save_to_disk(str(tmp_path / "set"))
    splits = load_image_splits(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    assert not splits.multi_label and TableRows(splits.train).labels.tolist() == [1, 0]
