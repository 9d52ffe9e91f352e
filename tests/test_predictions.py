"""predictions.parquet: what is written is read again, by us and by others."""

import dataclasses

import numpy as np
import pandas
import pyarrow
import pytest
from pyarrow import parquet

from vit_hf.errors import UserError
from vit_hf.evaluation.predictions import FILE, Predictions, read_predictions, write_predictions


def some(num=7, classes=6, several=False):
    rng = np.random.RandomState(0)
    probabilities = rng.dirichlet(np.ones(classes), num).astype(np.float32)
    top5 = np.argsort(-probabilities, axis=1)[:, :5]
    labels = rng.rand(num, classes) < 0.3 if several else rng.randint(0, classes, num)
    return Predictions(
        np.arange(num) * 2, labels, top5, np.take_along_axis(probabilities, top5, 1),
        rng.rand(num).astype(np.float32), rng.rand(num).astype(np.float32), probabilities if several else None,
        tuple(f"class {number}" for number in range(classes)), "digits test",
    )  # fmt: skip


def assert_same(one, two):
    for item in dataclasses.fields(Predictions):
        before, after = getattr(one, item.name), getattr(two, item.name)
        if isinstance(before, np.ndarray):
            assert before.dtype == after.dtype and np.array_equal(before, after), item.name
        else:
            assert before == after, item.name


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("num", [1, 7])
def test_written_and_read_again(tmp_path, several, num):
    """One label, and several with images that have none."""
    predictions = some(num, several=several)
    write_predictions(tmp_path / "new" / FILE, predictions)
    assert_same(predictions, read_predictions(tmp_path / "new" / FILE))
    assert [path.name for path in (tmp_path / "new").iterdir()] == [FILE]


def test_pandas_reads_it(tmp_path):
    predictions = some()
    write_predictions(tmp_path / FILE, predictions)
    table = pandas.read_parquet(tmp_path / FILE)
    assert list(table) == ["index", "label", "top5_label", "top5_probability", "loss", "brier"]
    assert table.label.tolist() == predictions.labels.tolist()
    assert np.array_equal(np.stack(table.top5_label), predictions.top5)
    write_predictions(tmp_path / FILE, some(several=True))
    sets = [np.flatnonzero(row).tolist() for row in some(several=True).labels]
    assert [list(row) for row in pandas.read_parquet(tmp_path / FILE).label] == sets


def test_what_is_no_file_of_predictions_is_one_line(tmp_path):
    (tmp_path / "text.parquet").write_text("no table")
    pandas.DataFrame({"index": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(UserError, match="none.parquet: no such file"):
        read_predictions(tmp_path / "none.parquet")
    write_predictions(tmp_path / FILE, some())
    (tmp_path / "cut.parquet").write_bytes((tmp_path / FILE).read_bytes()[:400])
    for name in ("text.parquet", "other.parquet", "cut.parquet"):
        with pytest.raises(UserError, match=f"{name} holds no predictions"):
            read_predictions(tmp_path / name)


def test_cells_that_no_prediction_has_are_one_line(tmp_path):
    write_predictions(tmp_path / "good.parquet", some(7))
    good = parquet.read_table(tmp_path / "good.parquet")
    for label, line in (
        ([None] * 7, "empty cells in label"),
        ([99] * 7, "class 99 where . are named"),
        ([-1] * 7, "class -1 where"),
    ):
        changed = good.set_column(1, "label", pyarrow.array(label, pyarrow.int64()))
        parquet.write_table(changed, tmp_path / "bad.parquet")
        with pytest.raises(UserError, match=f"bad.parquet holds no predictions .{line}"):
            read_predictions(tmp_path / "bad.parquet")


def test_an_answer_is_right_where_it_is_one_of_the_labels():
    labels = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0]], dtype=bool)
    top = np.array([[2, 1, 0], [0, 1, 2], [0, 1, 2]])
    predictions = dataclasses.replace(some(3, 3, several=True), labels=labels, top5=top)
    assert predictions.correct.tolist() == [True, False, False] and predictions.hits(2).tolist() == [True, True, False]
    single = dataclasses.replace(predictions, labels=np.array([2, 1, 2]))
    assert single.correct.tolist() == [True, False, False] and single.hits(3).all()
    assert single.name(1) == "class 1" and dataclasses.replace(single, class_names=()).name(1) == "1"
